"""Send hostile completions through the answer parser; print the slowest one, and any that raised.

python experiments/benchmarks/parser_fuzz.py

The strings are those of tests/helpers/fuzz_answers.py. The last line is JSON; the exit status is 1
when a bar is missed.
"""

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path

from recr1.tasks.answer_parser import parse_query

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from helpers.fuzz_answers import completions  # noqa: E402

BAR_MS = 50


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> int:
    """Parse the strings and print the bars."""
    args = parse_arguments()
    slowest = 0.0
    size = 0
    raised = 0
    outcomes = Counter()
    for text in completions(args.n, args.seed):
        start = time.perf_counter()
        try:
            _, outcome = parse_query(text)
        except Exception as error:  # the point of the fuzz: count it, show it, go on
            raised += 1
            outcome = repr(error)[:80]
        ms = 1000 * (time.perf_counter() - start)
        outcomes[outcome or "parsed"] += 1
        if ms > slowest:
            slowest = ms
            size = len(text)

    for outcome, count in outcomes.most_common():
        print(f"{count:6d} {outcome}")
    print(
        f"slowest of {args.n}: {slowest:.2f} ms, for {size} characters (wall clock, one run each)"
    )
    value = round(slowest, 3)
    bars = [
        dict(name="parser_max_ms", value=value, bar=BAR_MS, ok=slowest < BAR_MS),
        dict(name="parser_raised", value=raised, bar=0, ok=raised == 0),
    ]
    print(json.dumps({"bars": bars}))
    return 0 if all(bar["ok"] for bar in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
