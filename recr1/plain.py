"""GRPO in one plain file: python -m recr1.plain CONFIG.yaml [a.b=value ...]

A language model rewrites search queries. A fixed retriever runs them, and the NDCG of what it finds
is the reward (Rec-R1, arXiv 2503.24289). The model learns by algorithm 1 of DeepSeekMath (arXiv
2402.03300), whose lines `train` names. Nothing here is fast: the model is transformers', each new
token costs a pass over the whole text, and the loss stands on padded tensors with a mask.

python -m recr1.train gives the same weights from the same config in a fraction of the time and the
memory: tests/runs/test_plain.py holds the two against each other. What is around the algorithm
(config, data, retriever, reward, files) is training/plain_run.py. A setting of speed or memory does
nothing here; one that would change the result, and that this file lacks, is refused.

Legend: P prompts of a step, G completions of each, R = P * G of them, those of a prompt (siblings)
adjacent; L tokens of the longest prompt, T of the longest completion, V ids of the tokenizer.
"""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from recr1.config.schema import Config
from recr1.data_types import Prompt, Reward, Rollout
from recr1.training.launch import launch_loop, run_command
from recr1.training.plain_run import PlainRun, setup_plain_run

# loss.kind -> what loss.advantage and loss.average are where the config leaves them empty
DEFAULTS = {
    "grpo": ("mean_std", "token"),  # the average of the paper itself is "sequence"
    "dr_grpo": ("mean", "constant"),  # arXiv 2503.20783
    "dapo": ("mean_std", "token"),  # arXiv 2503.14476
}


def main(argv: list[str]) -> None:
    """Run the command line."""
    launch_loop(argv, "recr1.plain", train)


def train(cfg: Config) -> None:
    """Train by algorithm 1 of DeepSeekMath; the comments name its lines."""
    run = setup_plain_run(cfg, known_kinds=tuple(DEFAULTS))
    policy = load_model(run.model_folder)  # line 1: the policy begins as the given model
    reference = load_model(run.model_folder) if cfg.loss.kl > 0 else None  # line 3: never trained
    optimizer = make_optimizer(policy, cfg)
    before = run.evaluate_test("eval_before.jsonl", sample(policy, run.test_prompts, None, run))

    for step in range(1, cfg.train.steps + 1):  # line 4
        with run.log.time_phase("sample"):
            prompts = run.draw_prompts(step)  # (P,), line 5
            uniforms = run.draw_uniforms(step, prompts)  # (P, G, max_new_tokens) in (0, 1)
            rollouts = sample(policy, prompts, uniforms, run)  # (R,), line 7
        with run.log.time_phase("reward"):
            rewards = run.score(rollouts)  # (R,), line 8: of what the retriever finds

        with run.log.time_phase("train"):
            advantages = compute_advantages(rewards, cfg)  # (R,), line 9
            tokens, is_text, mask = pad([(rollout.prompt.ids, rollout.ids) for rollout in rollouts])
            with torch.no_grad():
                old_logp, entropy = compute_logp(policy, tokens, is_text, mask, run)  # line 6
                ref_logp = old_logp
                if reference is not None:
                    ref_logp, _ = compute_logp(reference, tokens, is_text, mask, run)

            # train.inner_steps updates share the prompts equally; siblings stay together.
            updates: list[tuple[torch.Tensor, torch.Tensor]] = []
            for rows in torch.arange(len(rollouts)).chunk(cfg.train.inner_steps):  # line 10
                logp, _ = compute_logp(policy, tokens[rows], is_text[rows], mask[rows], run)
                loss = compute_loss(
                    logp, old_logp[rows], ref_logp[rows], advantages[rows], mask[rows], cfg
                )
                logp.retain_grad()  # for the log
                loss.backward()
                lr = compute_lr(len(updates) + (step - 1) * cfg.train.inner_steps, cfg)
                grad_norm = update_weights(policy, optimizer, lr, cfg)  # line 11
                updates.append((loss, logp))

        run.finish_step(
            step, rollouts, rewards, advantages, old_logp, ref_logp, entropy, updates, grad_norm, lr
        )

    after = run.evaluate_test("eval_after.jsonl", sample(policy, run.test_prompts, None, run))
    run.write_results(policy, before, after)


# --- Lines 1 and 6: the policy --------------------------------------------------------------------


def load_model(folder: str) -> Any:
    """Load a causal language model of transformers."""
    from transformers import AutoModelForCausalLM  # here: it takes seconds

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def compute_log_policy(
    model: Any, tokens: torch.Tensor, is_text: torch.Tensor, last: int, run: PlainRun
) -> torch.Tensor:
    """Compute log pi(next id | the text so far), (R, last, V), at the last columns.

        pi = softmax(logits / temperature)        over the ids that the tokenizer knows

    tokens, is_text (R, L + T): ids, and where they are no padding.
    """
    positions = (is_text.cumsum(1) - 1).clamp(min=0)  # the first id of a text has position 0
    output = model(
        tokens,
        attention_mask=is_text,
        position_ids=positions,
        logits_to_keep=last,
        use_cache=False,
    )
    logits = output.logits[..., : run.num_ids]
    return (logits / run.cfg.sampling.temperature).log_softmax(-1)


def compute_logp(
    model: Any, tokens: torch.Tensor, is_text: torch.Tensor, mask: torch.Tensor, run: PlainRun
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute log pi(o_t | q, o_<t) of the sampled tokens, and the entropy of pi there, (R, T)."""
    T = mask.shape[1]
    log_pi = compute_log_policy(model, tokens, is_text, T + 1, run)
    log_pi = log_pi[:, :-1]  # (R, T, V): the column before a token predicts it
    logp = log_pi.gather(-1, tokens[:, -T:, None])[..., 0]
    with torch.no_grad():
        entropy = -(log_pi.exp() * log_pi).sum(-1)
    return logp, entropy


def pad(
    texts: list[tuple[Sequence[int], Sequence[int]]],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pad prompts q on the left and completions o on the right: all o begin in column L.

        . q q q o o o o
        q q q q o o . .

    Returns the ids and where there is text, (R, L + T); where there is a completion, (R, T).
    """
    L = max(len(prompt) for prompt, _ in texts)
    T = max(len(completion) for _, completion in texts)
    tokens = torch.zeros(len(texts), L + T, dtype=torch.int64)
    is_text = torch.zeros(len(texts), L + T, dtype=torch.bool)
    for row, (prompt, completion) in enumerate(texts):
        columns = slice(L - len(prompt), L + len(completion))
        tokens[row, columns] = torch.tensor([*prompt, *completion])
        is_text[row, columns] = True
    return tokens, is_text, is_text[:, L:]


# --- Line 7: samples ------------------------------------------------------------------------------


@torch.no_grad()
def sample(
    policy: Any, prompts: list[Prompt], uniforms: np.ndarray | None, run: PlainRun
) -> list[Rollout]:
    """Sample G completions of each prompt, siblings adjacent.

    uniforms (P, G, max_new_tokens): what the draws are made of. None: the most likely ids, G = 1.
    """
    group_size = 1 if uniforms is None else uniforms.shape[1]
    questions: list[Prompt] = []
    for prompt in prompts:
        questions += [prompt] * group_size
    completions: list[list[int]] = [[] for _ in questions]
    logps: list[list[float]] = [[] for _ in questions]

    running = list(range(len(questions)))
    for t in range(run.cfg.sampling.max_new_tokens):
        tokens, is_text, _ = pad([(questions[row].ids, completions[row]) for row in running])
        log_pi = compute_log_policy(policy, tokens, is_text, 1, run)[:, 0]  # (running, V)
        if uniforms is None:
            next_ids = log_pi.argmax(-1)
        else:
            # The first id at which the sum of the probabilities exceeds u.
            u = torch.from_numpy(uniforms.reshape(len(questions), -1)[running, t])
            cdf = log_pi.double().exp().cumsum(-1)
            next_ids = (cdf <= u[:, None] * cdf[:, -1:]).sum(-1)
        next_logp = log_pi.gather(-1, next_ids[:, None])[:, 0]

        for row, next_id, logp in zip(running, next_ids.tolist(), next_logp.tolist()):
            completions[row].append(next_id)
            logps[row].append(logp)
        running = [row for row in running if completions[row][-1] not in run.stops]
        if not running:
            break

    rollouts = []
    for row, ids in enumerate(completions):  # with the id that ended it: it is trained too
        group, sibling = divmod(row, group_size)
        finished = ids[-1] in run.stops
        rollouts.append(
            Rollout(questions[row], group, sibling, tuple(ids), tuple(logps[row]), finished)
        )
    return rollouts


# --- Line 9: advantages ---------------------------------------------------------------------------


def compute_advantages(rewards: list[Reward], cfg: Config) -> torch.Tensor:
    """Compute how much better each completion is than its siblings, (R,).

        A_i = (r_i - mean(r)) / (std(r) + std_floor)        section 4.1.2; std is the unbiased one

    "mean" is Dr. GRPO's: it does not divide. Where all siblings have the same reward, A is 0.
    """
    advantage = cfg.loss.advantage or DEFAULTS[cfg.loss.kind][0]
    r = torch.tensor([reward.total for reward in rewards])
    r = r.view(-1, cfg.sampling.group_size)  # (P, G)
    A = r - r.mean(1, keepdim=True)
    if advantage == "mean_std":
        A = A / (r.std(1, keepdim=True) + cfg.loss.std_floor)
    A[r.amax(1) == r.amin(1)] = 0.0  # not what rounding has left of the mean
    return A.flatten()


# --- Line 11: the objective, and an update --------------------------------------------------------


def compute_loss(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    ref_logp: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    cfg: Config,
) -> torch.Tensor:
    """Compute -J from log-probs (R, T) and advantages (R,): DeepSeekMath, equations 3 and 4.

    J = mean_it [ min(rho A, clip(rho, 1 - eps, 1 + eps) A) - beta KL ]
    rho = pi(o_t | q, o_<t) / pi_old(o_t | q, o_<t)
    KL  = pi_ref / pi - log(pi_ref / pi) - 1
    """
    A = advantages[:, None]  # (R, 1): that of a completion is that of all its tokens
    rho = (logp - old_logp).exp()
    clipped_rho = rho.clamp(1 - cfg.loss.clip, 1 + cfg.loss.high)
    surrogate = torch.minimum(rho * A, clipped_rho * A)
    log_ratio = ref_logp - logp
    KL = log_ratio.expm1() - log_ratio  # expm1(x) = e^x - 1, exact for a small x too
    J = (weigh_tokens(mask, cfg) * (surrogate - cfg.loss.kl * KL)).sum()
    return -J


def weigh_tokens(mask: torch.Tensor, cfg: Config) -> torch.Tensor:
    """Return what each token counts in the mean, (R, T): 0 where there is padding."""
    average = cfg.loss.average or DEFAULTS[cfg.loss.kind][1]
    R = len(mask)
    if average == "token":  # 1 / sum_i |o_i|: all tokens count the same
        return mask / mask.sum()
    if average == "sequence":  # 1 / R 1 / |o_i|: all completions count the same
        return mask / mask.sum(1, keepdim=True) / R
    return mask / (R * cfg.sampling.max_new_tokens)  # "constant"


def make_optimizer(policy: Any, cfg: Config) -> torch.optim.Optimizer:
    """Make AdamW of all weights. Its learning rate comes with each update."""
    return torch.optim.AdamW(
        policy.parameters(),
        betas=cfg.optimizer.betas,
        eps=cfg.optimizer.eps,
        weight_decay=cfg.optimizer.weight_decay,
    )


def compute_lr(update: int, cfg: Config) -> float:
    """Compute the learning rate of an update, from 0: up to lr, then linearly to final_lr of it."""
    warmup = cfg.optimizer.warmup_steps
    if update < warmup:
        return cfg.optimizer.lr * (update + 1) / warmup
    num_updates = cfg.train.steps * cfg.train.inner_steps
    progress = (update - warmup) / max(1, num_updates - warmup)
    return cfg.optimizer.lr * (1 - (1 - cfg.optimizer.final_lr) * progress)


def update_weights(
    policy: Any, optimizer: torch.optim.Optimizer, lr: float, cfg: Config
) -> torch.Tensor:
    """Take a step along the gradient, clipped to clip_norm. Returns its norm before that.

    A gradient that is not finite raises RuntimeError before any weight has changed.
    """
    grad_norm = torch.nn.utils.clip_grad_norm_(
        policy.parameters(), cfg.optimizer.clip_norm, error_if_nonfinite=True
    )
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return grad_norm


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
