"""Read the format of the bundled and the prepared data sets.

It has corpus.jsonl.gz, and queries and qrels of train and of each test setting.
"""

from collections.abc import Callable
from pathlib import Path

from checks import PrepareError, Split
from upstream import find_file, iterate_json, to_one_line

from recr1.data.readers import read_qrels
from recr1.utils.files import fingerprint_file


def read_bundled(
    folder: Path,
    names: tuple[str, ...] = ("train", "test"),
    tidy: Callable[[str], str] = to_one_line,
) -> tuple[list[dict], dict[str, Split], list[dict]]:
    """Return (corpus rows, splits by name, source).

    Texts are as `tidy` makes them, other keys as they are.
    """
    paths = [
        find_file(folder, "corpus.jsonl"),
        *(
            find_file(folder, f"{name}.{kind}")
            for name in names
            for kind in ("queries.jsonl", "qrels.tsv")
        ),
    ]
    corpus = [
        row | {key: tidy(row[key]) for key in ("title", "text")}
        for _, row in iterate_json(paths[0], ("id", "title", "text"))
    ]
    splits = {}
    for name, queries, qrels in zip(names, paths[1::2], paths[2::2]):
        judged, repeats = read_qrels(qrels)
        if repeats:
            raise PrepareError(repeats[0])
        splits[name] = split = Split()
        for line, row in iterate_json(queries, ("id", "text")):
            if row["id"] not in judged:
                raise PrepareError(
                    f"{queries}:{line}: {row['id']!r} is not in {qrels.name}; "
                    "take both files from one release"
                )
            split.add(row | dict(text=tidy(row["text"])), list(judged[row["id"]].items()))
        for id in judged.keys() - split.targets.keys():
            raise PrepareError(
                f"{qrels}: judges {id!r}, which {queries.name} does not have; "
                "take both files from one release"
            )
    return corpus, splits, [dict(name=path.name, **fingerprint_file(path)) for path in paths]
