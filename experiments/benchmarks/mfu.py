"""Measure the share of a GPU's peak that the training part of a step reaches.

python experiments/benchmarks/mfu.py
[--model Qwen/Qwen2.5-1.5B-Instruct] [--checkpointing]

One process. Random weights in the model's shape, bf16 compute, float32 masters and AdamW; 32
prompts x 12 rollouts, 256 + 512 tokens, all different. A step is what train.py does after sampling:
pack, forward, fused head and loss, backward, clip, AdamW. Median of 5 after one to warm up.

MFU: 6 FLOP per weight and token computed (a prompt once for its group; the head on trained tokens
only; the embedding none) and 12 H D per layer and pair of query and key that is read, over time x
peak. Recomputation is not counted; in HFU it is. Peak: 989 TF/s, dense bf16 of H100 and H200.
`--dry-run`: a tiny shape on whatever is here; it shows that the bench works, its figures mean
nothing.

EXPECTED, arithmetic and not measured: 384 x 768 tokens of 1.5B are 2.65e15 FLOP by 6 N for each; at
40% MFU 6.7 s with every prompt computed 12 times.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch

from recr1.config.schema import Config, SamplingConfig, TrainConfig
from recr1.data_types import MicroBatch, Prompt, Rollout
from recr1.distributed import collectives as dist
from recr1.distributed.fsdp import Sharded
from recr1.model.decoder import Decoder
from recr1.model.rope import DecoderConfig
from recr1.rl.losses import resolve_objective
from recr1.rl.policy_loss import compute_policy_loss
from recr1.train import make_updates
from recr1.training.dry_run import read_model_shape
from recr1.training.load_model import choose_model_backend
from recr1.training.optimizer import Optimizer

ROOT = Path(__file__).resolve().parents[2]
PEAK = 989e12
BAR = 0.40
SIZES = {
    "prompts": 32,
    "group": 12,
    "prompt": 256,
    "completion": 512,
    "tokens-per-micro-batch": 16384,
    "repeats": 5,
}
DRY_SIZES = dict(prompts=2, group=2, prompt=8, completion=8, repeats=1, kernels="torch")
DRY_SHAPE = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    vocab_size=512,
)


def parse_arguments() -> argparse.Namespace:
    """Read the command line; a dry run has sizes of its own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="Qwen/Qwen2.5-1.5B-Instruct")
    parser.add_argument("--kernels", choices=("torch", "triton"), default="triton")
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if args.dry_run:
        vars(args).update(DRY_SIZES)
    elif not torch.cuda.is_available():
        parser.error("no GPU here; --dry-run shows that the bench works")
    return args


def main() -> None:
    """Measure the step and print its share of the peak."""
    args = parse_arguments()
    shape = read_model_shape(args.model, str(ROOT / "experiments/configs/any.yaml"))
    if args.dry_run:
        shape = replace(shape, **DRY_SHAPE)
    device_name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    policy = make_policy(shape, dist.device(), args.checkpointing, args.kernels)
    seconds, peak, batches = measure_step(policy, args)
    print_setting(device_name, policy, batches, args)

    useful, recomputed = count_flops(shape, args)
    executed = useful
    if args.checkpointing:
        executed += recomputed
    speed = useful / seconds
    mfu = speed / PEAK
    hfu = executed / seconds / PEAK
    print(
        f"{seconds:.3f} s per step, {speed / 1e12:.1f} TF/s, MFU {mfu:.3f}, "
        f"HFU {hfu:.3f}, peak {peak / 2**30:.2f} GiB"
    )
    name = f"MFU of the training part, {args.model}, {device_name}"
    bar = dict(name=name, value=mfu, bar=BAR, ok=mfu >= BAR)
    print(json.dumps({"bars": [bar]}))


def print_setting(
    device_name: str, policy: Sharded, batches: list[MicroBatch], args: argparse.Namespace
) -> None:
    """Print what was run."""
    rows = sum(len(batch.tokens) for batch in batches)
    size = " in small" if args.dry_run else ""
    print(
        f"{device_name}, {args.model}{size}: "
        f"{args.prompts} x {args.group} rollouts of {args.prompt} + {args.completion}, "
        f"{rows:,} tokens computed in "
        f"{len(batches)} micro-batches, attention {policy.backend}, "
        f"checkpointing {args.checkpointing}, kernels {args.kernels}"
    )


def measure_step(policy: Sharded, args: argparse.Namespace) -> tuple[float, int, list[MicroBatch]]:
    """Return the median seconds of a step, the peak bytes, and the micro-batches."""
    cfg = Config(
        sampling=SamplingConfig(group_size=args.group, max_new_tokens=args.completion),
        train=TrainConfig(tokens_per_micro_batch=args.tokens_per_micro_batch),
    )
    cfg = replace(cfg, model=replace(cfg.model, kernels=args.kernels))
    loss = resolve_objective(cfg.loss, cfg.model)
    optimizer = Optimizer(policy, cfg.optimizer, 10**6)
    rollouts = make_rollouts(policy.config.vocab_size, args)
    advantages = torch.tensor([1.0, -1.0]).repeat(len(rollouts))[: len(rollouts)]

    seconds = []
    for _ in range(1 + args.repeats):
        synchronize()
        began = time.perf_counter()
        [(total, batches)] = make_updates(policy, None, rollouts, advantages, cfg, loss.agg_mode)
        for batch in batches:
            compute_policy_loss(policy, batch, total, 1.0, loss)[0].backward()
        optimizer.step()
        synchronize()
        seconds.append(time.perf_counter() - began)
    median = float(torch.tensor(seconds[1:]).median())
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return median, peak, batches


def make_policy(
    shape: DecoderConfig, device: torch.device, checkpointing: bool, kernels: str
) -> Sharded:
    """Return a model with random weights, whose attention and kernels are what a run would take."""
    with torch.device("meta"):
        decoder = Decoder(shape)
    decoder.set_backend(choose_model_backend(shape, "auto", torch.bfloat16, device, kernels))
    sizes = {name: parameter.shape for name, parameter in decoder.named_parameters()}
    generator = torch.Generator(device).manual_seed(0)

    def draw_weight(name: str) -> torch.Tensor:
        size = sizes[name]
        if len(size) == 1:
            return torch.ones(size, device=device)
        return torch.empty(size, device=device).normal_(std=0.02, generator=generator)

    return Sharded(
        decoder,
        draw_weight,
        device=device,
        compute=torch.bfloat16,
        gradient_checkpointing=checkpointing,
    )


def make_rollouts(vocabulary: int, args: argparse.Namespace) -> list[Rollout]:
    """Make rollouts of random tokens, all different."""
    generator = torch.Generator().manual_seed(0)

    def draw_ids(count: int) -> tuple[int, ...]:
        ids = torch.randint(vocabulary, (count,), generator=generator)
        return tuple(ids.tolist())

    prompts = []
    for row in range(args.prompts):
        prompts.append(Prompt(str(row), row, "", draw_ids(args.prompt)))
    uniform = -float(torch.tensor(vocabulary).log())
    logp = (uniform,) * args.completion
    rollouts = []
    for row, prompt in enumerate(prompts):
        for sibling in range(args.group):
            ids = draw_ids(args.completion)
            rollout = Rollout(prompt, row, sibling, ids, logp, True)
            rollouts.append(rollout)
    return rollouts


def count_flops(c: DecoderConfig, args: argparse.Namespace) -> tuple[float, float]:
    """Return (FLOP of forward and backward, FLOP of computing the blocks' forward once more)."""
    heads = c.num_attention_heads * c.head_dim
    kv = c.num_key_value_heads * c.head_dim
    block = c.hidden_size * (2 * heads + 2 * kv + 3 * c.intermediate_size)  # weights in products
    completion = args.completion - 1  # a text's last token predicts nothing
    rows = args.prompts * (args.prompt + args.group * completion)
    trained = args.prompts * args.group * args.completion

    # pairs of query and key
    within_prompt = args.prompt * (args.prompt + 1) / 2
    within_completion = completion * (completion + 1) / 2
    from_completion = completion * args.prompt + within_completion
    pairs = args.prompts * (within_prompt + args.group * from_completion)

    forward = c.num_hidden_layers * (2 * block * rows + 4 * heads * pairs)
    head = 2 * c.hidden_size * c.vocab_size * trained
    return 3 * (forward + head), forward


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
