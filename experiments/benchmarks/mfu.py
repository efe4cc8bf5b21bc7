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
from recr1.data_types import Prompt, Rollout
from recr1.distributed import collectives as dist
from recr1.distributed.fsdp import Sharded
from recr1.model.decoder import Decoder
from recr1.model.rope import DecoderConfig
from recr1.rl.losses import resolve_objective
from recr1.rl.policy_loss import compute_policy_loss
from recr1.train import make_updates
from recr1.training.dry_run import read_model_shape
from recr1.training.optimizer import Optimizer

ROOT = Path(__file__).resolve().parents[2]
PEAK = 989e12


def main() -> None:
    """Measure the step and print its share of the peak."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="Qwen/Qwen2.5-1.5B-Instruct")
    parser.add_argument("--kernels", choices=("torch", "triton"), default="triton")
    for name, default in {
        "prompts": 32,
        "group": 12,
        "prompt": 256,
        "completion": 512,
        "tokens-per-micro-batch": 16384,
        "repeats": 5,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    for flag in ("checkpointing", "dry-run"):
        parser.add_argument(f"--{flag}", action="store_true")
    args = parser.parse_args()
    shape = read_model_shape(args.model, str(ROOT / "experiments/configs/any.yaml"))
    if args.dry_run:
        args.prompts = 2
        args.group = 2
        args.prompt = 8
        args.completion = 8
        args.repeats = 1
        args.kernels = "torch"
        shape = replace(
            shape,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            vocab_size=512,
        )
    elif not torch.cuda.is_available():
        parser.error("no GPU here; --dry-run shows that the bench works")
    seconds, peak, batches = measure_step(shape, args)
    useful, again = count_flops(shape, args)
    mfu = useful / seconds / PEAK
    hfu = (useful + again * args.checkpointing) / seconds / PEAK
    rows = sum(len(b.tokens) for b in batches)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(
        f"{name}, {args.model}{' in small' if args.dry_run else ''}: "
        f"{args.prompts} x {args.group} rollouts of {args.prompt} + {args.completion}, "
        f"{rows:,} tokens computed in "
        f"{len(batches)} micro-batches, checkpointing {args.checkpointing}, kernels {args.kernels}"
    )
    print(
        f"{seconds:.3f} s per step, {useful / seconds / 1e12:.1f} TF/s, MFU {mfu:.3f}, "
        f"HFU {hfu:.3f}, peak {peak / 2**30:.2f} GiB"
    )
    print(
        json.dumps(
            {
                "bars": [
                    dict(
                        name=f"MFU of the training part, {args.model}, {name}",
                        value=mfu,
                        bar=0.40,
                        ok=mfu >= 0.40,
                    )
                ]
            }
        )
    )


def measure_step(shape: DecoderConfig, args) -> tuple[float, int, list]:
    """Return the median seconds of a step, the peak bytes, and the micro-batches."""
    device = dist.device()
    with torch.device("meta"):
        decoder = Decoder(shape)
    sizes = {n: p.shape for n, p in decoder.named_parameters()}
    g = torch.Generator(device).manual_seed(0)

    def read(name: str) -> torch.Tensor:
        return (
            torch.ones(sizes[name], device=device)
            if len(sizes[name]) == 1
            else torch.empty(sizes[name], device=device).normal_(std=0.02, generator=g)
        )

    policy = Sharded(
        decoder, read, device=device, compute=torch.bfloat16, checkpointing=args.checkpointing
    )
    cfg = Config(
        sampling=SamplingConfig(group_size=args.group, max_new_tokens=args.completion),
        train=TrainConfig(tokens_per_micro_batch=args.tokens_per_micro_batch),
    )
    cfg = replace(cfg, model=replace(cfg.model, kernels=args.kernels))
    loss = resolve_objective(cfg.loss, cfg.model)
    optimizer = Optimizer(policy, cfg.optimizer, 10**6)
    texts = make_rollouts(shape.vocab_size, args)
    adv = torch.tensor([1.0, -1.0]).repeat(len(texts))[: len(texts)]
    seconds = []
    for _ in range(1 + args.repeats):
        synchronize()
        began = time.perf_counter()
        [(total, batches)] = make_updates(policy, None, texts, adv, cfg, loss.agg_mode)
        for batch in batches:
            compute_policy_loss(policy, batch, total, 1.0, loss)[0].backward()
        optimizer.step()
        synchronize()
        seconds.append(time.perf_counter() - began)
    return (
        float(torch.tensor(seconds[1:]).median()),
        torch.cuda.max_memory_allocated() if device.type == "cuda" else 0,
        batches,
    )


def make_rollouts(vocabulary: int, args) -> list[Rollout]:
    """Make rollouts of random tokens, all different."""
    g = torch.Generator().manual_seed(0)

    def ids(n):
        return tuple(torch.randint(vocabulary, (n,), generator=g).tolist())

    prompts = [Prompt(str(p), p, "", ids(args.prompt)) for p in range(args.prompts)]
    uniform = (-float(torch.tensor(vocabulary).log()),) * args.completion
    return [
        Rollout(prompt, p, s, ids(args.completion), uniform, True)
        for p, prompt in enumerate(prompts)
        for s in range(args.group)
    ]


def count_flops(c: DecoderConfig, args) -> tuple[float, float]:
    """Return (FLOP of forward and backward, FLOP of computing the blocks' forward once more)."""
    heads = c.num_attention_heads * c.head_dim
    kv = c.num_key_value_heads * c.head_dim
    block = c.hidden_size * (2 * heads + 2 * kv + 3 * c.intermediate_size)  # weights in products
    own = args.completion - 1  # a text's last token predicts nothing
    rows = args.prompts * (args.prompt + args.group * own)
    trained = args.prompts * args.group * args.completion
    pairs = args.prompts * (
        args.prompt * (args.prompt + 1) / 2 + args.group * (own * args.prompt + own * (own + 1) / 2)
    )
    forward = c.num_hidden_layers * (2 * block * rows + 4 * heads * pairs)
    return 3 * (forward + 2 * c.hidden_size * c.vocab_size * trained), forward


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
