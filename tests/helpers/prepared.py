"""Runs the scripts of experiments/prepare in this process, on files of upstream's formats that
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
    return importlib.import_module(name)


def prepare(name: str, out: Path, *options) -> Path:
    """The prepared folder; the script must succeed and leave nothing beside it."""
    assert script(name).main(["--out", str(out), *map(str, options)]) == 0
    assert not out.with_name(out.name + ".partial").exists()
    return out


def refused(capsys, name: str, out: Path, *options) -> str:
    """The one line that the script prints before it ends with 2; nothing is half-written."""
    before = sorted(out.rglob("*")) if out.exists() else None
    capsys.readouterr()
    assert script(name).main(["--out", str(out), *map(str, options)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and said.err.startswith(f"{name}.py: "), (
        said.err
    )
    assert (sorted(out.rglob("*")) if out.exists() else None) == before
    assert not list(out.parent.glob(f"{out.name}*.partial"))
    return said.err


def rows(path: Path) -> list[dict]:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def read(folder: Path, name: str) -> tuple[dict[str, dict], dict[str, dict[str, float]]]:
    """({id: row}, qrels) of a split, both also read by the product's strict readers."""
    found = {row["id"]: row for row in rows(folder / f"{name}.queries.jsonl")}
    queries, dropped = read_queries(folder / f"{name}.queries.jsonl")
    qrels, repeats = read_qrels(folder / f"{name}.qrels.tsv")
    assert not dropped
    assert not repeats
    assert queries.keys() == found.keys() == qrels.keys()
    return found, qrels


def corpus(folder: Path) -> dict[str, dict]:
    found = {row["id"]: row for row in rows(folder / "corpus.jsonl.gz")}
    assert read_corpus(folder / "corpus.jsonl.gz")[0] == list(found)
    assert not any("\n" in row.get(key, "") for row in found.values() for key in ("title", "text"))
    return found


def counts(folder: Path) -> dict[str, int]:
    """The counts of prepared.json, after a look at whether those of the splits are true."""
    said = json.loads((folder / "prepared.json").read_text(encoding="utf-8"))["counts"]
    ids = list(read(folder, "train")[0])
    assert said["validation"] == sum(map(is_validation, ids))
    assert said["train"] == len(ids) - said["validation"]
    assert said["documents"] == len(corpus(folder))
    return said


def write_csv(path: Path, header: list[str], lines: list[list]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *lines])
    return path


def write_json(path: Path, objects: list[dict]) -> Path:
    path.write_text("".join(json.dumps(o) + "\n" for o in objects), encoding="utf-8")
    return path
