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
from torch.distributed.tensor import DTensor
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
SIZES = dict(ranks=2, pairs=10, layers=12, width=512, vocabulary=8192, rows=8, length=128)
WARM = 2  # steps before the first that counts
# which argument of a collective this rank receives, or gives: torch's names change by version
TORCH_COLLECTIVES = {
    "all_gather_single": 0,
    "all_gather_into_tensor": 0,
    "reduce_scatter_single": 1,
    "reduce_scatter_tensor": 1,
}
OUR_COLLECTIVES = {"_all_gather": 0, "_reduce_scatter": 1}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--compute", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--resident",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="resident memory of each side, alone",
    )
    parser.add_argument("--alone", choices=ALONE, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Start the ranks, or be one of them."""
    args = parse_arguments()
    if "RANK" not in os.environ:
        if args.resident:
            for choice in ALONE:
                launch_ranks(args, "--alone", choice)
        launch_ranks(args)
        return

    torch.set_num_threads(1)
    with process_group():
        if args.alone:
            side, *checkpointing = args.alone.split("+")
            measure_resident(args, side, bool(checkpointing))
            return
        bars = compare_sides(args, checkpointing=False)
        bars += compare_sides(args, checkpointing=True)
        if dist.rank() == 0:
            print(json.dumps({"bars": bars}))


def launch_ranks(args: argparse.Namespace, *extra: str) -> None:
    """Run this script on all ranks; end with their status when they fail."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(args.ranks),
        *sys.argv,
        *extra,
    ]
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=ROOT)
    result = subprocess.run(command, env=env)
    if result.returncode:
        sys.exit(result.returncode)


def measure_resident(args: argparse.Namespace, side: str, checkpointing: bool) -> None:
    """Print the resident memory of one side."""
    make_step = SIDES[side]
    step = make_step(args, checkpointing)
    for number in range(3):
        batch = make_batch(args, number)
        step(batch)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    kib = dist.all_reduce_max(usage.ru_maxrss)
    if dist.rank() == 0:
        print(f"{args.alone:<27} resident {kib / 1024:,.0f} MiB, the larger rank, 3 steps")


def compare_sides(args: argparse.Namespace, checkpointing: bool) -> list[dict]:
    """Take steps of both sides in turn, print the figures and return the bars."""
    steps = {}
    for name, make_step in SIDES.items():
        steps[name] = make_step(args, checkpointing)
    batches = [make_batch(args, number) for number in range(3)]
    seconds, losses = time_steps(steps, batches, args.pairs)
    figures = {}
    for name, step in steps.items():
        figures[name] = measure_step(step, batches[0])

    time_ratio = compute_median(seconds["ours"]) / compute_median(seconds["fully_shard"])
    our_peak = dist.all_reduce_max(figures["ours"]["peak"])
    their_peak = dist.all_reduce_max(figures["fully_shard"]["peak"])
    peak_ratio = our_peak / their_peak
    difference = compute_difference(losses["ours"], losses["fully_shard"])
    title = "with checkpointing" if checkpointing else "without checkpointing"
    size = count_parameters(args)
    if dist.rank() == 0:
        print_setting(title, size, args)
        for name in steps:
            print_side(name, figures[name], seconds[name])
        print_ratios(seconds, time_ratio, peak_ratio, difference)

    state = figures["ours"]["state"] + figures["ours"]["gradient"]
    least_state = 16 * size / dist.world_size()
    return [
        make_bar(f"step time over fully_shard, {title}", time_ratio, 1.03),
        make_bar(f"peak over fully_shard, {title}", peak_ratio, 1.0),
        make_bar(f"state bytes per rank over 16 N / W, {title}", state / least_state, 1.02),
        make_bar(f"losses differ (relative), {title}", difference, 1e-5),
    ]


def time_steps(
    steps: dict, batches: list[MicroBatch], pairs: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Take the steps in turn; return the seconds and the losses of each side."""
    seconds = {name: [] for name in steps}
    losses = {name: [] for name in steps}
    for number in range(WARM + pairs):
        for name in sorted(steps, reverse=number % 2 == 1):
            td.barrier()
            began = time.perf_counter()
            loss = float(steps[name](batches[number % 3]))
            total_loss, *_ = dist.all_reduce_sum(loss)
            losses[name].append(total_loss)
            synchronize()
            if number >= WARM:
                seconds[name].append(time.perf_counter() - began)
    return seconds, losses


def compute_median(values: list[float]) -> float:
    """Return the median; of an even number of values the lower one of the middle."""
    return torch.tensor(values).median().item()


def compute_difference(ours: list[float], theirs: list[float]) -> float:
    """Return the largest relative difference of the losses."""
    differences = []
    for our_loss, their_loss in zip(ours, theirs):
        differences.append(abs(our_loss - their_loss) / abs(their_loss))
    return max(differences)


def count_parameters(args: argparse.Namespace) -> int:
    """Return the number of the model's parameters."""
    model = Decoder(make_shape(args))
    return sum(parameter.numel() for parameter in model.parameters())


def print_setting(title: str, size: int, args: argparse.Namespace) -> None:
    """Print what was run."""
    ranks = dist.world_size()
    threads = torch.get_num_threads()
    device = dist.device().type
    print(
        f"\n{title}: {ranks} ranks x {threads} threads, {device}, "
        f"{size / 1e6:.1f} M parameters, {args.rows} x {args.length} tokens per rank, "
        f"{args.compute}, {args.pairs} pairs"
    )


def print_side(name: str, figures: dict[str, int], seconds: list[float]) -> None:
    """Print a side's figures."""
    median = compute_median(seconds)
    fastest = min(seconds)
    peak = figures["peak"] / 2**20
    state = figures["state"] / 2**20
    gradient = figures["gradient"] / 2**20
    moved = figures["moved"] / 2**20
    print(
        f"  {name:<12} {median:.3f} s/step (fastest {fastest:.3f})   peak "
        f"above step start {peak:,.0f} MiB   "
        f"state {state:,.1f} MiB + gradient {gradient:,.1f} MiB "
        f"per rank   moved {moved:,.0f} MiB per rank and step"
    )


def print_ratios(
    seconds: dict[str, list[float]], time_ratio: float, peak_ratio: float, difference: float
) -> None:
    """Print the comparison of the two sides."""
    ratios = []
    for ours, theirs in zip(seconds["ours"], seconds["fully_shard"]):
        ratios.append(ours / theirs)
    low = min(ratios)
    high = max(ratios)
    print(
        f"  time ours / fully_shard {time_ratio:.3f} (pairs {low:.3f} to "
        f"{high:.3f})   peak {peak_ratio:.3f}   losses differ by at most {difference:.1e}"
    )


def make_bar(name: str, value: float, most: float) -> dict:
    """Return a bar for the line of JSON."""
    return dict(name=name, value=value, bar=most, ok=value <= most)


def make_shape(args: argparse.Namespace) -> DecoderConfig:
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


def make_decoder(args: argparse.Namespace) -> Decoder:
    """Return the model with seeded weights."""
    torch.manual_seed(0)
    model = Decoder(make_shape(args))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def make_batch(args: argparse.Namespace, step: int) -> MicroBatch:
    """Make `rows` texts of a prompt of one token and `length` targets; each rank has its own."""
    generator = torch.Generator().manual_seed(1000 * step + dist.rank())
    logp = (0.0,) * args.length
    rollouts = []
    for row in range(args.rows):
        tokens = torch.randint(args.vocabulary, (args.length + 1,), generator=generator)
        first, *ids = tokens.tolist()
        prompt = Prompt(str(row), row, "", (first,))
        rollouts.append(Rollout(prompt, row, 0, tuple(ids), logp, True))
    [batch] = pack_rollouts(rollouts, args.rows * args.length, dist.device())
    return batch


def compute_loss(model, batch: MicroBatch) -> torch.Tensor:
    """Return the mean cross-entropy of a batch."""
    logp, _ = compute_log_probs(model, batch, temperature=1.0)
    return -logp.sum() / (len(batch.target) * dist.world_size())


class OurStep:
    """Take a step with our sharding: batch -> loss.

    `gradient` holds the bytes of the last step's.
    """

    def __init__(self, args: argparse.Namespace, checkpointing: bool):
        weights = dict(make_decoder(args).state_dict())
        self.model = Sharded(
            make_decoder(args),
            weights.__getitem__,
            device=dist.device(),
            compute=getattr(torch, args.compute),
            gradient_checkpointing=checkpointing,
        )
        self.optimizer = Optimizer(self.model, SETTINGS, 10**9)

    def __call__(self, batch: MicroBatch) -> torch.Tensor:
        loss = compute_loss(self.model, batch)
        loss.backward()
        self.gradient = sum(parameter.grad.nbytes for parameter in self.model.parameters())
        self.optimizer.step()
        return loss.detach()

    def count_state(self) -> int:
        """Return the bytes of masters and moments."""
        size = sum(parameter.nbytes for parameter in self.model.parameters())
        for _, optimizer in self.optimizer.optimizers:
            size += count_moments(optimizer)
        return size


class TheirStep:
    """Do the same with torch's fully_shard."""

    def __init__(self, args: argparse.Namespace, checkpointing: bool):
        self.model = make_decoder(args).to(dist.device())
        shard_model(self.model, args.compute, checkpointing)
        self.params = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(
            self.params,
            lr=SETTINGS.lr,
            betas=SETTINGS.betas,
            eps=SETTINGS.eps,
            weight_decay=SETTINGS.weight_decay,
            fused=True,
        )

    def __call__(self, batch: MicroBatch) -> torch.Tensor:
        loss = compute_loss(self.model, batch)
        loss.backward()
        self.gradient = sum(parameter.grad.to_local().nbytes for parameter in self.params)
        torch.nn.utils.clip_grad_norm_(self.params, SETTINGS.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def count_state(self) -> int:
        """Return the bytes of masters and moments."""
        size = sum(parameter.to_local().nbytes for parameter in self.params)
        return size + count_moments(self.optimizer)


SIDES = {"ours": OurStep, "fully_shard": TheirStep}


def shard_model(model: Decoder, compute: str, checkpointing: bool) -> None:
    """Apply fully_shard: a group for each block and one for the root."""
    precision = MixedPrecisionPolicy()
    if compute != "float32":
        precision = MixedPrecisionPolicy(
            param_dtype=getattr(torch, compute), reduce_dtype=torch.float32
        )
    layers = model.model.layers
    for i in range(len(layers)):
        if checkpointing:
            layers[i] = checkpoint_wrapper(layers[i], preserve_rng_state=False)
        fully_shard(layers[i], mp_policy=precision)
    # the head is used after the root's forward
    fully_shard(model, reshard_after_forward=False, mp_policy=precision)
    for module in (*layers, model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def count_moments(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of an optimizer's state on this rank, without its counters."""
    size = 0
    for state in optimizer.state.values():
        for tensor in state.values():
            if tensor.numel() > 1:
                shard = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                size += shard.nbytes
    return size


def measure_step(step: OurStep | TheirStep, batch: MicroBatch) -> dict[str, int]:
    """Return a step's peak above its start, state, gradient and traffic."""
    moved = measure_traffic(step, batch)
    synchronize()
    if dist.device().type == "cuda":
        peak = measure_peak_on_gpu(step, batch)
    else:
        peak = measure_peak_on_cpu(step, batch)
    return dict(peak=peak, moved=moved, state=step.count_state(), gradient=step.gradient)


def measure_traffic(step: OurStep | TheirStep, batch: MicroBatch) -> int:
    """Return the bytes that this rank receives in all-gathers and gives into reduce-scatters."""
    moved = 0
    world = dist.world_size()

    def count_calls(collective, argument: int):
        def call(*args, **kwargs):
            nonlocal moved
            values = [*args, *kwargs.values()]
            moved += values[argument].nbytes * (world - 1) // world
            return collective(*args, **kwargs)

        return call

    originals = []
    for module, arguments in ((td, TORCH_COLLECTIVES), (dist, OUR_COLLECTIVES)):
        for name, argument in arguments.items():
            if module is dist or hasattr(module, name):
                collective = getattr(module, name)
                originals.append((module, name, collective))
                setattr(module, name, count_calls(collective, argument))
    step(batch)
    for module, name, collective in originals:
        setattr(module, name, collective)
    return moved


def measure_peak_on_gpu(step: OurStep | TheirStep, batch: MicroBatch) -> int:
    """Return a step's peak above its start, by the allocator's own count."""
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    step(batch)
    return torch.cuda.max_memory_allocated() - start


def measure_peak_on_cpu(step: OurStep | TheirStep, batch: MicroBatch) -> int:
    """Return a step's peak above its start, from the profiler's memory events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(batch)
    changes = []
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            changes.append((event.start_ns(), event.nbytes()))
    live = 0
    peak = 0
    for _, size in sorted(changes):
        live += size
        peak = max(peak, live)
    return peak


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if dist.device().type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # threads that the profiler leaves at times abort an interpreter that ends in order
