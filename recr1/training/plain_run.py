"""What is around the algorithm in recr1/plain.py: its prompts, its scores and its files.

The folder that it leaves is that of recr1.train but for checkpoints, validation and the report, so
`recr1 explain` and `recr1 report` read it.

Legend: P prompts, G siblings of a group, R = P * G rollouts, T = sampling.max_new_tokens.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recr1.config import loader as configs
from recr1.config.schema import Config, ConfigError
from recr1.data.chat_template import ChatTemplate
from recr1.data.prompt_order import choose_prompts, shuffle_prompt
from recr1.data_types import Prompt, Reward, Rollout
from recr1.distributed import collectives as dist
from recr1.distributed.printing import print_rank0
from recr1.evaluation import evaluate
from recr1.model.hf_config import read_config
from recr1.tasks.prompts import load_prompts
from recr1.tasks.registry import build_task
from recr1.tasks.scorer import Scorer
from recr1.tracking.console import format_console_line, show_step
from recr1.tracking.run_log import RunLog
from recr1.tracking.step_metrics import StepRecord
from recr1.tracking.trackers import Tracker
from recr1.tracking.versions import record_versions
from recr1.training import setup, summary
from recr1.training.checks import check_lengths
from recr1.training.run_dir import RunError, claim_run_dir
from recr1.utils.counter_rng import draw_uniforms
from recr1.utils.files import report_write_errors, write_text
from recr1.utils.hf_hub import load_tokenizer, read_stop_token_ids, resolve_model_folder

# What plain.py computes. All other values of these settings change the result, or ask for what it
# does not do.
KNOWN_VALUES: dict[str, tuple] = {
    "loss.advantage": ("", "mean_std", "mean"),
    "loss.agg_mode": ("", "token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"),
    "loss.kl_estimator": ("k3",),
    "loss.kl_in": ("loss",),
    "loss.entropy_coef": (0,),
    "loss.tis_cap": (0,),
    "loss.off_policy_mask_threshold": (0,),
    "sampling.top_p": (1,),
    "sampling.dynamic_sampling": (0,),
    "model.compute": ("auto", "float32"),
    "optimizer.kind": ("adamw",),
    "optimizer.on_nonfinite": ("stop",),
    "train.frozen": ("",),
    "lora.rank": (0,),
    "train.replay": ("",),
}

FAST = "python -m recr1.train has it"


@dataclass(kw_only=True)
class PlainRun:
    """A run of plain.py, in one process: what is asked, what answers are worth, what is written."""

    cfg: Config
    model_folder: str
    tokenizer: Any  # transformers'
    num_ids: int  # that the tokenizer knows; a model may have more
    stops: frozenset[int]  # ids that end a completion
    chat: ChatTemplate
    train_prompts: list[Prompt]
    test_prompts: list[Prompt]
    train_scorer: Scorer
    test_scorer: Scorer
    log: RunLog
    tracker: Tracker

    # --- A step ----------------------------------------------------------------------------------

    def draw_prompts(self, step: int) -> list[Prompt]:
        """Draw the P prompts of a step, some with shuffled words (data.shuffle_words).

        A function of (seed, step).
        """
        cfg = self.cfg
        seed = cfg.run.seed
        share = cfg.data.shuffle_words
        encode = self.chat.prompt
        order = choose_prompts(len(self.train_prompts), cfg.train.prompts_per_step, seed, step - 1)
        prompts = [self.train_prompts[index] for index in order]
        return [shuffle_prompt(prompt, share, seed, step, encode) for prompt in prompts]

    def draw_uniforms(self, step: int, prompts: list[Prompt]) -> torch.Tensor:
        """Draw random numbers (R, max_new_tokens) in (0, 1), float64.

        Each is a function of (seed, step, prompt, sibling, token): there is no generator's state.
        """
        sampling = self.cfg.sampling
        uniforms = draw_uniforms(
            self.cfg.run.seed,
            step,
            np.array([prompt.index for prompt in prompts]),
            sampling.group_size,
            sampling.max_new_tokens,
        )
        return torch.from_numpy(uniforms.reshape(-1, sampling.max_new_tokens))

    def score(self, rollouts: list[Rollout]) -> list[Reward]:
        """Search with each completion's answer, and measure what is found."""
        return self.train_scorer.score(rollouts)

    def compute_lr(self, step: int, update: int) -> float:
        """Compute the learning rate of an update of a step; updates count from 0.

        It grows over optimizer.warmup_steps, then falls linearly to min_lr_ratio of itself.
        """
        optimizer = self.cfg.optimizer
        updates_per_step = self.cfg.train.num_mini_batches
        number = (step - 1) * updates_per_step + update
        if number < optimizer.warmup_steps:
            return optimizer.lr * (number + 1) / optimizer.warmup_steps
        decay_steps = self.cfg.train.steps * updates_per_step - optimizer.warmup_steps
        progress = (number - optimizer.warmup_steps) / max(1, decay_steps)
        return optimizer.lr * (1 - (1 - optimizer.min_lr_ratio) * progress)

    def finish_step(
        self,
        *,
        step: int,
        rollouts: list[Rollout],
        rewards: list[Reward],
        advantages: torch.Tensor,
        old_logp: torch.Tensor,
        ref_logp: torch.Tensor,
        entropy: torch.Tensor,
        updates: list[tuple[torch.Tensor, torch.Tensor]],
        grad_norm: torch.Tensor,
        lr: float,
    ) -> None:
        """Write the step's rollouts and its row of metrics.jsonl, and print a line.

        Args:
            advantages: (R,); old_logp, ref_logp, entropy: (R, T), before the first update.
            updates: the loss and the log-probs, with gradient, of each update; they share the rows.
            grad_norm, lr: of the last update.
        """
        cfg = self.cfg
        values = dict(
            trainer_logp=old_logp,
            old_logp=old_logp,
            ref_logp=ref_logp if cfg.loss.kl_coef > 0 else None,
            entropy=entropy,
        )
        record = _make_record(rollouts, rewards, advantages, values)
        record.stats.append(_sum_stats(record, advantages, values, updates, cfg))
        if step != 1 and step % cfg.log.tokens_every:
            record.token_values = None

        self.log.seconds["step"] = sum(self.log.seconds.values())
        row = record.write_and_summarize(
            step, self.log, cfg, grad_norm=float(grad_norm), lr=lr, skipped_steps=0
        )
        self.log.write_metrics(row)
        self.tracker.send(row)
        if step % cfg.log.print_every == 0 or step in (1, cfg.train.steps):
            print_rank0(format_console_line(row, cfg.train.steps))
        show_step(step, record, cfg)

    # --- Before and after training ---------------------------------------------------------------

    def evaluate_test(self, name: str, rollouts: list[Rollout]) -> list[dict]:
        """Score the test split's completions beside the raw answers, and write the file `name`."""
        prompts = self.test_prompts
        scorer = self.test_scorer
        raw_answers = [scorer.task.baseline_answer(prompt.row) for prompt in prompts]
        raw_terms = scorer.score_answers(prompts, raw_answers)
        rows = []
        for of_prompt in zip(prompts, raw_answers, raw_terms, scorer.score(rollouts)):
            rows.append(evaluate.make_row(*of_prompt))
        self.log.write_rows(name, rows)
        return rows

    def write_results(self, policy: Any, before: list[dict], after: list[dict]) -> None:
        """Write the model and summary.json; print the table that a user reads."""
        cfg = self.cfg
        model_folder = self.log.folder / "model"
        with report_write_errors(model_folder):
            policy.save_pretrained(model_folder)
            self.tokenizer.save_pretrained(model_folder)
        write_text(model_folder / "recr1.yaml", configs.dump_answering_config(cfg))

        results = summary.compare_test_results(before, after)
        figures = summary.summarize_test_results(cfg, results)
        self.log.write_json(
            "summary.json",
            dict(
                task=cfg.task,
                **figures,
                seed=cfg.run.seed,
                steps=cfg.train.steps,
                **self.log.summarize_sampling(),
            ),
        )
        print_rank0(
            summary.format_results(cfg, "train", results, self.log.folder, has_checkpoints=False)
        )
        self.tracker.close()


# --- From a config to a run -----------------------------------------------------------------------


def setup_plain_run(cfg: Config, known_kinds: tuple[str, ...]) -> PlainRun:
    """Read, build and check all that the run needs, and open its folder.

    Args:
        known_kinds: the values of loss.kind that plain.py computes. Raises ConfigError for what it
            does not.
    """
    _refuse_unknown_values(cfg, {"loss.kind": known_kinds} | KNOWN_VALUES)
    torch.set_num_threads(cfg.run.threads or os.cpu_count() or 1)
    folder = Path(cfg.run.dir)
    if claim_run_dir(folder, cfg):
        raise RunError(
            f"run.dir: {folder} holds a run that was stopped, and recr1.plain starts anew; "
            "name a new folder, or move it away"
        )

    # What is asked.
    model_folder = resolve_model_folder(cfg.model.path)
    check_lengths(cfg, read_config(model_folder).max_position_embeddings)
    tokenizer = load_tokenizer(model_folder)
    stops = read_stop_token_ids(model_folder, tokenizer)
    task = build_task(cfg)
    chat = setup.build_chat_template(cfg, tokenizer, task)
    splits = load_prompts(cfg, chat, task)

    # What an answer is worth.
    terms_of_splits = setup.build_reward_terms(cfg)  # of training, of the test
    make_retriever = setup.choose_retriever(cfg, task)
    tracker = setup.open_run_dir(cfg, folder)
    record_versions(folder)
    retriever = setup.open_retriever(cfg, folder, make_retriever)
    train_scorer, test_scorer = [
        Scorer(
            task,
            retriever,
            splits.qrels,
            terms,
            partial(tokenizer.decode, clean_up_tokenization_spaces=False),
            stops,
            cfg.sampling.max_new_tokens,
            chat.thought_closed,
        )
        for terms in terms_of_splits
    ]
    return PlainRun(
        cfg=cfg,
        model_folder=model_folder,
        tokenizer=tokenizer,
        num_ids=len(tokenizer),
        stops=stops,
        chat=chat,
        train_prompts=splits.train,
        test_prompts=splits.test,
        train_scorer=train_scorer,
        test_scorer=test_scorer,
        log=RunLog(folder),
        tracker=tracker,
    )


def _refuse_unknown_values(cfg: Config, known_values: dict[str, tuple]) -> None:
    """Raise ConfigError for a setting that would change the result and is not in plain.py."""
    configs.check_settings_used(cfg, "train")
    if dist.world_size() > 1:
        raise ConfigError(f"recr1.plain is one process, this is one of {dist.world_size()}; {FAST}")
    for key, known in known_values.items():
        value = configs.get_value(cfg, key)
        if value not in known:
            options = ", ".join(repr(option) for option in known)
            raise ConfigError(f"{key}: recr1.plain knows {options}, not {value!r}; {FAST}")


# --- From padded tensors to the record of a step --------------------------------------------------


def _make_record(
    rollouts: list[Rollout],
    rewards: list[Reward],
    advantages: torch.Tensor,
    values: dict[str, torch.Tensor | None],
) -> StepRecord:
    """Make a step's record with its per-token values, (R, T) each.

    Identical siblings are one entry with their number, as recr1.train logs them.
    """
    first_index: dict[tuple, int] = {}
    counts: Counter[tuple] = Counter()
    for index, rollout in enumerate(rollouts):
        text = (rollout.group, rollout.ids)
        first_index.setdefault(text, index)
        counts[text] += 1

    unique = []
    token_values = []
    for text, index in first_index.items():
        unique.append(replace(rollouts[index], count=counts[text]))
        num_tokens = len(rollouts[index].ids)
        of_rollout = {}
        for name, tensor in values.items():
            of_rollout[name] = None if tensor is None else tensor[index, :num_tokens].tolist()
        token_values.append(of_rollout)

    return StepRecord(
        rollouts=rollouts,
        rewards=rewards,
        advantages=advantages.tolist(),
        unique=unique,
        first_index=list(first_index.values()),
        num_sampled_groups=rollouts[-1].group + 1,
        token_values=token_values,
    )


def _sum_stats(
    record: StepRecord,
    advantages: torch.Tensor,
    values: dict[str, torch.Tensor | None],
    updates: list[tuple[torch.Tensor, torch.Tensor]],
    cfg: Config,
) -> dict[str, float]:
    """Sum over the step's tokens what is logged of them, and count the log-prob gap."""
    old_logp = values["old_logp"]
    entropy = values["entropy"]
    ref_logp = values["ref_logp"]
    assert old_logp is not None and entropy is not None
    logp = torch.cat([logp.detach() for _, logp in updates])  # (R, T)
    grads = []
    for _, of_update in updates:
        if of_update.grad is None:  # nothing was learned
            grads.append(torch.zeros_like(of_update))
        else:
            grads.append(of_update.grad)
    grad_logp = torch.cat(grads)

    mask = torch.zeros_like(logp)
    sampler_logp = torch.zeros_like(logp)
    for row, rollout in enumerate(record.rollouts):
        mask[row, : len(rollout.ids)] = 1
        sampler_logp[row, : len(rollout.ids)] = torch.tensor(rollout.sampler_logp)
    record.logp_diffs.add((old_logp - sampler_logp)[mask > 0].abs().numpy())

    # Identical siblings are one text with the sum of their gradients.
    counts = torch.tensor([rollout.count for rollout in record.unique])
    grad_of_text = grad_logp[record.first_index] * counts[:, None]

    A = advantages[:, None]
    ratio = (logp - old_logp).exp()
    is_above = (A > 0) & (ratio > 1 + cfg.loss.upper_clip_ratio)
    is_below = (A < 0) & (ratio < 1 - cfg.loss.clip_ratio_low)
    is_clipped = is_above | is_below
    sums = dict(
        clip_ratio=(mask * is_clipped).sum(),
        grad_logp_square=grad_of_text.square().sum(),
        ratio_abs_deviation=(mask * (ratio - 1).abs()).sum(),
        importance_sampling_ratio=(mask * (old_logp - sampler_logp).exp()).sum(),
        entropy=(mask * entropy).sum(),
        trained=mask.sum(),
    )
    if ref_logp is not None:
        log_ratio = ref_logp - logp
        sums["kl"] = (mask * (log_ratio.expm1() - log_ratio)).sum()
    loss = sum(loss.item() for loss, _ in updates)
    return dict(loss=loss) | {name: value.item() for name, value in sums.items()}
