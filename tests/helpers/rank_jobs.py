"""Compute one optimizer step's gradient, and three steps' weights, by the code of the loop: on the
ranks of a torchrun job or in this process.

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
    LoraConfig,
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
from recr1.model.lora import FrozenReference, add_adapters, is_adapter_weight
from recr1.rl.advantages import RewardParts, compute_group_advantages
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
    lora: LoraConfig | None = None


TIED = dict(tie_word_embeddings=True, num_hidden_layers=3)
LORA = LoraConfig(rank=3, alpha=6.0, targets="q_proj, v_proj, down_proj")
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
    "float64 GMPO, whole rollouts weighted by the sampler's": Case(
        dict(kind="gmpo", tis_cap=1e-5, tis_floor=1e-30, tis_level="sequence", tis_mode="mask"),
        head="recompute",
    ),
    "float64 LUSPO, off-policy mask, unbiased KL": Case(
        dict(kind="luspo", kl_coef=0.05, kl_estimator="k3_unbiased")
        | dict(off_policy_mask_threshold=6.0),
        40,
        head="recompute",
    ),
    "float64 GDPO": Case(dict(kind="gdpo", advantage_eps=0.1), same=(0, 1)),
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
    "float64 LoRA": Case(ONE, 10_000, lora=LORA),
    "float64 LoRA, small batches": Case(ONE, lora=LORA),
    "float64 LoRA, tied, checkpointing, one reduction a step": Case(
        ONE,
        40,
        lora=LORA,
        gradient_checkpointing=True,
        gradient_sync="last_micro_batch",
        shape=TIED,
    ),
    "float64 LoRA on the host": Case(ONE, lora=LORA, on_host=True, shape=dict(family="qwen3")),
    "float32": Case(ONE, dtype=torch.float32, shape=dict(tie_word_embeddings=True)),
    "float32 checkpointing": Case(
        TWO, 40, dtype=torch.float32, same=(0, 1), gradient_checkpointing=True
    ),
    "bfloat16": Case(ONE, shape=TIED, **BF16),
    "bfloat16 checkpointing": Case(ONE, 40, gradient_checkpointing=True, **BF16),
}
# Shared prompts under checkpointing, for test_ranks.py's padded reference: budgets that split a
# group of 8, and that hold several groups
PADDED_DTYPES = {"float64": torch.float64, "float32": torch.float32}
# group, budget, family, and what else the model's shape has
PADDED_GROUPS = (
    (1, 40, "qwen2", {}),
    (3, 40, "llama", TIED),
    (8, 40, "qwen3", TIED),
    (8, 200, "qwen2", {}),
)


def _list_padded_cases() -> dict[str, Case]:
    cases = {}
    for dtype_name, dtype in PADDED_DTYPES.items():
        for group, budget, family, tied in PADDED_GROUPS:
            name = f"{dtype_name}, groups of {group}, {family}, {budget} tokens"
            shape = dict(family=family, **tied)
            cases[name] = Case(
                ONE, budget, dtype, gradient_checkpointing=True, group=group, shape=shape
            )
    return cases


PADDED = _list_padded_cases()
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
    """Draw PROMPTS * group rollouts of unequal lengths; every third sibling repeats its elder;
    groups in `same` have one reward.
    """
    generator = torch.Generator().manual_seed(step)
    rollouts = []
    rewards = []
    for group_number in range(PROMPTS):
        prompt_ids = _draw_ids(1, 8, generator)
        prompt = Prompt(f"q{group_number}", group_number, "", prompt_ids)
        text = ()
        for sibling in range(group):
            repeats_elder = sibling % 3 == 2
            if not repeats_elder:
                text = _draw_ids(1, 10, generator)
            logp = (0.0,) * len(text)
            rollout = Rollout(prompt, group_number, sibling, text, logp, True)
            reward = 1.0 if group_number in same else len(text) * 0.1 + group_number
            rollouts.append(rollout)
            rewards.append(reward)
    return rollouts, rewards


def _draw_ids(low: int, high: int, generator: torch.Generator) -> tuple[int, ...]:
    """Draw low to high - 1 ids of the vocabulary."""
    length = torch.randint(low, high, (1,), generator=generator).item()
    vocab_size = tiny_config().vocab_size
    ids = torch.randint(vocab_size, (length,), generator=generator)
    return tuple(ids.tolist())


def advantages(rewards: list[float], cfg: Config, group: int, dtype: torch.dtype) -> torch.Tensor:
    """Compute the loop's. Of a group of one they would all be 0: what its reward has over 3."""
    reward_tensor = torch.tensor(rewards, dtype=dtype)
    if group == 1:
        return reward_tensor - 3
    kind = resolve_objective(cfg.loss, cfg.model).advantage
    return compute_group_advantages(
        reward_tensor, group, kind, cfg.loss, split_in_two(reward_tensor)
    )


def split_in_two(rewards: torch.Tensor) -> RewardParts:
    """Split rewards into two parts, weighted, that vary over siblings in other ways."""
    rewards = rewards.double()
    values = torch.stack([rewards, (3 * rewards).sin()], 1)
    return RewardParts(values, torch.tensor([1.0, 0.5], dtype=torch.float64))


def batch_normalized() -> list[float]:
    """Compute the advantages of two groups by their parts: with three ranks one has no group."""
    groups = dist.split_across_ranks([0, 1])
    _, rewards = rollouts_and_rewards(0)
    local_rewards = rewards[GROUP * min(groups, default=0) :][: GROUP * len(groups)]
    cfg = replace(SETTINGS, loss=LossConfig(kind="gdpo"))
    return advantages(local_rewards, cfg, GROUP, torch.float64).tolist()


def accumulate(policy, reference, step: int, same: tuple, cfg: Config, group: int = GROUP) -> float:
    """Run the loop's train phase for this rank's share of the step, without the optimizer. Returns
    this rank's part of the loss.
    """
    rollouts, rewards = rollouts_and_rewards(step, same, group)
    groups = dist.split_across_ranks(list(range(PROMPTS)))
    first_group = min(groups)
    local_rollouts = []
    local_rewards = []
    for rollout, reward in zip(rollouts, rewards):
        if rollout.group in groups:
            local_group = rollout.group - first_group
            local_rollouts.append(replace(rollout, group=local_group))
            local_rewards.append(reward)
    dtype = next(policy.parameters()).dtype
    local_advantages = advantages(local_rewards, cfg, group, dtype)
    texts, first = deduplicate(local_rollouts)

    loss = resolve_objective(cfg.loss, cfg.model)
    updates = make_updates(policy, reference, texts, local_advantages[first], cfg, loss.agg_mode)
    [(total, batches)] = updates
    sum_of_losses = 0.0
    for i, batch in enumerate(batches, 1):
        is_last = i == len(batches)
        policy.requires_gradient_sync = _needs_sync(cfg.train.gradient_sync, is_last)
        value, *_ = compute_policy_loss(policy, batch, total, cfg.sampling.temperature, loss)
        value.backward()
        sum_of_losses += value.item()
    return sum_of_losses


def _needs_sync(gradient_sync: str, is_last: bool) -> bool:
    """Tell whether the ranks reduce the gradient of this micro-batch."""
    return is_last or gradient_sync != "last_micro_batch"


def settings(case: Case) -> Config:
    return replace(
        SETTINGS,
        train=TrainConfig(tokens_per_micro_batch=case.budget, gradient_sync=case.gradient_sync),
        loss=LossConfig(**case.loss),
        model=ModelConfig(head=case.head),
        optimizer=replace(SETTINGS.optimizer, cpu_offload=case.on_host),
    )


def freeze(decoder, frozen: tuple[str, ...]):
    """Exclude the parameters that a pattern matches from training."""
    for name, parameter in decoder.named_parameters():
        is_frozen = any(fnmatchcase(name, pattern) for pattern in frozen)
        parameter.requires_grad_(not is_frozen)
    return decoder


def results(name: str, sharded: bool) -> dict[str, torch.Tensor]:
    """Train three steps of a case: {"grad NAME", "weight NAME": tensor}, the first step's gradient
    and the weights after three AdamW steps; "loss" of the first, "norm" of the last.
    """
    case = CASES[name]
    if not sharded:
        case = case._replace(on_host=False)
    cfg = settings(case)
    policy = _build_model(case, 1, case.frozen, sharded)
    reference = None
    if cfg.loss.kl_coef and case.lora and sharded:
        reference = FrozenReference(policy)
    elif cfg.loss.kl_coef and case.lora:
        reference = _build_model(case._replace(lora=None), 1, ("*",), sharded)
    elif cfg.loss.kl_coef:
        reference = _build_model(case, 2, ("*",), sharded)
    optimizer = Optimizer(policy, cfg.optimizer, 3)

    tensors = {}
    for step in range(3):
        loss = accumulate(policy, reference, step, case.same, cfg, case.group)
        if step == 0:
            for weight_name, gradient in _gather_named(policy, _get_gradient, sharded):
                tensors[f"grad {weight_name}"] = gradient.clone()
            tensors["loss"] = _sum_loss(loss)
        norm, _ = optimizer.step()
    if sharded:
        _check_unsharded(policy)
    for weight_name, weight in _gather_named(policy, _get_data, sharded):
        tensors[f"weight {weight_name}"] = weight.detach().clone()
    tensors["norm"] = torch.tensor(norm)
    return tensors


def _build_model(case: Case, seed: int, frozen: tuple[str, ...], sharded: bool):
    decoder = tiny_model(seed, **case.shape).to(case.dtype)
    if case.lora:
        frozen = tuple(decoder.state_dict())
        _add_drawn_adapters(decoder, case)
    if not sharded:
        return freeze(decoder, frozen)
    state = dict(decoder.state_dict())
    is_reference = frozen == ("*",)
    return Sharded(
        decoder,
        state.__getitem__,
        device=dist.device(),
        master=case.dtype,
        compute=case.compute or case.dtype,
        gradient_checkpointing=case.gradient_checkpointing,
        frozen=frozen,
        on_host=case.on_host and is_reference,
    )


def _add_drawn_adapters(decoder, case: Case) -> None:
    """Put adapters beside the weights; B, too, is drawn: else A has no gradient at first."""
    add_adapters(decoder, case.lora)
    generator = torch.Generator().manual_seed(3)
    for name, weight in decoder.named_parameters():
        if is_adapter_weight(name):
            weight.data = torch.randn(weight.shape, generator=generator).to(case.dtype) / 5


def _get_gradient(parameter) -> torch.Tensor | None:
    return parameter.grad


def _get_data(parameter) -> torch.Tensor:
    return parameter.data


def _gather_named(policy, get_tensor, sharded: bool):
    """Yield (name, get_tensor(parameter)) of every parameter that has one, by Hugging Face's names;
    of shards the whole, gathered from all ranks.
    """
    if not sharded:
        for name, parameter in policy.named_parameters():
            tensor = get_tensor(parameter)
            if tensor is not None:
                yield name, tensor
        return
    for unit in policy.units:
        shard = get_tensor(unit.shard)
        if shard is None:
            continue
        wait = dist.start_all_gather(shard)
        flat = wait()
        for weight in unit.flat_param.weights:
            yield weight.name, weight.view(flat)


def _sum_loss(loss: float) -> torch.Tensor:
    """Sum the ranks' parts of the loss."""
    total = dist.all_reduce_sum(loss)[0]
    return torch.tensor(total, dtype=torch.float64)


def _check_unsharded(policy: Sharded) -> None:
    """Check that what the sampler would see is what was trained."""
    with unsharded(policy):
        first_block = next(iter(policy.decoder.model.layers))
        assert not first_block.mlp.up_proj.weight.requires_grad


def fsdp2(name: str) -> dict[str, torch.Tensor]:
    """Compute the first step's gradient and loss by torch's fully_shard: per block and root, sums
    in place of its means.
    """
    case = CASES[name]
    policy = tiny_model(1, **case.shape).to(case.dtype)
    reference = tiny_model(2, **case.shape).to(case.dtype)
    freeze(policy, case.frozen)
    freeze(reference, ("*",))
    _shard_fully(policy, case)
    _shard_fully(reference, case)

    loss = accumulate(policy, reference, 0, case.same, settings(case))
    tensors = {}
    for weight_name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            tensors[f"grad {weight_name}"] = parameter.grad.full_tensor()
    tensors["loss"] = _sum_loss(loss)
    return tensors


def _shard_fully(decoder, case: Case) -> None:
    # a second, for ranks that are here for another function
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    precision = MixedPrecisionPolicy()
    if case.compute:
        precision = MixedPrecisionPolicy(param_dtype=case.compute, reduce_dtype=case.dtype)
    for module in (*decoder.model.layers, decoder):
        # the head is used after the root's forward
        fully_shard(module, reshard_after_forward=module is not decoder, mp_policy=precision)
        # gloo cannot scale
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


# seconds: wait() of a gloo work returns before its worker thread has let go of the tensors
RELEASED_WITHIN = 5.0


def released(storages: list[StorageWeakRef]) -> bool:
    """Tell whether all of them are freed, now or when gloo's workers have come to it."""
    deadline = time.monotonic() + RELEASED_WITHIN
    while not all(storage.expired() for storage in storages):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True


class _GatheredWeights:
    """Stands in for dist._all_gather and counts the gathered weights that are alive."""

    def __init__(self, all_gather, bound: int):
        self.all_gather = all_gather
        self.bound = bound
        self.alive = []  # (storage, bytes)
        self.most = 0

    def __call__(self, output, *arguments, **options):
        storage = StorageWeakRef(output.untyped_storage())
        self.alive.append((storage, output.nbytes))
        deadline = time.monotonic() + RELEASED_WITHIN
        size = self.count_bytes()
        while size > self.bound and time.monotonic() < deadline:
            # what is over it may be a finished work's that a worker is about to free
            time.sleep(0.001)
            size = self.count_bytes()
        self.most = max(self.most, size)
        return self.all_gather(output, *arguments, **options)

    def count_bytes(self) -> int:
        return sum(size for storage, size in self.alive if not storage.expired())


def gathered_bytes(name: str) -> tuple[int, int]:
    """Measure (the most bytes of gathered weights alive at one time in two steps' forward and
    backward, two largest blocks and the root).
    """
    case = CASES[name]
    cfg = replace(settings(case), loss=LossConfig(**TWO))
    policy = _build_model(case._replace(compute=None, on_host=False), 1, case.frozen, sharded=True)
    bound = _count_largest_bytes(policy)
    all_gather = dist._all_gather
    gathered = _GatheredWeights(all_gather, bound)
    dist._all_gather = gathered
    try:
        for step in range(2):
            accumulate(policy, None, step, case.same, cfg)
            storages = [storage for storage, _ in gathered.alive]
            assert released(storages), "gathered weights outlive the backward"
    finally:
        dist._all_gather = all_gather
    return gathered.most, bound


def _count_largest_bytes(policy: Sharded) -> int:
    """Count the bytes of the two largest blocks and the root."""
    blocks = policy.block_groups[1:-1]
    sizes = [_count_bytes(units) for units in blocks]
    sizes.sort()
    return sum(sizes[-2:]) + _count_bytes(policy.root_groups)


def _count_bytes(units) -> int:
    """Count the bytes of the units' weights, gathered from all ranks."""
    return sum(dist.world_size() * unit.shard.nbytes for unit in units)


# mask, budget, head, gradient_sync
LESSON_ROWS = (
    (True, 18, "fused", "every_micro_batch"),
    (False, 18, "recompute", "last_micro_batch"),
    (False, 10_000, "fused", "every_micro_batch"),
)


def _name_lessons() -> dict[str, tuple]:
    lessons = {}
    for row in LESSON_ROWS:
        mask, budget, head, gradient_sync = row
        word = "masked" if mask else "unmasked"
        lessons[f"{word}, {budget} tokens, {head}, {gradient_sync}"] = row
    return lessons


LESSONS = _name_lessons()


def lesson_texts() -> list[Rollout]:
    """Draw one text for each prompt."""
    rollouts, _ = rollouts_and_rewards(0)
    return [rollout for rollout in rollouts if rollout.sibling == 0]


def lesson(name: str) -> dict[str, torch.Tensor]:
    """Compute {"grad NAME": tensor, "loss"}: one optimizer step of SFT on this rank's share, by the
    code of its loop, in float64.
    """
    mask, budget, head, gradient_sync = LESSONS[name]
    case = Case({}, shape=dict(tie_word_embeddings=True))
    policy = _build_model(case, 1, (), sharded=True)
    texts = dist.split_across_ranks(lesson_texts())
    targets = [select_targets(text, mask) for text in texts]
    total, batches = make_update(targets, budget)
    objective = resolve_objective(CROSS_ENTROPY, ModelConfig(head=head))

    loss = 0.0
    for i, batch in enumerate(batches, 1):
        is_last = i == len(batches)
        policy.requires_gradient_sync = _needs_sync(gradient_sync, is_last)
        value, _ = compute_cross_entropy(policy, batch, total, 1.0, objective)
        value.backward()
        loss += value.item()

    tensors = {}
    for weight_name, gradient in _gather_named(policy, _get_gradient, sharded=True):
        tensors[f"grad {weight_name}"] = gradient
    tensors["loss"] = _sum_loss(loss)
    return tensors


def one_fails() -> str:
    """Return what every rank is told when the last one fails in a block of dist.fail_together."""
    try:
        with dist.fail_together():
            is_last = dist.rank() == dist.world_size() - 1
            if is_last:
                raise ConfigError("only here")
    except ConfigError as error:
        return str(error)


def a_leak() -> str:
    """Return what is said of gathered weights that somebody keeps."""
    global RELEASED_WITHIN
    keeper = []
    start_collective = dist._start_collective
    limit = RELEASED_WITHIN

    def start_and_keep(*arguments):
        wait = start_collective(*arguments)

        def wait_and_keep():
            tensor = wait()
            keeper.append(tensor)
            return tensor

        return wait_and_keep

    dist._start_collective = start_and_keep
    RELEASED_WITHIN = 0.2
    try:
        gathered_bytes(GATHERED[0])
        return "nothing"
    except AssertionError as error:
        return str(error)
    finally:
        dist._start_collective = start_collective
        RELEASED_WITHIN = limit


def work() -> int:
    """Run every case and write the file."""
    torch.set_num_threads(1)
    with process_group():
        tensors = {case: results(case, sharded=True) for case in CASES}
        tensors["lessons"] = {case: lesson(case) for case in LESSONS}
        tensors["fsdp2"] = {case: fsdp2(case) for case in AGAINST_FSDP2}
        tensors["gathered_bytes"] = {case: gathered_bytes(case) for case in GATHERED}
        tensors["leak"] = a_leak()
        tensors["batch"] = dist.gather_to_rank0(batch_normalized())
        tensors["told"] = dist.gather_to_rank0(one_fails())
        share = dist.split_across_ranks(list(range(7)))
        tensors["shares"] = dist.gather_to_rank0(share)
        if dist.rank() == 0:
            torch.save(tensors, sys.argv[1])
    return 0


if __name__ == "__main__":
    end_process(work)
