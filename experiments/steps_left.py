"""Steps of GRPO that fit between an SFT run and the wall time of a GRPO run: python
experiments/steps_left.py GRPO_RUN SFT_RUN
"""

import json
import sys
from pathlib import Path

grpo, sft = (json.loads((Path(run) / "summary.json").read_text()) for run in sys.argv[1:3])
print(max(1, round((grpo["wall_s"] - sft["wall_s"]) * grpo["steps"] / grpo["wall_s"])))
