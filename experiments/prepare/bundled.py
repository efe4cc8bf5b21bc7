"""Read the format of the bundled and the prepared data sets.

It has corpus.jsonl.gz, and queries and qrels of train and of each test setting.
"""

from collections.abc import Callable
from pathlib import Path

from checks import PrepareError, Split
from upstream import find_file, iterate_json, to_one_line

from recr1.data.readers import read_qrels
from recr1.utils.files import fingerprint_file

BUNDLED_MSRD = Path(__file__).resolve().parents[1] / "data/msrd"


def read_bundled(
    folder: Path,
    names: tuple[str, ...] = ("train", "test"),
    tidy: Callable[[str], str] = to_one_line,
) -> tuple[list[dict], dict[str, Split], list[dict]]:
    """Return (corpus rows, splits by name, source).

    Texts are as `tidy` makes them, other keys as they are.
    """
    corpus, source = read_catalog(folder, tidy)
    splits = {}
    for name in names:
        queries_path = find_file(folder, f"{name}.queries.jsonl")
        qrels_path = find_file(folder, f"{name}.qrels.tsv")
        splits[name] = read_split(queries_path, qrels_path, tidy)
        for path in (queries_path, qrels_path):
            source.append(dict(name=path.name, **fingerprint_file(path)))
    return corpus, splits, source


def read_catalog(
    folder: Path, tidy: Callable[[str], str] = to_one_line
) -> tuple[list[dict], list[dict]]:
    """Return (corpus rows, source) of the folder's corpus alone."""
    path = find_file(folder, "corpus.jsonl")
    corpus = []
    for _, row in iterate_json(path, ("id", "title", "text")):
        corpus.append(row | dict(title=tidy(row["title"]), text=tidy(row["text"])))
    return corpus, [dict(name=path.name, **fingerprint_file(path))]


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
