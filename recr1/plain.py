"""GRPO in one plain file: python -m recr1.plain CONFIG.yaml [a.b=value ...]

A language model rewrites search queries. A fixed retriever runs them, and the NDCG of what it finds
is the reward (Rec-R1, arXiv 2503.24289). The model learns by algorithm 1 of DeepSeekMath (arXiv
2402.03300), whose lines `train` names. Nothing here is fast: the model is transformers', each new
token costs a pass over the whole text, and the loss stands on padded tensors with a mask.

python -m recr1.train gives the same weights from the same config in a fraction of the time and the
memory; tests/runs/test_plain.py holds the two against each other. What is around the algorithm
(data, retriever, rewards, learning rates, files) is training/plain_run.py. A setting that would
change the result and is not here is refused; those of speed, memory, validation and checkpoints do
nothing.

Legend: q a prompt, o its completion; P prompts of a step, G completions of each (siblings,
adjacent), R = P * G; L tokens of the longest prompt, T = sampling.max_new_tokens, V ids.
"""

import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW

from recr1.config.schema import Config
from recr1.data_types import Prompt, Reward, Rollout
from recr1.training.launch import launch_loop, run_command
from recr1.training.plain_run import PlainRun, setup_plain_run

# loss.kind -> what loss.advantage and loss.agg_mode are where the config leaves them empty
ADVANTAGES = {
    "grpo": "mean_std",
    "dr_grpo": "mean",  # arXiv 2503.20783
    "dapo": "mean_std",  # arXiv 2503.14476; the rest of it is loss.clip_ratio_high
}
AGG_MODES = {
    "grpo": "token-mean",  # as in Rec-R1's code; DeepSeekMath's own is "seq-mean-token-mean"
    "dr_grpo": "seq-mean-token-sum-norm",
    "dapo": "token-mean",
}


def main(argv: list[str]) -> None:
    launch_loop(argv, "recr1.plain", train)


def train(cfg: Config) -> None:
    """Train by algorithm 1 of DeepSeekMath; the comments name its lines.

    Lines 2 and 12 are left out: reference and reward never change.
    """
    run = setup_plain_run(cfg, known_kinds=tuple(AGG_MODES))
    T = cfg.sampling.max_new_tokens
    policy = load_model(run)  # line 1: the policy begins as the given model
    reference = load_model(run) if cfg.loss.kl_coef > 0 else None  # line 3: it stays as it is
    optimizer = make_optimizer(policy, cfg)
    test_rollouts = sample(policy, run.test_prompts, None, run)
    before = run.evaluate_test("eval_before.jsonl", test_rollouts)

    for step in range(1, cfg.train.steps + 1):  # line 4
        with run.log.time_phase("sample"):
            prompts = run.draw_prompts(step)  # (P,), line 5
            uniforms = run.draw_uniforms(step, prompts)  # (R, T) in (0, 1)
            rollouts = sample(policy, prompts, uniforms, run)  # (R,), line 7
        with run.log.time_phase("reward"):
            rewards = run.score(rollouts)  # (R,), line 8: of what the retriever finds
        with run.log.time_phase("train"):
            advantages = compute_advantages(rewards, cfg)  # (R,), line 9
            texts = [(rollout.prompt.ids, rollout.ids) for rollout in rollouts]
            tokens, is_text = pad(texts, T)  # (R, L + T)
            mask = is_text[:, -T:]  # (R, T): what was sampled
            with torch.no_grad():
                old_logp, entropy = compute_logp(policy, tokens, is_text, run)  # (R, T), line 6
                ref_logp = old_logp
                if reference:
                    ref_logp, _ = compute_logp(reference, tokens, is_text, run)

            # Each update has an equal share of the prompts, with all their completions; each
            # completion is used once (the paper's mu is 1). In the first update rho is 1.
            updates = []
            share = len(rollouts) // cfg.train.num_mini_batches
            for start in range(0, len(rollouts), share):  # line 10
                rows = slice(start, start + share)
                logp, _ = compute_logp(policy, tokens[rows], is_text[rows], run)
                logp.retain_grad()  # its norm is logged: grad_logp_norm
                loss = compute_loss(
                    logp, old_logp[rows], ref_logp[rows], advantages[rows], mask[rows], cfg
                )
                if reference or advantages[rows].any():
                    loss.backward()  # else there is no gradient, and AdamW moves no weight
                lr = run.compute_lr(step, start // share)
                grad_norm = update_weights(policy, optimizer, lr, cfg)  # line 11
                updates.append((loss, logp))

        run.finish_step(
            step=step,
            rollouts=rollouts,
            rewards=rewards,
            advantages=advantages,
            old_logp=old_logp,
            ref_logp=ref_logp,
            entropy=entropy,
            updates=updates,
            grad_norm=grad_norm,
            lr=lr,
        )

    test_rollouts = sample(policy, run.test_prompts, None, run)
    after = run.evaluate_test("eval_after.jsonl", test_rollouts)
    run.write_results(policy, before, after)


def load_model(run: PlainRun) -> Any:
    """Load the config's model, without dropout: any causal language model of transformers."""
    from transformers import AutoModelForCausalLM  # here: it takes seconds

    return AutoModelForCausalLM.from_pretrained(run.model_folder, dtype=torch.float32)


def compute_log_pi(model: Any, tokens: Tensor, is_text: Tensor, last: int, run: PlainRun) -> Tensor:
    """Compute log pi(next id | text so far), (R, last, V), at the last columns.

    pi = softmax(logits / temperature)        over the ids that the tokenizer knows
    """
    positions = is_text.cumsum(1) - 1  # a text's first id has position 0
    output = model(
        tokens,
        attention_mask=is_text,
        position_ids=positions.clamp(min=0),
        logits_to_keep=last,
        use_cache=False,
    )
    logits = output.logits[..., : run.num_ids]
    logits = logits / run.cfg.sampling.temperature
    return logits.log_softmax(-1)


def compute_logp(
    model: Any, tokens: Tensor, is_text: Tensor, run: PlainRun
) -> tuple[Tensor, Tensor]:
    """Compute log pi(o_t | q, o_<t) of the completions' tokens, and the entropy of pi, (R, T)."""
    T = run.cfg.sampling.max_new_tokens
    log_pi = compute_log_pi(model, tokens, is_text, T + 1, run)
    log_pi = log_pi[:, :-1]  # (R, T, V): the column before a token predicts it
    target = tokens[:, -T:, None]  # (R, T, 1)
    logp = log_pi.gather(-1, target)[..., 0]
    with torch.no_grad():
        entropy = -(log_pi.exp() * log_pi).sum(-1)
    return logp, entropy


def pad(texts: list[tuple], T: int) -> tuple[Tensor, Tensor]:
    """Pad prompts q on the left and completions o, to T, on the right: all o begin in column L.

        . q q q o o o o
        q q q q o o . .

    Returns the ids, and where they are no padding, (R, L + T).
    """
    L = max(len(prompt) for prompt, _ in texts)
    tokens = torch.full((len(texts), L + T), -1)  # -1: padding
    for row, (prompt, completion) in enumerate(texts):
        columns = slice(L - len(prompt), L + len(completion))
        tokens[row, columns] = torch.tensor([*prompt, *completion])
    return tokens.clamp(min=0), tokens >= 0


@torch.no_grad()
def sample(
    policy: Any, prompts: list[Prompt], uniforms: Tensor | None, run: PlainRun
) -> list[Rollout]:
    """Sample G completions of each prompt, siblings adjacent, by uniforms (R, T).

    None: one completion of each, of the most likely ids.
    """
    group_size = 1 if uniforms is None else run.cfg.sampling.group_size
    questions = []
    for prompt in prompts:
        questions += [prompt] * group_size
    completions: list[list[int]] = [[] for _ in questions]
    logps: list[list[float]] = [[] for _ in questions]
    running = list(range(len(questions)))

    for t in range(run.cfg.sampling.max_new_tokens):
        texts = [(questions[row].ids, completions[row]) for row in running]
        tokens, is_text = pad(texts, t)
        log_pi = compute_log_pi(policy, tokens, is_text, 1, run)
        log_pi = log_pi[:, 0]  # (running, V)
        next_ids = log_pi.argmax(-1)
        if uniforms is not None:
            # The first id at which the sum of the probabilities exceeds u.
            u = uniforms[running, t, None]
            cdf = log_pi.double().exp().cumsum(-1)
            next_ids = (cdf <= u * cdf[:, -1:]).sum(-1)
        next_logp = log_pi.gather(-1, next_ids[:, None])
        for row, next_id, logp in zip(running, next_ids, next_logp):
            completions[row].append(int(next_id))
            logps[row].append(float(logp))
        running = [row for row in running if completions[row][-1] not in run.stops]
        if not running:
            break

    rollouts = []
    for row, ids in enumerate(completions):  # with the stop token, which is trained too
        group, sibling = divmod(row, group_size)
        rollout = Rollout(
            prompt=questions[row],
            group=group,
            sibling=sibling,
            ids=tuple(ids),
            sampler_logp=tuple(logps[row]),  # for the log: how far old_logp is from it
            finished=ids[-1] in run.stops,
        )
        rollouts.append(rollout)
    return rollouts


def compute_advantages(rewards: list[Reward], cfg: Config) -> Tensor:
    """Compute how much better each completion is than its siblings, (R,): section 4.1.2.

        A_i = (r_i - mean(r)) / (std(r) + advantage_eps)        with the unbiased std

    Dr. GRPO ("mean") does not divide. Where all siblings have the same reward, A is 0.
    """
    advantage = cfg.loss.advantage or ADVANTAGES[cfg.loss.kind]
    totals = torch.tensor([reward.total for reward in rewards])
    r = totals.view(-1, cfg.sampling.group_size)  # (P, G)
    A = r - r.mean(1, keepdim=True)
    if advantage == "mean_std":
        std = r.std(1, keepdim=True)
        A = A / (std + cfg.loss.advantage_eps)
    A[r.amax(1) == r.amin(1)] = 0.0  # exactly, whatever the mean was rounded to
    return A.flatten()


def compute_loss(
    logp: Tensor,
    old_logp: Tensor,
    ref_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    cfg: Config,
) -> Tensor:
    """Compute -J from log-probs (R, T) and advantages (R,): equations 3 and 4.

    J   = mean over i, t of  min(rho A_i, clip(rho, 1 - eps, 1 + eps) A_i) - beta KL
          (the mean: `weigh_tokens`; eps: loss.clip_ratio_low, _high; beta: loss.kl_coef)
    rho = pi(o_t | q, o_<t) / pi_old(o_t | q, o_<t)
    KL  = pi_ref / pi - log(pi_ref / pi) - 1
    """
    A = advantages[:, None]  # (R, 1): all tokens of a completion have the same
    rho = (logp - old_logp).exp()
    clipped_rho = rho.clamp(1 - cfg.loss.clip_ratio_low, 1 + cfg.loss.upper_clip_ratio)
    surrogate = torch.minimum(rho * A, clipped_rho * A)
    log_ratio = ref_logp - logp
    KL = log_ratio.expm1() - log_ratio  # expm1(x) = e^x - 1, exact for small x too
    J = surrogate - cfg.loss.kl_coef * KL  # (R, T), before the mean
    weight = weigh_tokens(mask, cfg)
    return -(weight * J).sum()


def weigh_tokens(mask: Tensor, cfg: Config) -> Tensor:
    """Return the weight of each token in the mean over i, t: (R, T), 0 for padding."""
    agg_mode = cfg.loss.agg_mode or AGG_MODES[cfg.loss.kind]
    R, T = mask.shape
    if agg_mode == "token-mean":  # all tokens count the same
        return mask / mask.sum()
    if agg_mode == "seq-mean-token-mean":  # all completions count the same
        return mask / mask.sum(1, keepdim=True) / R
    # "seq-mean-token-sum-norm": as if all completions were as long as they may be
    return mask / (R * T)


def make_optimizer(policy: Any, cfg: Config) -> AdamW:
    """Make AdamW of all weights. Its learning rate comes with each update."""
    return AdamW(
        policy.parameters(),
        betas=cfg.optimizer.betas,
        eps=cfg.optimizer.eps,
        weight_decay=cfg.optimizer.weight_decay,
    )


def update_weights(policy: Any, optimizer: AdamW, lr: float, cfg: Config) -> Tensor:
    """Take the optimizer's step on the clipped gradient. Returns the gradient's norm before that.

    Raises RuntimeError, before any weight moves, where the gradient is not finite.
    """
    max_norm = cfg.optimizer.max_grad_norm
    norm = clip_grad_norm_(policy.parameters(), max_norm, error_if_nonfinite=True)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return norm


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
