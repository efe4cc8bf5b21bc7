"""What a run shows on the console: a line per step, three rollouts now and then, and after the
first step a word about the loss.
"""

from __future__ import annotations

import json
import shutil
from typing import NamedTuple

from recr1.config.schema import Config
from recr1.data_types import Reward
from recr1.distributed.printing import print_rank0
from recr1.rl.advantages import reward_best_of_k
from recr1.rl.losses import (
    clipped_surrogate,
    geometric_surrogate,
    kl_masked_surrogate,
    resolve_objective,
    sequence_clipped_surrogate,
    tv_masked_surrogate,
)
from recr1.tracking.step_metrics import StepRecord
from recr1.utils.terminal import fit_to_width, make_printable, measure_columns

RATIO_SURROGATES = (
    clipped_surrogate,
    sequence_clipped_surrogate,
    geometric_surrogate,
    tv_masked_surrogate,
    kl_masked_surrogate,
)

NEAR_ZERO = (
    "recr1: a GRPO loss near 0 is no fault. The advantages of a group sum to 0 and before the first"
    " update every ratio is 1, so the loss starts near 0\n"
    "and stays there, whatever there is to learn; its gradient does not. Look at `reward` and"
    " `val gain`: nothing is learned only where `zero-std` is 1,\n"
    "and then `grad` is 0 too. What each name in a line means: recr1/tracking/README.md."
)


def format_console_line(row: dict, num_steps: int) -> str:
    """Format a step's row of metrics.jsonl, GRPO's or SFT's, as one line."""
    step = f"step {row['step']:>5}/{num_steps}"
    val_gain = f"  val gain {row['val_gain']:+.4f}" if "val_gain" in row else ""
    if "reward" not in row:  # SFT's
        return (
            f"{step}  loss {row['loss']:.4f}  epoch {row['epoch']:.2f}  "
            f"grad {row['grad_norm']:.3f}  {row['tokens_per_s']:,.0f} tok/s{val_gain}"
        )

    kl = "off"
    if row["kl"] is not None:
        kl = f"{row['kl']:.4f}"
    speed = "replay"
    if row["rollout_tokens_per_s"]:
        speed = f"{row['rollout_tokens_per_s']:,.0f} tok/s"
    return (
        f"{step}  reward {row['reward']:.4f}  std {row['reward_std']:.4f}  "
        f"zero-std {row['frac_reward_zero_std']:.2f}  kl {kl}  grad {row['grad_norm']:.3f}  "
        f"logp-diff {row['sampling_logp_diff_mean']:.1e}  {speed}  "
        f"wait {row['reward_wait_frac']:.0%}{val_gain}"
    )


def show_step(step: int, record: StepRecord, cfg: Config) -> None:
    """Print three rollouts every log.show_every steps and after the first one.

    After the first step it says, too, why a loss of the clipped kind says nothing. Rank 0, with the
    record of all ranks.
    """
    every = cfg.log.show_every
    if every and (step == 1 or step % every == 0):
        width = shutil.get_terminal_size((120, 24)).columns - 1
        print_rank0(format_rollout_table(record, width))

    if step == 1:
        objective = resolve_objective(cfg.loss, cfg.model)
        is_ratio = objective.surrogate in RATIO_SURROGATES  # is A at a ratio of 1
        if is_ratio and objective.advantage is not reward_best_of_k:
            print_rank0(NEAR_ZERO)


class _TableRow(NamedTuple):
    query: str
    answer: str
    reward: str  # 7 columns
    advantage: str  # 11 columns


NUMBER_COLUMNS = 7 + 11
MIN_TEXT_COLUMNS = 22


def format_rollout_table(record: StepRecord, width: int) -> str:
    """Format three of a step's unique rollouts as a table of at most `width` columns (46 or more).

    They are those of the highest, the middle and the lowest advantage.
    """
    table = [_TableRow("query", "answer", " reward", "  advantage")]
    for index in _pick_three(record):
        reward = record.rewards[index]
        table.append(
            _TableRow(
                query=record.rollouts[index].prompt.text,
                answer=_format_answer(reward),
                reward=f"{reward.total:7.3f}",
                advantage=f"{record.advantages[index]:+11.3f}",
            )
        )

    # Query and answer share what the numbers leave: half each, or what the other does not need.
    text_width = max(MIN_TEXT_COLUMNS, width - len("  ") * 3 - NUMBER_COLUMNS)
    query_width = max(_measure_text(row.query) for row in table)
    answer_width = max(_measure_text(row.answer) for row in table)
    query_width = min(query_width, max(text_width // 2, text_width - answer_width))
    answer_width = min(answer_width, text_width - query_width)

    lines = []
    for row in table:
        query = fit_to_width(row.query, query_width)
        answer = fit_to_width(row.answer, answer_width)
        lines.append(f"  {query}  {answer}  {row.reward}{row.advantage}")
    return "\n".join(lines)


def _pick_three(record: StepRecord) -> list[int]:
    """Return the indices of the highest, the middle and the lowest advantage; fewer of fewer."""
    by_advantage = sorted(record.first_index, key=lambda index: -record.advantages[index])
    last = len(by_advantage) - 1
    places = sorted({0, len(by_advantage) // 2, last})
    return [by_advantage[place] for place in places]


def _format_answer(reward: Reward) -> str:
    if reward.error:
        return f"({reward.error}) {reward.text}"
    if isinstance(reward.answer, str):
        return reward.answer
    return json.dumps(reward.answer)  # a list


def _measure_text(text: str) -> int:
    """Return how many columns of a terminal the text takes."""
    return sum(measure_columns(make_printable(text)))
