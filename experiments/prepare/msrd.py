"""Prepare the Movie Search Ranking Dataset as it is, after the checks.

It is bundled: 9,750 films, 14,670 queries with crowd labels -> DIR.
"""

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from bundled import BUNDLED_MSRD, read_bundled
from writing import run_command_line, write_data_set


def prepare(args: Namespace, out: Path) -> None:
    """Write the data set into `folder`."""
    corpus, splits, source = read_bundled(args.source)
    write_data_set(out, corpus, splits, source=source, options={})


def add_options(parser: ArgumentParser) -> None:
    """Add the script's own options."""
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        default=BUNDLED_MSRD,
        metavar="FOLDER",
        help="a copy of experiments/data/msrd (default: that one)",
    )


def main(argv: list[str] | None = None) -> int:
    """Run the script; return its exit code."""
    return run_command_line(__file__, __doc__, prepare, add_options, argv)


if __name__ == "__main__":
    sys.exit(main())
