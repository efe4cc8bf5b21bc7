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
    corpus_path = find_file(folder, "corpus.jsonl")
    paths = [corpus_path]
    for name in names:
        paths.append(find_file(folder, f"{name}.queries.jsonl"))
        paths.append(find_file(folder, f"{name}.qrels.tsv"))
    corpus = []
    for _, row in iterate_json(corpus_path, ("id", "title", "text")):
        corpus.append(row | dict(title=tidy(row["title"]), text=tidy(row["text"])))
    splits = {}
    for name, queries_path, qrels_path in zip(names, paths[1::2], paths[2::2]):
        splits[name] = read_split(queries_path, qrels_path, tidy)
    source = [dict(name=path.name, **fingerprint_file(path)) for path in paths]
    return corpus, splits, source


def read_split(queries_path: Path, qrels_path: Path, tidy: Callable[[str], str]) -> Split:
    """Read the queries and judgements of one split. Raises PrepareError where they do not match."""
    judged, repeats = read_qrels(qrels_path)
    if repeats:
        raise PrepareError(repeats[0])
    split = Split()
    for line, row in iterate_json(queries_path, ("id", "text")):
        if row["id"] not in judged:
            raise PrepareError(
                f"{queries_path}:{line}: {row['id']!r} is not in {qrels_path.name}; "
                "take both files from one release"
            )
        targets = list(judged[row["id"]].items())
        split.add(row | dict(text=tidy(row["text"])), targets)
    for id in judged.keys() - split.targets.keys():
        raise PrepareError(
            f"{qrels_path}: judges {id!r}, which {queries_path.name} does not have; "
            "take both files from one release"
        )
    return split
