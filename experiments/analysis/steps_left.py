"""Print how many steps of GRPO fit between an SFT run and the wall time of a GRPO run.

python experiments/analysis/steps_left.py GRPO_RUN SFT_RUN
"""

import json
import sys
from pathlib import Path


def main() -> None:
    """Print the number of steps, at least 1."""
    grpo_run, sft_run = sys.argv[1:3]
    grpo = read_summary(grpo_run)
    sft = read_summary(sft_run)
    seconds_left = grpo["wall_s"] - sft["wall_s"]
    steps = round(seconds_left * grpo["steps"] / grpo["wall_s"])
    print(max(1, steps))


def read_summary(run: str) -> dict:
    """Read the summary.json of a run's folder."""
    path = Path(run, "summary.json")
    return json.loads(path.read_text())


if __name__ == "__main__":
    main()
