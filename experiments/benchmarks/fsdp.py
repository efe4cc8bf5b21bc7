"""Compare our sharding with torch's fully_shard: time, memory and traffic of a training step.

Both have the same model, precision, batch and ranks.

python experiments/benchmarks/fsdp.py [--ranks 2] [--pairs 10] [--layers 12 --width 512 --vocabulary
8192] [--rows 8 --length 128] [--compute float32]

Starts `ranks` processes of one thread (gloo), or one per GPU (nccl). In each, both models live side
by side and take their steps in turn; a step is forward, backward, clipping and fused AdamW, on
cross-entropy of a batch of rows x length tokens per rank, with and without activation
checkpointing. fully_shard has one group per block and one for the root; its checkpointing is
torch's wrapper inside. Peak: bytes that the allocator holds above the step's start, from the
profiler's memory events (CUDA: the allocator's own count). Resident memory is each side's alone, of
three steps in processes of its own. Needs a quiet machine.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as td
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.profiler import ProfilerActivity, profile

from recr1.config.schema import OptimizerConfig
from recr1.data_types import MicroBatch, Prompt, Rollout
from recr1.distributed import collectives as dist
from recr1.distributed.fsdp import Sharded
from recr1.distributed.process_group import process_group
from recr1.model.decoder import Decoder
from recr1.model.log_probs import compute_log_probs
from recr1.model.rope import DecoderConfig
from recr1.rl.packing import pack_rollouts
from recr1.training.optimizer import Optimizer

ROOT = str(Path(__file__).resolve().parents[2])
ALONE = ("ours", "fully_shard", "ours+checkpointing", "fully_shard+checkpointing")
SETTINGS = OptimizerConfig(lr=1e-3, max_grad_norm=1.0)


def main() -> None:
    """Start the ranks, or be one of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in dict(
        ranks=2, pairs=10, layers=12, width=512, vocabulary=8192, rows=8, length=128
    ).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--compute", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--resident",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="resident memory of each side, alone",
    )
    parser.add_argument("--alone", choices=ALONE, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if "RANK" not in os.environ:
        for alone in [["--alone", choice] for choice in ALONE if args.resident] + [[]]:
            done = subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "torch.distributed.run",
                    "--standalone",
                    "--nproc-per-node",
                    str(args.ranks),
                    *sys.argv,
                    *alone,
                ],
                env=os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=ROOT),
            )
            if done.returncode:
                sys.exit(done.returncode)
        return
    torch.set_num_threads(1)
    with process_group():
        if args.alone:
            return measure_resident(args, *args.alone.split("+"))
        bars = [
            bar for checkpointing in (False, True) for bar in compare_sides(args, checkpointing)
        ]
        if dist.rank() == 0:
            print(json.dumps({"bars": bars}))


def measure_resident(args, side: str, *checkpointing: str) -> None:
    """Return the resident memory."""
    step = SIDES[side](args, bool(checkpointing))
    for i in range(3):
        step(make_batch(args, i))
    most = dist.all_reduce_max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    if dist.rank() == 0:
        print(f"{args.alone:<27} resident {most / 1024:,.0f} MiB, the larger rank, 3 steps")


def compare_sides(args, checkpointing: bool) -> list[dict]:
    """Take steps of both sides in turn and print the figures."""
    sides = {name: make(args, checkpointing) for name, make in SIDES.items()}
    batches = [make_batch(args, step) for step in range(3)]
    seconds = {name: [] for name in sides}
    losses = {name: [] for name in sides}
    for step in range(2 + args.pairs):
        for name in sorted(sides, reverse=step % 2 == 1):
            td.barrier()
            began = time.perf_counter()
            losses[name].append(dist.all_reduce_sum(float(sides[name](batches[step % 3])))[0])
            synchronize()
            if step >= 2:  # the first two warm up
                seconds[name].append(time.perf_counter() - began)
    figures = {name: measure_step(side, batches[0]) for name, side in sides.items()}
    n = sum(p.numel() for p in Decoder(make_shape(args)).parameters())
    world = dist.world_size()
    pairs = sorted(a / b for a, b in zip(seconds["ours"], seconds["fully_shard"]))
    time_ratio = (
        torch.tensor(seconds["ours"]).median().item()
        / torch.tensor(seconds["fully_shard"]).median().item()
    )
    peak_ratio = dist.all_reduce_max(figures["ours"]["peak"]) / dist.all_reduce_max(
        figures["fully_shard"]["peak"]
    )
    difference = max(abs(a - b) / abs(b) for a, b in zip(losses["ours"], losses["fully_shard"]))
    title = "with checkpointing" if checkpointing else "without checkpointing"
    if dist.rank() == 0:
        print(
            f"\n{title}: {world} ranks x {torch.get_num_threads()} threads, {dist.device().type}, "
            f"{n / 1e6:.1f} M parameters, {args.rows} x {args.length} tokens per rank, "
            f"{args.compute}, {args.pairs} pairs"
        )
        for name in sides:
            f = figures[name]
            median = torch.tensor(seconds[name]).median().item()
            print(
                f"  {name:<12} {median:.3f} s/step (fastest {min(seconds[name]):.3f})   peak "
                f"above step start {f['peak'] / 2**20:,.0f} MiB   "
                f"state {f['state'] / 2**20:,.1f} MiB + gradient {f['gradient'] / 2**20:,.1f} MiB "
                f"per rank   moved {f['moved'] / 2**20:,.0f} MiB per rank and step"
            )
        print(
            f"  time ours / fully_shard {time_ratio:.3f} (pairs {pairs[0]:.3f} to "
            f"{pairs[-1]:.3f})   peak {peak_ratio:.3f}   losses differ by at most {difference:.1e}"
        )
    mine = figures["ours"]["state"] + figures["ours"]["gradient"]
    return [
        make_bar(f"step time over fully_shard, {title}", time_ratio, 1.03),
        make_bar(f"peak over fully_shard, {title}", peak_ratio, 1.0),
        make_bar(f"state bytes per rank over 16 N / W, {title}", mine / (16 * n / world), 1.02),
        make_bar(f"losses differ (relative), {title}", difference, 1e-5),
    ]


def make_bar(name: str, value: float, most: float) -> dict:
    """Return a bar for the line of JSON."""
    return dict(name=name, value=value, bar=most, ok=value <= most)


def make_shape(args) -> DecoderConfig:
    """Return the model's shape."""
    heads = args.width // 64
    return DecoderConfig(
        family="llama",
        vocab_size=args.vocabulary,
        hidden_size=args.width,
        intermediate_size=args.width * 5 // 2,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=64,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        rope_scaling=None,
        tie_word_embeddings=True,
        max_position_embeddings=args.length,
    )


def make_decoder(args) -> Decoder:
    """Return the model with seeded weights."""
    torch.manual_seed(0)
    model = Decoder(make_shape(args))
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.02)
    return model


def make_batch(args, step: int) -> MicroBatch:
    """Make `rows` texts of a prompt of one token and `length` targets; each rank has its own."""
    g = torch.Generator().manual_seed(1000 * step + dist.rank())
    rollouts = []
    for row in range(args.rows):
        first, *ids = torch.randint(args.vocabulary, (args.length + 1,), generator=g).tolist()
        rollouts.append(
            Rollout(
                Prompt(str(row), row, "", (first,)), row, 0, tuple(ids), (0.0,) * args.length, True
            )
        )
    [made] = pack_rollouts(rollouts, args.rows * args.length, dist.device())
    return made


def compute_loss(model, batch: MicroBatch) -> torch.Tensor:
    """Return the mean cross-entropy of a batch."""
    logp, _ = compute_log_probs(model, batch, temperature=1.0)
    return -logp.sum() / (len(batch.target) * dist.world_size())


def make_our_step(args, checkpointing: bool):
    """Return a function batch -> loss that takes a step.

    `.state` and `.gradient` list its tensors.
    """
    state = dict(make_decoder(args).state_dict())
    model = Sharded(
        make_decoder(args),
        state.__getitem__,
        device=dist.device(),
        compute=getattr(torch, args.compute),
        checkpointing=checkpointing,
    )
    optimizer = Optimizer(model, SETTINGS, 10**9)

    def step(batch: MicroBatch) -> torch.Tensor:
        loss = compute_loss(model, batch)
        loss.backward()
        step.gradient = sum(p.grad.nbytes for p in model.parameters())
        optimizer.step()
        return loss.detach()

    step.state = lambda: (
        sum(p.nbytes for p in model.parameters())
        + sum(
            t.nbytes
            for _, part in optimizer.optimizers
            for s in part.state.values()
            for t in s.values()
            if t.numel() > 1
        )
    )
    return step


def make_their_step(args, checkpointing: bool):
    """Return the same for torch's fully_shard."""
    model = make_decoder(args).to(dist.device())
    mixed = (
        MixedPrecisionPolicy(param_dtype=getattr(torch, args.compute), reduce_dtype=torch.float32)
        if args.compute != "float32"
        else MixedPrecisionPolicy()
    )
    layers = model.model.layers
    for i in range(len(layers)):
        if checkpointing:
            layers[i] = checkpoint_wrapper(layers[i], preserve_rng_state=False)
        fully_shard(layers[i], mp_policy=mixed)
    # the head is used after the root's forward
    fully_shard(model, reshard_after_forward=False, mp_policy=mixed)
    for module in (*layers, model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(
        params,
        lr=SETTINGS.lr,
        betas=SETTINGS.betas,
        eps=SETTINGS.eps,
        weight_decay=SETTINGS.weight_decay,
        fused=True,
    )

    def step(batch: MicroBatch) -> torch.Tensor:
        loss = compute_loss(model, batch)
        loss.backward()
        step.gradient = sum(p.grad.to_local().nbytes for p in params)
        torch.nn.utils.clip_grad_norm_(params, SETTINGS.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    step.state = lambda: (
        sum(p.to_local().nbytes for p in params)
        + sum(
            t.to_local().nbytes
            for s in optimizer.state.values()
            for t in s.values()
            if t.numel() > 1
        )
    )
    return step


SIDES = {"ours": make_our_step, "fully_shard": make_their_step}


def measure_step(step, batch: MicroBatch) -> dict[str, int]:
    """Return a step's peak above its start, state, gradient and traffic.

    The traffic is the bytes that this rank receives in all-gathers and gives into reduce-scatters.
    """
    moved = 0

    def counting(collective, argument):
        def call(*args, **kwargs):
            nonlocal moved
            values = [*args, *kwargs.values()]
            moved += values[argument].nbytes * (dist.world_size() - 1) // dist.world_size()
            return collective(*args, **kwargs)

        return call

    names = [
        (td, n, i)
        for n, i in (
            ("all_gather_single", 0),
            ("all_gather_into_tensor", 0),
            ("reduce_scatter_single", 1),
            ("reduce_scatter_tensor", 1),
        )
        if hasattr(td, n)
    ]
    names += [(dist, "_all_gather", 0), (dist, "_reduce_scatter", 1)]
    kept = [getattr(module, name) for module, name, _ in names]
    for (module, name, argument), collective in zip(names, kept):
        setattr(module, name, counting(collective, argument))
    step(batch)
    for (module, name, _), collective in zip(names, kept):
        setattr(module, name, collective)
    synchronize()
    if dist.device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        step(batch)
        peak = torch.cuda.max_memory_allocated() - start
    else:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            step(batch)
        events = sorted(
            (e.start_ns(), e.nbytes())
            for e in profiler.profiler.kineto_results.events()
            if e.name() == "[memory]"
        )
        held = peak = 0
        for _, size in events:
            held += size
            peak = max(peak, held)
    return dict(peak=peak, moved=moved, state=step.state(), gradient=step.gradient)


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if dist.device().type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # threads that the profiler leaves at times abort an interpreter that ends in order
