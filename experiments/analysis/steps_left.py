"""Print how many steps of GRPO fit between an SFT run and the wall time of a GRPO run.

python experiments/analysis/steps_left.py GRPO_RUN SFT_RUN
"""

import json
import sys
from pathlib import Path


def main() -> None:
    """Print the number of steps, at least 1."""
    grpo_run, sft_run = sys.argv[1:3]
    grpo = json.loads((Path(grpo_run) / "summary.json").read_text())
    sft = json.loads((Path(sft_run) / "summary.json").read_text())
    seconds_left = grpo["wall_s"] - sft["wall_s"]
    steps = round(seconds_left * grpo["steps"] / grpo["wall_s"])
    print(max(1, steps))


if __name__ == "__main__":
    main()
