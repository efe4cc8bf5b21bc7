"""Run the scripts of experiments/prepare in this process, on files of upstream's formats that
tests make.
"""

import csv
import gzip
import importlib
import json
import sys
from pathlib import Path

from recr1.data.readers import is_validation, read_corpus, read_qrels, read_queries

ROOT = Path(__file__).resolve().parents[2]
# as Python does for a script that is started there
sys.path.insert(0, str(ROOT / "experiments/prepare"))


def script(name: str):
    """Import a script of experiments/prepare."""
    return importlib.import_module(name)


def _run_script(name: str, out: Path, options: tuple) -> int:
    argv = ["--out", str(out)]
    for option in options:
        argv.append(str(option))
    return script(name).main(argv)


def prepare(name: str, out: Path, *options) -> Path:
    """Run the script, which must succeed and leave nothing beside its folder; return the folder."""
    code = _run_script(name, out, options)
    partial = out.with_name(out.name + ".partial")

    assert code == 0
    assert not partial.exists()
    return out


def refused(capsys, name: str, out: Path, *options) -> str:
    """Return the one line that the script prints before it ends with 2; nothing is half-written."""
    paths_before = _list_paths(out)
    capsys.readouterr()

    code = _run_script(name, out, options)

    assert code == 2
    output = capsys.readouterr()
    assert output.out == "", output.err
    assert output.err.count("\n") == 1, output.err
    assert output.err.startswith(f"{name}.py: "), output.err
    paths_after = _list_paths(out)
    assert paths_after == paths_before
    partial = list(out.parent.glob(f"{out.name}*.partial"))
    assert not partial
    return output.err


def _list_paths(folder: Path) -> list[Path] | None:
    """List everything in the folder; None where there is no folder."""
    if not folder.exists():
        return None
    return sorted(folder.rglob("*"))


def rows(path: Path) -> list[dict]:
    """Read the lines of a file of JSON lines, compressed or not."""
    open_file = gzip.open if path.suffix == ".gz" else open
    with open_file(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def read(folder: Path, name: str) -> tuple[dict[str, dict], dict[str, dict[str, float]]]:
    """Read ({id: row}, qrels) of a split, both also by the product's strict readers."""
    path = folder / f"{name}.queries.jsonl"
    row_of = {row["id"]: row for row in rows(path)}
    queries, dropped = read_queries(path)
    qrels, repeats = read_qrels(folder / f"{name}.qrels.tsv")

    assert not dropped
    assert not repeats
    assert queries.keys() == row_of.keys()
    assert qrels.keys() == row_of.keys()
    return row_of, qrels


def corpus(folder: Path) -> dict[str, dict]:
    """Read {id: row} of the documents, also by the product's strict reader."""
    path = folder / "corpus.jsonl.gz"
    row_of = {row["id"]: row for row in rows(path)}
    ids = read_corpus(path)[0]

    assert ids == list(row_of)
    for row in row_of.values():
        assert "\n" not in row.get("title", "")
        assert "\n" not in row.get("text", "")
    return row_of


def counts(folder: Path) -> dict[str, int]:
    """Read the counts of prepared.json, and check those of the splits and the documents."""
    text = (folder / "prepared.json").read_text(encoding="utf-8")
    count_of = json.loads(text)["counts"]
    queries, _ = read(folder, "train")
    held_out = [query for query in queries if is_validation(query)]
    documents = corpus(folder)

    assert count_of["validation"] == len(held_out)
    assert count_of["train"] == len(queries) - len(held_out)
    assert count_of["documents"] == len(documents)
    return count_of


def write_csv(path: Path, header: list[str], lines: list[list]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(lines)
    return path


def write_json(path: Path, objects: list[dict]) -> Path:
    """Write an object a line."""
    lines = [json.dumps(each) + "\n" for each in objects]
    path.write_text("".join(lines), encoding="utf-8")
    return path
