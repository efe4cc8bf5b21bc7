"""End a preparation: checks, then a folder that is complete or absent.

A prepared data set: corpus.jsonl.gz, NAME.queries.jsonl and NAME.qrels.tsv for train and every test
setting, and prepared.json, written last. Validation is no file: it is the hash tenth of train
(readers.is_validation).
"""

import argparse
import gzip
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from checks import Key, PrepareError, Split, by_text, check_document, check_splits
from tqdm import tqdm

from recr1.data.readers import DataError, is_validation, read_qrels, read_queries
from recr1.utils.files import PARTIAL, fingerprint_file, remove_path, sync_to_disk

INDEX = "prepared.json"

MODELS = Path.home() / ".cache/recr1/models"


def write_data_set(
    folder: Path,
    corpus: Iterable[dict],
    splits: dict[str, Split],
    *,
    source: list[dict],
    options: dict,
    key: Key = by_text,
    counts: dict | None = None,
    also: Callable[[], list[str]] = list,
) -> dict:
    """Write one prepared data set into `folder` and return what prepared.json says.

    Args:
        corpus: may be a generator: only its ids are kept.
        splits: "train" and each test setting.
        key: what makes two examples the same (see checks).
        counts: further numbers for prepared.json.
        also: further checks, which return their names.

    Raises:
        PrepareError: a check has failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    docs = write_corpus(folder, corpus)
    passed = check_splits(docs, splits, key) + also()
    for name, split in splits.items():
        write_split(folder, name, split)

    train = splits["train"].rows
    num_validation = sum(is_validation(row["id"]) for row in train)
    all_counts = dict(
        documents=len(docs), train=len(train) - num_validation, validation=num_validation
    )
    for name, split in splits.items():
        if name != "train":
            all_counts[name] = len(split.rows)
    checks = [*passed, "reads back with recr1.data"]
    return write_index(folder, source, options, checks, all_counts | (counts or {}))


def write_index(
    folder: Path, source: list[dict], options: dict, checks: list[str], counts: dict
) -> dict:
    """Write prepared.json, the folder's last file, and return what it says."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            files[path.relative_to(folder).as_posix()] = fingerprint_file(path)
    about = dict(source=source, options=options, checks=checks, counts=counts, files=files)
    text = json.dumps(about, indent=1, ensure_ascii=False) + "\n"
    (folder / INDEX).write_text(text, encoding="utf-8")
    sync_to_disk(folder / INDEX)
    return about


def write_corpus(folder: Path, corpus: Iterable[dict]) -> set[str]:
    """Write corpus.jsonl.gz and return the documents' ids. Raises PrepareError for a bad one."""
    docs: set[str] = set()
    with (
        open(folder / "corpus.jsonl.gz", "wb") as raw,
        # no name, no time: the same bytes every time
        gzip.GzipFile("", "wb", 6, raw, mtime=0) as file,
    ):
        title = f"{folder.name}: documents"
        for row in tqdm(corpus, desc=title, unit=" docs", disable=None, leave=False):
            check_document(row, docs)
            line = json.dumps(row, ensure_ascii=False) + "\n"
            file.write(line.encode())
    return docs


def write_split(folder: Path, name: str, split: Split) -> None:
    """Write a split's queries and qrels. Raises PrepareError unless they read back as they were."""
    queries_path = folder / f"{name}.queries.jsonl"
    qrels_path = folder / f"{name}.qrels.tsv"
    with open(queries_path, "w", encoding="utf-8", newline="\n") as file:
        for row in split.rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    with open(qrels_path, "w", encoding="utf-8", newline="\n") as file:
        for row in split.rows:
            for doc, gain in split.targets[row["id"]]:
                file.write(f"{row['id']}\t{doc}\t{gain:g}\n")
    queries, dropped = read_queries(queries_path)
    qrels, repeats = read_qrels(qrels_path)
    if dropped or repeats or queries.keys() != qrels.keys():
        raise PrepareError(
            f"{name}: what was written does not read back as it was: {(dropped + repeats)[:1]}"
        )


def run_command_line(
    script: str,
    doc: str,
    prepare: Callable[[argparse.Namespace, Path], None],
    options: Callable[[argparse.ArgumentParser], None],
    argv: list[str] | None = None,
    *,
    describe_wanted: Callable[[argparse.Namespace], dict] | None = None,
    default_out: Path | None = None,
) -> int:
    """Run a script's main.

    It parses, calls prepare(args, folder) with an empty folder, and gives the folder the name --out
    when that returns.

    Args:
        describe_wanted: returns the sha256 of every source and the options of what these arguments
            ask for. A folder that says the same of itself, and whose files are whole, is kept as it
            is. Without it every run prepares anew.
        default_out: --out where none is given; without it --out is required.

    Returns 0; or 2 after one line on stderr for what a user can mend; or 130 when interrupted.
    Unless it returns 0, --out is as it was.
    """
    parser = _make_parser(script, doc, default_out)
    options(parser)
    args = parser.parse_args(argv)
    out = args.out.absolute()
    partial = out.with_name(out.name + PARTIAL)
    try:
        if out.exists() and not _is_prepared(out):
            raise PrepareError(
                f"{args.out}: exists, and no preparation wrote it; give a new folder with --out"
            )
        if describe_wanted is None or not _is_finished(out, describe_wanted(args)):
            replace_folder(out, partial, lambda: prepare(args, partial))
    except (DataError, OSError, KeyboardInterrupt) as e:
        if partial.is_dir():
            remove_path(partial)
        print(f"{parser.prog}: {_explain(e, args.out)}", file=sys.stderr)
        return 130 if isinstance(e, KeyboardInterrupt) else 2
    _print_counts(args.out)
    return 0


def _make_parser(script: str, doc: str, default_out: Path | None) -> argparse.ArgumentParser:
    """Return the script's parser, which knows --out."""
    parser = argparse.ArgumentParser(
        prog=Path(script).name,
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    text = "the prepared folder; one that an earlier preparation wrote is replaced"
    if default_out is not None:
        text += " (default: %(default)s)"
    parser.add_argument(
        "--out",
        type=Path,
        default=default_out,
        required=default_out is None,
        metavar="DIR",
        help=text,
    )
    return parser


def _explain(error: BaseException, out: Path) -> str:
    """Return in one line what ended the preparation."""
    if isinstance(error, KeyboardInterrupt):
        return "stopped; the same command starts again, downloads go on from where they are"
    if isinstance(error, OSError):
        place = error.filename or out
        return f"cannot read or write {place}: {error.strerror or error}"
    return str(error)


def _print_counts(out: Path) -> None:
    """Print the counts of every data set below the folder."""
    for path in sorted(out.absolute().rglob(INDEX)):
        counts = json.loads(path.read_text(encoding="utf-8"))["counts"]
        numbers = ", ".join(f"{value:,} {name}" for name, value in counts.items())
        print(f"{out / path.parent.relative_to(out.absolute())}: {numbers}")


def replace_folder(out: Path, partial: Path, fill: Callable[[], None]) -> None:
    """Fill the empty folder `partial` and give it the name `out` when that has worked.

    An earlier `out` is kept until then.
    """
    old = out.with_name(out.name + ".old" + PARTIAL)
    if old.exists() and not out.exists():  # killed between the two renames below
        old.rename(out)
    for leftover in (partial, old):
        if leftover.exists():
            remove_path(leftover)
    partial.mkdir(parents=True)
    fill()
    if out.exists():
        out.rename(old)
    partial.rename(out)
    sync_to_disk(out.parent)
    if old.exists():
        remove_path(old)


def _is_finished(folder: Path, wanted: dict) -> bool:
    """Return whether the folder is what is wanted, and each of its files is as it was written.

    wanted: {"sha256": of the sources, "options"}.
    """
    if not (folder / INDEX).is_file():
        return False
    try:
        about = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        hashes = [file["sha256"] for file in about["source"]]
        options = about["options"]
        files = about["files"]
    except (ValueError, KeyError, TypeError):
        return False
    if dict(sha256=hashes, options=options) != wanted:
        return False
    for name, fingerprint in files.items():
        path = folder / name
        if not path.is_file() or fingerprint_file(path) != fingerprint:
            return False
    return True


def _is_prepared(folder: Path) -> bool:
    """Return whether a preparation wrote the folder.

    It has prepared.json, or each folder in it has; an empty folder counts too.
    """
    if not folder.is_dir():
        return False
    if (folder / INDEX).exists():
        return True
    return all((below / INDEX).exists() for below in folder.iterdir())
