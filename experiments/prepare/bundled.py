"""The bundled data sets' format: corpus.jsonl.gz, train and test queries and qrels."""
from pathlib import Path

from checks import PrepareError, Split
from recr1.data import read_qrels
from recr1.files import fingerprint
from upstream import find, json_rows, one_line


def read_bundled(folder: Path) -> tuple[list[dict], dict[str, Split], list[dict]]:
    """(corpus rows, {"train", "test"}, source): texts on one line, other keys as they are."""
    paths = [find(folder, "corpus.jsonl"), *(find(folder, f"{name}.{kind}") for name in ("train", "test") for kind in ("queries.jsonl", "qrels.tsv"))]
    corpus = [row | {key: one_line(row[key]) for key in ("title", "text")} for _, row in json_rows(paths[0], ("id", "title", "text"))]
    splits = {}
    for name, queries, qrels in (("train", *paths[1:3]), ("test", *paths[3:5])):
        judged, repeats = read_qrels(qrels)
        if repeats:
            raise PrepareError(repeats[0])
        splits[name] = split = Split()
        for line, row in json_rows(queries, ("id", "text")):
            if row["id"] not in judged:
                raise PrepareError(f"{queries}:{line}: {row['id']!r} is not in {qrels.name}; take both files from one release")
            split.add(row | dict(text=one_line(row["text"])), list(judged[row["id"]].items()))
        for id in judged.keys() - split.targets.keys():
            raise PrepareError(f"{qrels}: judges {id!r}, which {queries.name} does not have; take both files from one release")
    return corpus, splits, [dict(name=path.name, **fingerprint(path)) for path in paths]
