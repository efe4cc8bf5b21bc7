"""Pinned memory in slabs, ranks in step while a model is saved, and one rank's gradients: the GPU's
part of it with stand-ins that note in which order they are called.
"""

import random

import pytest
import torch
from helpers.tiny_world import tiny_model
from safetensors.torch import load_file, save_file

from recr1.distributed import cpu_offload, fsdp
from recr1.distributed.cpu_offload import SLAB_BYTES, make_host_zeros, plan_slabs
from recr1.distributed.fsdp import Sharded

CPU = torch.device("cpu")

# Qwen2.5-3B, from its config.json: the root, and each of 36 blocks
ROOT_WEIGHTS = 151_936 * 2048 + 2048
BLOCK_WEIGHTS = (3_085_938_688 - ROOT_WEIGHTS) // 36


def round_up_to_power_of_two(n: int) -> int:
    """As torch's CachingHostAllocator does with what it is asked for."""
    power = 1
    while power < n:
        power *= 2
    return power


def list_moment_sizes(number_bytes: int, per_weight: int) -> list[int]:
    sizes = []
    for weights in (ROOT_WEIGHTS, *[BLOCK_WEIGHTS] * 36):
        sizes += [number_bytes * weights] * per_weight
    return sizes


# bytes of a number, tensors of each group; AdamW's moments, and a reference in bfloat16
@pytest.mark.parametrize("number_bytes, per_weight", [(4, 2), (2, 1)])
def test_a_3b_takes_a_tenth_more_than_it_needs_at_most(number_bytes, per_weight):
    sizes = list_moment_sizes(number_bytes, per_weight)
    one_by_one = sum(map(round_up_to_power_of_two, sizes))

    slabs = plan_slabs(sizes)

    taken = sum(round_up_to_power_of_two(slab.num_bytes) for slab in slabs)
    assert one_by_one > 1.7 * sum(sizes)
    assert taken < 1.1 * sum(sizes)


@pytest.mark.parametrize("seed", range(20))
def test_tensors_share_slabs_and_no_byte(seed):
    rng = random.Random(seed)
    largest = rng.choice([100, 10**6, SLAB_BYTES, 3 * SLAB_BYTES])
    sizes = [rng.randrange(1, largest) for _ in range(rng.randrange(1, 60))]

    slabs = plan_slabs(sizes)

    placed = []
    for slab in slabs:
        assert slab.num_bytes == round_up_to_power_of_two(slab.num_bytes)
        end_of_last = 0
        for index, start in sorted(slab.starts.items(), key=lambda item: item[1]):
            assert start >= end_of_last
            assert start % cpu_offload.SLAB_ALIGNMENT == 0
            end_of_last = start + sizes[index]
            placed.append(index)
        assert end_of_last <= slab.num_bytes
    assert sorted(placed) == list(range(len(sizes)))


def test_views_of_a_slab_are_tensors_like_others(tmp_path, monkeypatch):
    """With memory that is not pinned in the place of pinned memory."""
    taken = []

    def take(num_bytes):
        taken.append(num_bytes)
        return torch.zeros(num_bytes, dtype=torch.uint8)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cpu_offload, "pinned_zeros", take)
    shapes = [torch.Size(shape) for shape in ([3], [5, 7], [1000], [2])]

    tensors = make_host_zeros(shapes, torch.float32)

    assert len(taken) == 1
    assert [tensor.shape for tensor in tensors] == shapes
    assert not any(tensor.any() for tensor in tensors)
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    by_name = {str(number): tensor for number, tensor in enumerate(tensors)}
    save_file(by_name, tmp_path / "saved.safetensors")
    saved = load_file(tmp_path / "saved.safetensors")
    for number, shape in enumerate(shapes):
        assert torch.equal(saved[str(number)], torch.full(shape, float(number)))


def shard_tiny_model(**options) -> Sharded:
    model = tiny_model()
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    return Sharded(model, weights.__getitem__, device=CPU, **options)


def test_a_gpu_has_gathered_a_group_before_the_next_gather_starts(monkeypatch):
    """nccl's wait does not hold the host: only the stream's synchronize does."""
    policy = shard_tiny_model()
    calls = []

    class Stream:
        def synchronize(self):
            calls.append("synchronize")

    def start(shard, dtype, device):
        calls.append("start")

        def wait():
            calls.append("wait")
            return shard

        return wait

    monkeypatch.setattr(cpu_offload, "start_all_gather_from_host", start)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    for group in policy.units:
        group.device = torch.device("cuda", 0)

    for name, _ in policy.tensors():
        calls.append(name)

    expected = []
    for group in policy.units:
        names = [weight.name for weight in group.flat_param.weights]
        expected += ["start", "wait", "synchronize", *names]
    assert calls == expected


def test_one_rank_adds_to_the_gradient_that_it_has(monkeypatch):
    """The second backward allocates no vector of a group's size, and the sum has the same bits as
    two gradients that are made apart and added.
    """
    policy = shard_tiny_model()

    def backward(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        loss = torch.zeros(())
        for group in policy.units:
            for view in fsdp._AllGather.apply(group.shard, group):
                loss = loss + (view * torch.randn(view.shape, generator=generator)).sum()
        loss.backward()

    apart = []
    for seed in (0, 1):
        backward(seed)
        apart.append([group.shard.grad for group in policy.units])
        for group in policy.units:
            group.shard.grad = None

    backward(0)
    grads = [group.shard.grad for group in policy.units]
    sizes = []
    zeros = torch.zeros

    def make_and_record(*size, **options):
        sizes.append(size)
        return zeros(*size, **options)

    monkeypatch.setattr(torch, "zeros", make_and_record)
    backward(1)

    assert not {(group.flat_param.shard_size,) for group in policy.units} & set(sizes)
    for group, grad, first, second in zip(policy.units, grads, *apart):
        assert group.shard.grad is grad
        assert torch.equal(group.shard.grad, first + second)
