"""What a run shows of itself on the console beside its line per step: three rollouts, and after the
first step a word about the loss.
"""

from __future__ import annotations

import json
import shutil

from recr1.config.schema import Config
from recr1.distributed.printing import print_rank0
from recr1.rl.losses import clipped_surrogate, resolve_objective, sequence_clipped_surrogate
from recr1.tracking.step_metrics import StepRecord
from recr1.utils.terminal import fit_to_width, make_printable, measure_columns


def format_console_line(row: dict, steps: int) -> str:
    val = f"  val gain {row['val_gain']:+.4f}" if "val_gain" in row else ""
    if "reward" not in row:  # SFT's
        return (
            f"step {row['step']:>5}/{steps}  loss {row['loss']:.4f}  epoch {row['epoch']:.2f}  grad {row['grad_norm']:.3f}  "
            f"{row['tokens_per_s']:,.0f} tok/s{val}"
        )
    kl = f"{row['kl']:.4f}" if row["kl"] is not None else "off"
    speed = f"{row['rollout_tokens_per_s']:,.0f} tok/s" if row["rollout_tokens_per_s"] else "replay"
    return (
        f"step {row['step']:>5}/{steps}  reward {row['reward']:.4f}  spread {row['reward_spread']:.4f}  zero-var {row['zero_variance']:.2f}  "
        f"kl {kl}  grad {row['grad_norm']:.3f}  gap {row['logprob_gap_mean']:.1e}  {speed}  wait {row['reward_wait']:.0%}{val}"
    )


NEAR_ZERO = """recr1: a GRPO loss near 0 is no fault. The advantages of a group sum to 0 and before the first update every ratio is 1, so the loss starts near 0
and stays there, whatever there is to learn; its gradient does not. Look at `reward` and `val gain`: nothing is learned only where `zero-var` is 1,
and then `grad` is 0 too. What each name in a line means: recr1/tracking/README.md."""


def show_step(step: int, done: StepRecord, cfg: Config) -> None:
    """Every log.show_every steps and after the first one three rollouts; then, too, why a loss of
    the clipped kind says nothing. Rank 0, all ranks' step.
    """
    every = cfg.log.show_every
    if every and (step == 1 or step % every == 0):
        print_rank0(format_rollout_table(done, shutil.get_terminal_size((120, 24)).columns - 1))
    if step == 1 and resolve_objective(cfg.loss, cfg.model).surrogate in (
        clipped_surrogate,
        sequence_clipped_surrogate,
    ):
        print_rank0(NEAR_ZERO)


def format_rollout_table(done: StepRecord, width: int) -> str:
    """Three of a step's distinct texts, those of the highest, the middle and the lowest advantage,
    in lines of at most `width` columns (46 or more).
    """
    order = sorted(done.first, key=lambda i: -done.adv[i])
    rows = [("query", "answer", " reward", "  advantage")]
    for i in (order[at] for at in sorted({0, len(order) // 2, len(order) - 1})):
        reward = done.rewards[i]
        answer = (
            f"({reward.error}) {reward.text}"
            if reward.error
            else reward.answer
            if isinstance(reward.answer, str)
            else json.dumps(reward.answer)
        )
        rows.append(
            (done.rollouts[i].prompt.text, answer, f"{reward.total:7.3f}", f"{done.adv[i]:+11.3f}")
        )
    room = max(22, width - len("  ") * 3 - 7 - 11)  # of query and answer together
    # what they would take
    query, answer = (
        max(sum(measure_columns(make_printable(row[i]))) for row in rows) for i in (0, 1)
    )
    query = min(query, max(room // 2, room - answer))
    return "\n".join(
        f"  {fit_to_width(q, query)}  {fit_to_width(r, min(answer, room - query))}  {reward}{adv}"
        for q, r, reward, adv in rows
    )
