"""What a run shows of itself on the console beside its line per step: three rollouts, and after the
first step a word about the loss.
"""

import json
import shutil

from .config import Config
from .grpo import clipped, objective, sequence_clipped
from .log import Step, say
from .terminal import columns, fit, plain

NEAR_ZERO = """recr1: a GRPO loss near 0 is no fault. The advantages of a group sum to 0 and before the first update every ratio is 1, so the loss starts near 0
and stays there, whatever there is to learn; its gradient does not. Look at `reward` and `val gain`: nothing is learned only where `zero-var` is 1,
and then `grad` is 0 too. What each name in a line means stands in the README, under "What a run leaves behind"."""


def show(step: int, done: Step, cfg: Config) -> None:
    """Every log.show_every steps and after the first one three rollouts; then, too, why a loss of
    the clipped kind says nothing. Rank 0, all ranks' step.
    """
    every = cfg.log.show_every
    if every and (step == 1 or step % every == 0):
        say(rollout_table(done, shutil.get_terminal_size((120, 24)).columns - 1))
    if step == 1 and objective(cfg.loss, cfg.model).gain in (clipped, sequence_clipped):
        say(NEAR_ZERO)


def rollout_table(done: Step, width: int) -> str:
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
    query, answer = (max(sum(columns(plain(row[i]))) for row in rows) for i in (0, 1))
    query = min(query, max(room // 2, room - answer))
    return "\n".join(
        f"  {fit(q, query)}  {fit(r, min(answer, room - query))}  {reward}{adv}"
        for q, r, reward, adv in rows
    )
