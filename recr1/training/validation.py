"""When the policy is evaluated, and what is kept of it: the validation split during training, the
test split before and after it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from recr1.config.schema import Config
from recr1.data_types import Prompt
from recr1.distributed import collectives as dist, heartbeat
from recr1.distributed.fsdp import Sharded
from recr1.evaluation import evaluate
from recr1.tasks.scorer import Scorer
from recr1.tracking.run_log import RunLog
from recr1.training.checks import compute_kv_cache_budget

EVAL_BEFORE = "eval_before.jsonl"
EVAL_AFTER = "eval_after.jsonl"


@dataclass
class Evaluator:
    """Greedy passes of the policy over held-out prompts; collectives, rank 0 gets the rows."""

    cfg: Config
    policy: Sharded
    validation: list[Prompt]
    test: list[Prompt]
    scorer: Scorer
    log: RunLog
    prompts_at_once: int  # decoded together
    slot_bytes: int  # of one token in the sampler's cache
    is_resumed: bool  # an earlier start of this run may have left its evaluation

    def evaluate(self, prompts: list[Prompt]) -> list[dict]:
        """Evaluate the policy greedily on `prompts`: see evaluation/evaluate.py."""
        heartbeat.enter_phase("eval")
        with self.log.track_peak("evaluate"):
            return evaluate.evaluate_prompts(
                self.policy,
                prompts,
                self.scorer,
                self.cfg.sampling.max_new_tokens,
                self.prompts_at_once,
                self.cfg.model.kernels,
                compute_kv_cache_budget(self.cfg, self.slot_bytes),
            )

    def evaluate_test(self, name: str) -> list[dict]:
        """Evaluate the test split and write the rows to the file `name`.

        Before and after training only: it never chooses anything. A run that goes on reads the
        evaluation before training from the file that its earlier start has written.
        """
        earlier = None
        if dist.rank() == 0 and name == EVAL_BEFORE and self.is_resumed:
            earlier = self._read_earlier_evaluation(self.log.folder / name)
        if dist.broadcast_from_rank0(earlier is not None):
            return earlier or []

        rows = self.evaluate(self.test)
        with dist.fail_together():
            self.log.write_rows(name, rows)
        return rows

    def _read_earlier_evaluation(self, path: Path) -> list[dict] | None:
        """Read the rows that an earlier start has written; None unless they are complete."""
        try:
            lines = path.read_bytes().split(b"\n")
            rows = [json.loads(line) for line in lines[:-1]]
            query_ids = [row["id"] for row in rows]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return rows if query_ids == [prompt.id for prompt in self.test] else None

    def validate(self, step: int) -> dict[str, float | list[float]]:
        """Evaluate the validation split at every train.eval_every-th step.

        Returns reward.metric, its mean for the raw answer, and the gain of the policy over the raw
        answer with its 95% interval. Empty on the other ranks, and at all other steps.
        """
        every = self.cfg.train.eval_every
        if not every or step % every:
            return {}

        rows = self.evaluate(self.validation[: self.cfg.train.eval_queries or None])
        if not rows:
            return {}  # rank 0 has them

        metric = self.cfg.reward.metric
        scores = evaluate.get_column(rows, metric)
        raw_scores = evaluate.get_column(rows, f"{metric}_raw")
        gain, gain_ci = evaluate.compute_mean_ci(scores - raw_scores)
        return {
            f"val_{metric}": float(scores.mean()),
            "val_raw": float(raw_scores.mean()),
            "val_gain": gain,
            "val_gain_ci95": gain_ci,
            "val_format_errors": sum(row["error"] is not None for row in rows),
        }
