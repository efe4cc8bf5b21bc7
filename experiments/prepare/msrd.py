"""The Movie Search Ranking Dataset (bundled: 9,750 films, 14,670 queries with crowd labels) -> DIR,
as it is, after the checks.
"""

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from bundled import read_bundled
from writing import command, write

BUNDLED = Path(__file__).resolve().parents[1] / "data/msrd"


def prepare(args: Namespace, out: Path) -> None:
    corpus, splits, source = read_bundled(args.source)
    write(out, corpus, splits, source=source, options={})


def options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        default=BUNDLED,
        metavar="FOLDER",
        help="a copy of experiments/data/msrd (default: that one)",
    )


def main(argv: list[str] | None = None) -> int:
    return command(__file__, __doc__, prepare, options, argv)


if __name__ == "__main__":
    sys.exit(main())
