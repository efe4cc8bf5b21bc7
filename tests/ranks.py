"""One optimiser step's gradient, and three steps' weights, by the code of the loop: on the ranks of a torchrun job or in this process.

torchrun --nproc-per-node N tests/ranks.py FILE writes {case: {name: tensor}} for every case; test_ranks.py compares the files.
"""
import sys
from dataclasses import replace

import torch
from torch.distributed.fsdp import fully_shard

from recr1 import dist
from recr1.config import Config, ConfigError, Loss, Model, Optimizer as OptimizerConfig, Sampling, Train
from recr1.fsdp import Sharded, gathered
from recr1.grpo import group_advantages, objective, policy_loss
from recr1.optim import Optimizer
from recr1.packing import distinct
from recr1.records import Prompt, Rollout
from recr1.train import optimiser_steps
from tiny import tiny_config, tiny_model

PROMPTS, GROUP = 5, 4            # 5 divides by neither 2 nor 3
SETTINGS = Config(sampling=Sampling(group_size=GROUP, temperature=1.3),
                  optimizer=OptimizerConfig(lr=1e-2, clip_norm=0.05, weight_decay=0.1, betas=(0.9, 0.95)))
ONE, TWO = dict(kl=0.05, std_floor=0.1), dict(std_floor=0.1)          # with a reference, without
CASES = {   # name: (dtype, model, tokens per micro-batch, checkpointing, groups without variance, loss)
    "float64": (torch.float64, {}, 10_000, False, (), ONE),
    "float64 small batches": (torch.float64, {}, 18, False, (), ONE),
    "float64 checkpointing": (torch.float64, dict(family="qwen3"), 40, True, (), ONE),
    "float64 tied": (torch.float64, dict(tie_word_embeddings=True, num_hidden_layers=3), 40, False, (), ONE),
    "float64 tied checkpointing": (torch.float64, dict(tie_word_embeddings=True, num_hidden_layers=3), 18, True, (), ONE),
    "float64 rank 0 has nothing to learn": (torch.float64, dict(family="llama"), 18, False, (0, 1), TWO),
    "float64 nobody has": (torch.float64, {}, 18, False, range(PROMPTS), TWO),
    "float64 recompute": (torch.float64, dict(tie_word_embeddings=True), 18, False, (), ONE),
    "float64 GSPO": (torch.float64, {}, 18, False, (), dict(kind="gspo")),
    "float64 Dr. GRPO with entropy and KL k2": (torch.float64, {}, 18, False, (), dict(kind="dr_grpo", entropy=0.1, kl=0.05, kl_estimator="k2")),
    "float64 CISPO": (torch.float64, {}, 40, False, (), dict(kind="cispo", average="sequence")),
    "float64 RLOO, trusting the trainer": (torch.float64, {}, 18, False, (), dict(kind="rloo", importance_cap=2.0)),
    "float32": (torch.float32, dict(tie_word_embeddings=True), 18, False, (), ONE),
    "float32 checkpointing": (torch.float32, {}, 40, True, (0, 1), TWO),
}


def rollouts_and_rewards(step: int, same: tuple) -> tuple[list[Rollout], list[float]]:
    """PROMPTS * GROUP rollouts of unequal lengths; every third sibling repeats its elder; groups in `same` have one reward."""
    g = torch.Generator().manual_seed(step)

    def ids(low, high):
        return tuple(torch.randint(tiny_config().vocab_size, (int(torch.randint(low, high, (1,), generator=g)),), generator=g).tolist())
    rollouts, rewards = [], []
    for p in range(PROMPTS):
        prompt, texts = Prompt(f"q{p}", p, "", ids(1, 8)), []
        for s in range(GROUP):
            texts.append(texts[-1] if s % 3 == 2 else ids(1, 10))
            rollouts.append(Rollout(prompt, p, s, texts[-1], (0.0,) * len(texts[-1]), True))
            rewards.append(1.0 if p in same else len(texts[-1]) * 0.1 + p)
    return rollouts, rewards


def accumulate(policy, reference, step: int, same: tuple, cfg: Config) -> None:
    """The loop's train phase for this rank's share of the step, without the optimizer."""
    rollouts, rewards = rollouts_and_rewards(step, same)
    mine = set(dist.share(list(range(PROMPTS))))
    rewards = [r for x, r in zip(rollouts, rewards) if x.group in mine]
    rollouts = [x for x in rollouts if x.group in mine]
    dtype = next(policy.parameters()).dtype
    loss = objective(cfg.loss, cfg.model)
    adv = group_advantages(torch.tensor(rewards, dtype=dtype), GROUP, loss.advantage, cfg.loss)
    texts, first = distinct([replace(x, group=x.group - min(mine)) for x in rollouts])
    [(total, batches)] = optimiser_steps(policy, reference, texts, adv[first], cfg, loss.average)
    for batch in batches:
        policy_loss(policy, batch, total, cfg.sampling.temperature, loss)[0].backward()


def results(case: str, sharded: bool) -> dict[str, torch.Tensor]:
    """{"grad NAME", "weight NAME": tensor}: the first step's gradient and the weights after three AdamW steps."""
    dtype, shape, budget, checkpointing, same, loss = CASES[case]
    whole = loss.get("kind") == "gspo" or "recompute" in case
    cfg = replace(SETTINGS, train=Train(tokens_per_micro_batch=budget), loss=Loss(**loss), model=Model(head="recompute" if whole else "one_shot"))

    def model(seed, trainable):
        decoder = tiny_model(seed, **shape).to(dtype)
        if not sharded:
            return decoder.requires_grad_(trainable)
        state = dict(decoder.state_dict())
        return Sharded(decoder, state.__getitem__, device=dist.device(), master=dtype, compute=dtype, checkpointing=checkpointing, trainable=trainable)

    def named(take):             # `take` of every parameter, by Hugging Face's names
        if not sharded:
            return {name: take(p) for name, p in policy.named_parameters() if take(p) is not None}
        units = [u for u in (policy.root_unit, *policy.units) if take(u.shard) is not None]
        return {w.name: view for u in units for w, view in zip(u.weights, u.views(dist.all_gather(take(u.shard))))}
    policy, reference = model(1, True), model(2, False) if cfg.loss.kl else None
    optimizer, out = Optimizer(policy, cfg.optimizer, 3), {}
    for step in range(3):
        accumulate(policy, reference, step, same, cfg)
        if step == 0:
            out = {f"grad {name}": t.clone() for name, t in named(lambda p: p.grad).items()}
        norm, _ = optimizer.step()
    if sharded:                  # what the sampler would see is what was trained
        with gathered(policy):
            assert not next(iter(policy.decoder.model.layers)).mlp.up_proj.weight.requires_grad
    return out | {f"weight {name}": t.detach().clone() for name, t in named(lambda p: p.data).items()} | {"norm": torch.tensor(norm)}


def fsdp2() -> dict[str, torch.Tensor]:
    """The gradient of case "float64 checkpointing", by torch's fully_shard: per block and root, sums in place of its means."""
    _, shape, budget, _, same, loss = CASES["float64 checkpointing"]
    policy, reference = (tiny_model(seed, **shape).double() for seed in (1, 2))
    for module in (*policy.model.layers, policy):
        fully_shard(module, reshard_after_forward=module is not policy)        # the head is used after the root's forward
        module.set_gradient_divide_factor(1.0)
    accumulate(policy, reference.requires_grad_(False), 0, same, replace(SETTINGS, train=Train(tokens_per_micro_batch=budget), loss=Loss(**loss)))
    return {f"grad {name}": p.grad.full_tensor() for name, p in policy.named_parameters()}


def one_fails() -> str:
    """What every rank is told when the last one fails in a block of dist.together."""
    try:
        with dist.together():
            if dist.rank() == dist.world() - 1:
                raise ConfigError("only here")
    except ConfigError as e:
        return str(e)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with dist.session():
        done = {case: results(case, sharded=True) for case in CASES}
        theirs = fsdp2()
        told, shares = dist.gather(one_fails()), dist.gather(dist.share(list(range(7))))
        if dist.rank() == 0:
            torch.save(done | dict(told=told, shares=shares, fsdp2=theirs), sys.argv[1])
