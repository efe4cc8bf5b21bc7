"""One optimizer step's gradient, and three steps' weights, by the code of the loop: on the ranks of
a torchrun job or in this process.

torchrun --nproc-per-node N tests/helpers/rank_jobs.py FILE writes {case: {name: tensor}} for every
case; test_ranks.py compares the files.
"""

import sys
import time
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from helpers.tiny_world import tiny_config, tiny_model
from torch.multiprocessing.reductions import StorageWeakRef

from recr1.config.schema import (
    Config,
    ConfigError,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    SamplingConfig,
    TrainConfig,
)
from recr1.data_types import Prompt, Rollout
from recr1.distributed import collectives as dist
from recr1.distributed.fsdp import Sharded, unsharded
from recr1.distributed.process_group import process_group
from recr1.rl.advantages import compute_group_advantages
from recr1.rl.losses import resolve_objective
from recr1.rl.packing import deduplicate
from recr1.rl.policy_loss import compute_policy_loss
from recr1.sft import CROSS_ENTROPY, compute_cross_entropy, make_update, select_targets
from recr1.train import make_updates
from recr1.training.optimizer import Optimizer
from recr1.utils.exits import end_process

# 5 divides by neither 2 nor 3
PROMPTS = 5
GROUP = 4
SETTINGS = Config(
    sampling=SamplingConfig(group_size=GROUP, temperature=1.3),
    optimizer=OptimizerConfig(lr=1e-2, max_grad_norm=0.05, weight_decay=0.1, betas=(0.9, 0.95)),
)
# with a reference, without
ONE = dict(kl_coef=0.05, advantage_eps=0.1)
TWO = dict(advantage_eps=0.1)


class Case(NamedTuple):
    loss: dict
    budget: int = 18  # tokens per micro-batch
    dtype: torch.dtype = torch.float64
    compute: torch.dtype | None = None  # as dtype
    same: tuple = ()  # groups without variance
    gradient_checkpointing: bool = False
    head: str = "fused"
    gradient_sync: str = "every_micro_batch"
    frozen: tuple[str, ...] = ()
    on_host: bool = False  # the reference, and AdamW's moments
    shape: dict = {}  # of the model
    group: int = GROUP


TIED = dict(tie_word_embeddings=True, num_hidden_layers=3)
# a block that is frozen, and parts of the others and of the root
NORMS = ("model.layers.0.*", "*norm.weight")
BF16 = dict(dtype=torch.float32, compute=torch.bfloat16)
CASES = {
    "float64": Case(ONE, 10_000),
    "float64 small batches": Case(ONE),
    "float64 checkpointing": Case(ONE, 40, gradient_checkpointing=True, shape=dict(family="qwen3")),
    "float64 tied": Case(ONE, 40, shape=TIED),
    "float64 tied checkpointing": Case(ONE, gradient_checkpointing=True, shape=TIED),
    "float64 rank 0 has nothing to learn": Case(TWO, same=(0, 1), shape=dict(family="llama")),
    "float64 nobody has": Case(TWO, same=tuple(range(PROMPTS))),
    "float64 recompute": Case(ONE, head="recompute", shape=dict(tie_word_embeddings=True)),
    "float64 GSPO": Case(dict(kind="gspo"), head="recompute"),
    "float64 Dr. GRPO with entropy and KL k2": Case(
        dict(kind="dr_grpo", entropy_coef=0.1, kl_coef=0.05, kl_estimator="k2")
    ),
    "float64 CISPO": Case(dict(kind="cispo", agg_mode="seq-mean-token-mean"), 40),
    "float64 RLOO, trusting the trainer": Case(dict(kind="rloo", tis_cap=2.0)),
    "float64 one reduction a step": Case(ONE, gradient_sync="last_micro_batch", shape=TIED),
    "float64 one reduction a step, checkpointing": Case(
        TWO, same=(0, 1), gradient_sync="last_micro_batch", gradient_checkpointing=True
    ),
    "float64 frozen": Case(ONE, frozen=NORMS, shape=dict(num_hidden_layers=3)),
    "float64 frozen, checkpointing, one reduction a step": Case(
        ONE, frozen=NORMS, gradient_checkpointing=True, gradient_sync="last_micro_batch", shape=TIED
    ),
    "float64 frozen embedding": Case(ONE, frozen=("model.embed_tokens.weight",)),
    "float64 on the host": Case(ONE, on_host=True, frozen=NORMS, shape=TIED),
    "float32": Case(ONE, dtype=torch.float32, shape=dict(tie_word_embeddings=True)),
    "float32 checkpointing": Case(
        TWO, 40, dtype=torch.float32, same=(0, 1), gradient_checkpointing=True
    ),
    "bfloat16": Case(ONE, shape=TIED, **BF16),
    "bfloat16 checkpointing": Case(ONE, 40, gradient_checkpointing=True, **BF16),
}
# Shared prompts under checkpointing, for test_ranks.py's padded reference: budgets that split a
# group of 8, and that hold several groups
PADDED = {
    f"{name}, groups of {group}, {family}, {budget} tokens": Case(
        ONE,
        budget,
        dtype,
        gradient_checkpointing=True,
        group=group,
        shape=dict(family=family, **tied),
    )
    for name, dtype in (("float64", torch.float64), ("float32", torch.float32))
    for group, budget, family, tied in (
        (1, 40, "qwen2", {}),
        (3, 40, "llama", TIED),
        (8, 40, "qwen3", TIED),
        (8, 200, "qwen2", {}),
    )
}
CASES |= PADDED
AGAINST_FSDP2 = [
    "float64 checkpointing",
    "float64 tied",
    "float64 small batches",
    "float64 frozen",
    "float64 one reduction a step",
    "bfloat16",
    "bfloat16 checkpointing",
]

GATHERED = [
    "float64 tied",
    "float64 tied checkpointing",
    "float64 frozen",
    "float64 frozen, checkpointing, one reduction a step",
]


def rollouts_and_rewards(
    step: int, same: tuple = (), group: int = GROUP
) -> tuple[list[Rollout], list[float]]:
    """PROMPTS * group rollouts of unequal lengths; every third sibling repeats its elder; groups in
    `same` have one reward.
    """
    g = torch.Generator().manual_seed(step)

    def ids(low, high):
        return tuple(
            torch.randint(
                tiny_config().vocab_size,
                (int(torch.randint(low, high, (1,), generator=g)),),
                generator=g,
            ).tolist()
        )

    rollouts = []
    rewards = []
    for p in range(PROMPTS):
        prompt = Prompt(f"q{p}", p, "", ids(1, 8))
        texts = []
        for s in range(group):
            texts.append(texts[-1] if s % 3 == 2 else ids(1, 10))
            rollouts.append(Rollout(prompt, p, s, texts[-1], (0.0,) * len(texts[-1]), True))
            rewards.append(1.0 if p in same else len(texts[-1]) * 0.1 + p)
    return rollouts, rewards


def advantages(rewards: list[float], cfg: Config, group: int, dtype: torch.dtype) -> torch.Tensor:
    """The loop's. Of a group of one they would all be 0: what its reward has over 3."""
    rewards = torch.tensor(rewards, dtype=dtype)
    return (
        compute_group_advantages(
            rewards, group, resolve_objective(cfg.loss, cfg.model).advantage, cfg.loss
        )
        if group > 1
        else rewards - 3
    )


def accumulate(policy, reference, step: int, same: tuple, cfg: Config, group: int = GROUP) -> float:
    """The loop's train phase for this rank's share of the step, without the optimizer. Returns this
    rank's part of the loss.
    """
    rollouts, rewards = rollouts_and_rewards(step, same, group)
    mine = set(dist.split_across_ranks(list(range(PROMPTS))))
    rewards = [r for x, r in zip(rollouts, rewards) if x.group in mine]
    rollouts = [x for x in rollouts if x.group in mine]
    dtype = next(policy.parameters()).dtype
    loss = resolve_objective(cfg.loss, cfg.model)
    adv = advantages(rewards, cfg, group, dtype)
    texts, first = deduplicate([replace(x, group=x.group - min(mine)) for x in rollouts])
    [(total, batches)] = make_updates(policy, reference, texts, adv[first], cfg, loss.agg_mode)
    sum_of_losses = 0.0
    for i, batch in enumerate(batches, 1):
        policy.requires_gradient_sync = cfg.train.gradient_sync != "last_micro_batch" or i == len(
            batches
        )
        value, *_ = compute_policy_loss(policy, batch, total, cfg.sampling.temperature, loss)
        value.backward()
        sum_of_losses += value.item()
    return sum_of_losses


def settings(case: Case) -> Config:
    return replace(
        SETTINGS,
        train=TrainConfig(tokens_per_micro_batch=case.budget, gradient_sync=case.gradient_sync),
        loss=LossConfig(**case.loss),
        model=ModelConfig(head=case.head),
        optimizer=replace(SETTINGS.optimizer, cpu_offload=case.on_host),
    )


def freeze(decoder, frozen: tuple[str, ...]):
    for name, p in decoder.named_parameters():
        p.requires_grad_(not any(fnmatchcase(name, pattern) for pattern in frozen))
    return decoder


def results(name: str, sharded: bool) -> dict[str, torch.Tensor]:
    """{"grad NAME", "weight NAME": tensor}: the first step's gradient and the weights after three
    AdamW steps; "loss" of the first, "norm" of the last.
    """
    case = CASES[name]
    cfg = settings(case if sharded else case._replace(on_host=False))

    def model(seed, frozen):
        decoder = tiny_model(seed, **case.shape).to(case.dtype)
        if not sharded:
            return freeze(decoder, frozen)
        state = dict(decoder.state_dict())
        return Sharded(
            decoder,
            state.__getitem__,
            device=dist.device(),
            master=case.dtype,
            compute=case.compute or case.dtype,
            gradient_checkpointing=case.gradient_checkpointing,
            frozen=frozen,
            on_host=case.on_host and frozen == ("*",),
        )

    def named(take):  # `take` of every parameter, by Hugging Face's names
        if not sharded:
            return {name: take(p) for name, p in policy.named_parameters() if take(p) is not None}
        return {
            w.name: w.view(whole)
            for u in policy.units
            if take(u.shard) is not None
            for whole in [dist.start_all_gather(take(u.shard))()]
            for w in u.flat_param.weights
        }

    policy = model(1, case.frozen)
    reference = model(2, ("*",)) if cfg.loss.kl_coef else None
    optimizer = Optimizer(policy, cfg.optimizer, 3)
    out = {}
    for step in range(3):
        loss = accumulate(policy, reference, step, case.same, cfg, case.group)
        if step == 0:
            out = {f"grad {name}": t.clone() for name, t in named(lambda p: p.grad).items()} | dict(
                loss=torch.tensor(dist.all_reduce_sum(loss)[0], dtype=torch.float64)
            )
        norm, _ = optimizer.step()
    if sharded:  # what the sampler would see is what was trained
        with unsharded(policy):
            assert not next(iter(policy.decoder.model.layers)).mlp.up_proj.weight.requires_grad
    return (
        out
        | {f"weight {name}": t.detach().clone() for name, t in named(lambda p: p.data).items()}
        | {"norm": torch.tensor(norm)}
    )


def fsdp2(name: str) -> dict[str, torch.Tensor]:
    """The first step's gradient and loss by torch's fully_shard: per block and root, sums in place
    of its means.
    """
    # a second, for ranks that are here for another function
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    case = CASES[name]
    policy, reference = (tiny_model(seed, **case.shape).to(case.dtype) for seed in (1, 2))
    freeze(policy, case.frozen), freeze(reference, ("*",))
    mixed = (
        MixedPrecisionPolicy(param_dtype=case.compute, reduce_dtype=case.dtype)
        if case.compute
        else MixedPrecisionPolicy()
    )
    for decoder in (policy, reference):
        for module in (*decoder.model.layers, decoder):
            # the head is used after the root's forward
            fully_shard(module, reshard_after_forward=module is not decoder, mp_policy=mixed)
            # gloo cannot scale
            module.set_gradient_divide_factor(1.0), module.set_force_sum_reduction_for_comms(True)
    loss = accumulate(policy, reference, 0, case.same, settings(case))
    return {
        f"grad {name}": p.grad.full_tensor()
        for name, p in policy.named_parameters()
        if p.requires_grad
    } | dict(loss=torch.tensor(dist.all_reduce_sum(loss)[0], dtype=torch.float64))


# seconds: wait() of a gloo work returns before its worker thread has let go of the tensors
RELEASED_WITHIN = 5.0


def released(storages: list[StorageWeakRef]) -> bool:
    """Whether all of them are freed, now or when gloo's workers have come to it."""
    deadline = time.monotonic() + RELEASED_WITHIN
    while not all(storage.expired() for storage in storages):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True


def gathered_bytes(name: str) -> tuple[int, int]:
    """(the most bytes of gathered weights alive at one time in two steps' forward and backward, two
    largest blocks and the root).
    """
    case = CASES[name]
    alive = []
    most = 0
    decoder = tiny_model(1, **case.shape).to(case.dtype)
    state = dict(decoder.state_dict())
    policy = Sharded(
        decoder,
        state.__getitem__,
        device=dist.device(),
        master=case.dtype,
        compute=case.dtype,
        gradient_checkpointing=case.gradient_checkpointing,
        frozen=case.frozen,
    )
    begin = dist._all_gather

    def counted(whole, *more, **kwargs):
        nonlocal most
        alive.append((StorageWeakRef(whole.untyped_storage()), whole.nbytes))
        deadline = time.monotonic() + RELEASED_WITHIN
        while (
            now := sum(size for storage, size in alive if not storage.expired())
        ) > bound and time.monotonic() < deadline:
            # what is over it may be a finished work's that a worker is about to free
            time.sleep(0.001)
        most = max(most, now)
        return begin(whole, *more, **kwargs)

    blocks = policy.block_groups[1:-1]
    sizes = [sum(dist.world_size() * u.shard.nbytes for u in groups) for groups in blocks]
    bound = sum(sorted(sizes)[-2:]) + sum(
        dist.world_size() * u.shard.nbytes for u in policy.root_groups
    )
    dist._all_gather = counted
    try:
        for step in range(2):
            accumulate(
                policy, None, step, case.same, replace(settings(case), loss=LossConfig(**TWO))
            )
            assert released([storage for storage, _ in alive]), (
                "gathered weights outlive the backward"
            )
    finally:
        dist._all_gather = begin
    return most, bound


LESSONS = {
    f"{'masked' if mask else 'unmasked'}, {budget} tokens, {head}, {gradient_sync}": (
        mask,
        budget,
        head,
        gradient_sync,
    )
    for mask, budget, head, gradient_sync in (
        (True, 18, "fused", "every_micro_batch"),
        (False, 18, "recompute", "last_micro_batch"),
        (False, 10_000, "fused", "every_micro_batch"),
    )
}


def lesson_texts() -> list[Rollout]:
    """One text for each prompt."""
    return [r for r in rollouts_and_rewards(0)[0] if r.sibling == 0]


def lesson(name: str) -> dict[str, torch.Tensor]:
    """{"grad NAME": tensor, "loss"}: one optimizer step of SFT on this rank's share, by the code of
    its loop, in float64.
    """
    mask, budget, head, gradient_sync = LESSONS[name]
    decoder = tiny_model(1, tie_word_embeddings=True).double()
    policy = Sharded(
        decoder,
        dict(decoder.state_dict()).__getitem__,
        device=dist.device(),
        master=torch.float64,
        compute=torch.float64,
    )
    total, batches = make_update(
        [select_targets(r, mask) for r in dist.split_across_ranks(lesson_texts())], budget
    )
    loss = 0.0
    for i, batch in enumerate(batches, 1):
        policy.requires_gradient_sync = gradient_sync != "last_micro_batch" or i == len(batches)
        value, _ = compute_cross_entropy(
            policy, batch, total, 1.0, resolve_objective(CROSS_ENTROPY, ModelConfig(head=head))
        )
        value.backward()
        loss += value.item()
    grads = {
        f"grad {w.name}": w.view(whole)
        for u in policy.units
        for whole in [dist.start_all_gather(u.shard.grad)()]
        for w in u.flat_param.weights
    }
    return grads | dict(loss=torch.tensor(dist.all_reduce_sum(loss)[0], dtype=torch.float64))


def one_fails() -> str:
    """What every rank is told when the last one fails in a block of dist.fail_together."""
    try:
        with dist.fail_together():
            if dist.rank() == dist.world_size() - 1:
                raise ConfigError("only here")
    except ConfigError as e:
        return str(e)


def a_leak() -> str:
    """What is said of gathered weights that somebody keeps."""
    global RELEASED_WITHIN
    keeper = []
    inner = dist._start_collective
    limit = RELEASED_WITHIN

    def keeps(*args):
        wait = inner(*args)

        def kept():
            keeper.append(wait())
            return keeper[-1]

        return kept

    dist._start_collective, RELEASED_WITHIN = keeps, 0.2
    try:
        gathered_bytes(GATHERED[0])
        return "nothing"
    except AssertionError as e:
        return str(e)
    finally:
        dist._start_collective, RELEASED_WITHIN = inner, limit


def work() -> int:
    torch.set_num_threads(1)
    with process_group():
        done = {case: results(case, sharded=True) for case in CASES}
        lessons = {case: lesson(case) for case in LESSONS}
        theirs = {case: fsdp2(case) for case in AGAINST_FSDP2}
        sizes = {case: gathered_bytes(case) for case in GATHERED}
        leak = a_leak()
        told = dist.gather_to_rank0(one_fails())
        shares = dist.gather_to_rank0(dist.split_across_ranks(list(range(7))))
        if dist.rank() == 0:
            torch.save(
                done
                | dict(
                    lessons=lessons,
                    told=told,
                    shares=shares,
                    fsdp2=theirs,
                    gathered_bytes=sizes,
                    leak=leak,
                ),
                sys.argv[1],
            )
    return 0


if __name__ == "__main__":
    end_process(work)
