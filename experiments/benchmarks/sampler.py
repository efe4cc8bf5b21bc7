"""Compare our sampler with transformers' generate.

python experiments/benchmarks/sampler.py [--shape 4x256
12x512] [--repeats 5] [--threads 2] [--table]

The sides: generate.generate (its cache kept from call to call, as in training), and generate
with its dynamic and its static cache. All have the same random weights and prompts, draw at
temperature 1 from the whole distribution, and take turns, the order reversed at every other turn;
each repeat has other prompts and lengths. Tokens per second count the tokens of the texts only;
medians, all warmed up. The ratio is to the faster of transformers' two, with its range over the
turns.

equal: 12 prompts of 64 tokens x 8 texts of 128. ragged: the same with log-normal lengths (sigma
0.7, cut at 128, mean 45), the same for all sides. transformers is told by a StoppingCriteria that
gives a flag per row, its own way to end rows; we draw a stop id: it is the last of the vocabulary,
and the token's uniform is next to 1 where the text shall end, at most .99 before. That every length
came out as drawn is checked. first token: seconds of a call for one token. peak: growth of the
resident memory's high-water mark (a GPU: of the allocator's bytes) over one call that makes its own
cache, on a CPU each side in a process of its own, warmed up by a small call. rows: the share of the
texts' tokens that were computed at all (siblings that are still one text are one row). greedy: both
decode the prompts greedily; how many texts differ, and how many of them where transformers' best
logit leads by more than 1e-4.

`--table`: one of group size, prompt and completion varied at a time, texts ragged in the same
proportion, float32, --repeats 2 by default. `--shape 0.5B 1.5B 3B` (a GPU, bfloat16): Qwen2.5's
shapes, 32 prompts of 256 tokens x 12 texts of 512, equal lengths; the share of the roofline is of
reading weights, keys, values and float32 logits at 3.0 TB/s, then multiplying at 700 TF/s, and
again with the copy rate measured here. Ends with one line of JSON: the bars and whether they hold.
Needs a quiet machine. `--dry-run` takes tiny sizes: its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import torch
from transformers import GenerationConfig, StaticCache, StoppingCriteria, StoppingCriteriaList
from twins import make_qwen2_config, make_twins

from recr1.data_types import Prompt
from recr1.memory import measure as memory
from recr1.model.decoder import Decoder
from recr1.model.rope import DecoderConfig
from recr1.sampling.generate import generate, make_cache
from recr1.training.dry_run import read_model_shape
from recr1.utils.counter_rng import draw_uniforms

ROOT = Path(__file__).resolve().parents[2]
# ragged texts: mean over the longest, and the width of the normal
MEAN = 45 / 128
SIGMA = 0.7
TIE = 1e-4
# bytes/s and FLOP/s of an H100 that are counted with: assumed, not measured
COPY = 3.0e12
PRODUCTS = 700e12
FLOAT32 = torch.float32
BFLOAT16 = torch.bfloat16
# what the processes that measure a peak have imported before
PRELOADED = [
    "transformers.models.qwen2.modeling_qwen2",
    "recr1.training.dry_run",
    "recr1.sampling.generate",
]


@dataclass(frozen=True)
class Work:
    """Say what is asked of a side.

    Prompts of `prompt` tokens, `group` texts of at most `new` tokens each.
    """

    prompts: int = 12
    group: int = 8
    prompt: int = 64
    new: int = 128
    ragged: bool = False

    def batch(self, vocabulary: int, number: int) -> Batch:
        random = np.random.default_rng(number)
        # no prompt holds the stop id
        ids = random.integers(vocabulary - 1, size=(self.prompts, self.prompt))
        prompts = []
        for row, prompt_ids in enumerate(ids.tolist()):
            prompts.append(Prompt(str(row), row, "", tuple(prompt_ids)))
        shape = (self.prompts, self.group)
        lengths = np.full(shape, self.new)
        if self.ragged:
            lengths = draw_lengths(random.standard_normal(shape), self.new)
        return Batch(self, prompts, lengths, number)


@dataclass(frozen=True)
class Batch:
    """Hold the inputs of one call."""

    work: Work
    prompts: list[Prompt]
    lengths: np.ndarray  # (P, G) tokens of each text
    number: int


def draw_lengths(z: np.ndarray, most: int) -> np.ndarray:
    """Return log-normal lengths in 1..most, integers, of the standard normal draws z.

    Their mean is MEAN * most.
    """
    low = 0.0
    high = float(np.log(most))
    for _ in range(50):
        middle = (low + high) / 2
        lengths = np.exp(middle + SIGMA * z)
        lengths = lengths.round().clip(1, most).astype(int)
        if lengths.mean() < MEAN * most:
            low = middle
        else:
            high = middle
    return lengths


class Ours:
    """Run our sampler."""

    def __init__(self, decoder: Decoder):
        self.model = decoder
        self.last = decoder.config.vocab_size - 1
        self.cache = make_cache(decoder)

    def __call__(self, batch: Batch) -> list[tuple[int, ...]]:
        w = batch.work
        u = draw_uniforms(0, batch.number, np.arange(w.prompts), w.group, w.new)
        stops = frozenset()
        # float32 sums of a distribution that gives its last id more than 1e-6 and less than .01:
        # see the assert
        if w.ragged:
            u *= 0.99
            ends = batch.lengths[..., None] - 1
            np.put_along_axis(u, ends, np.nextafter(1, 0), axis=-1)
            stops = frozenset([self.last])
        rollouts = generate(self.model, batch.prompts, w.group, 1.0, w.new, stops, u, self.cache)
        texts = [rollout.ids for rollout in rollouts]
        lengths = [len(ids) for ids in texts]
        assert lengths == batch.lengths.flatten().tolist(), (
            "a text did not end where it was meant to"
        )
        return texts


class Theirs:
    """Run transformers' generate."""

    def __init__(self, model, static: bool):
        self.model = model
        self.static = static
        assert model.config._attn_implementation == "sdpa"

    def __call__(self, batch: Batch) -> list[list[int]]:
        w = batch.work
        device = self.model.device
        ids = torch.tensor([prompt.ids for prompt in batch.prompts], device=device)
        settings = GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=w.group,
            max_new_tokens=w.new,
            eos_token_id=None,
            pad_token_id=0,
            use_cache=True,
        )
        options = {}
        if self.static:
            options["past_key_values"] = StaticCache(
                config=self.model.config, max_cache_len=w.prompt + w.new
            )
        lengths = batch.lengths.flatten()
        criteria = StoppingCriteriaList()
        if w.ragged:
            criteria.append(Ends(torch.as_tensor(lengths, device=device), w.prompt))
        torch.manual_seed(batch.number)
        sequences = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=settings,
            stopping_criteria=criteria,
            **options,
        )
        want = (w.prompts * w.group, w.prompt + lengths.max())
        assert sequences.shape == want, sequences.shape
        texts = []
        for row, length in zip(sequences, lengths):
            ids = row[w.prompt : w.prompt + length]
            texts.append(ids.tolist())
        return texts


class Ends(StoppingCriteria):
    """End a row when it has the tokens that were drawn for it."""

    def __init__(self, lengths: torch.Tensor, prompt: int):
        self.lengths = lengths
        self.prompt = prompt

    def __call__(self, input_ids, scores, **_) -> torch.Tensor:
        return input_ids.shape[1] - self.prompt >= self.lengths


class Pair:
    """Compare the sides at one shape and type, on the same weights."""

    def __init__(self, name: str, config: DecoderConfig, dtype: torch.dtype, device: str):
        self.name = name
        self.config = config
        self.dtype = dtype
        self.device = device
        dtype_name = str(dtype).removeprefix("torch.")
        self.title = f"{name} {dtype_name}"
        self.decoder, self.model = make_twins(config, dtype, device)
        self.sides = dict(
            ours=Ours(self.decoder),
            dynamic=Theirs(self.model, False),
            static=Theirs(self.model, True),
        )

    def make_batch(self, work: Work, number: int) -> Batch:
        return work.batch(self.config.vocab_size, number)

    def time_sides(self, work: Work, repeats: int) -> tuple[dict[str, list[float]], float]:
        """Return the seconds of each side, and the share of the texts' tokens that we computed."""
        seconds = {name: [] for name in self.sides}
        # ours grows its cache to this work's size; a GPU compiles
        for side in self.sides.values():
            side(self.make_batch(work, 0))
        for number in range(1, 1 + repeats):
            batch = self.make_batch(work, number)
            names = list(self.sides)
            if number % 2 == 0:
                names.reverse()
            for name in names:
                side = self.sides[name]
                self.synchronize()
                began = perf_counter()
                texts = side(batch)
                self.synchronize()
                seconds[name].append(perf_counter() - began)
                if name == "ours":
                    shared = count_computed(texts, work.group)
        return seconds, shared

    def measure(self, title: str, work: Work, repeats: int) -> tuple[dict[str, float], float]:
        """Print a line of the table; return the speeds, and ours over the faster of theirs."""
        peaks = {}
        for name in self.sides:
            peaks[name] = self.measure_peak(name, work)
        first_token = replace(work, new=1, ragged=False)
        first_seconds, _ = self.time_sides(first_token, repeats)
        seconds, shared = self.time_sides(work, repeats)

        tokens = []
        for number in range(1, 1 + repeats):
            lengths = self.make_batch(work, number).lengths
            tokens.append(int(lengths.sum()))
        speeds = {}
        for name, times in seconds.items():
            speeds[name] = median(compute_ratios(tokens, times))
        best = max("dynamic", "static", key=speeds.get)
        ratio = speeds["ours"] / speeds[best]
        by_turn = compute_ratios(seconds[best], seconds["ours"])

        speed_columns = ""
        first_columns = ""
        peak_columns = ""
        for name in self.sides:
            speed_columns += f"{speeds[name]:>9,.0f}"
            first_columns += f"{1e3 * median(first_seconds[name]):>9,.1f}"
            peak_columns += f"{peaks[name] / 2**20:>9,.1f}"
        low = min(by_turn)
        high = max(by_turn)
        print(
            f"{self.title:<16}{title:<26}{speed_columns}{ratio:>7.2f} ({low:.2f}-{high:.2f})"
            f"{first_columns}{peak_columns}{shared:>7.3f}",
            flush=True,
        )
        return speeds, ratio

    def measure_peak(self, side: str, work: Work) -> int:
        """Return the bytes by which memory grows over a call, on a CPU in a process of its own."""
        if self.device == "cuda":
            return self.measure_growth(side, work)
        # a process that has only imported, and its forks
        fresh = multiprocessing.get_context("forkserver")
        fresh.set_forkserver_preload(PRELOADED)
        threads = torch.get_num_threads()
        with ProcessPoolExecutor(1, fresh) as process:
            future = process.submit(
                measure_alone, self.name, self.config, self.dtype, side, work, threads
            )
            return future.result()

    def measure_growth(self, side: str, work: Work) -> int:
        """Return the bytes by which memory grows over a call."""
        # ours with a cache of its own
        run = Ours(self.decoder) if side == "ours" else self.sides[side]
        memory.restart_peak()
        before = memory.measure_peak()
        run(self.make_batch(work, 0))
        return memory.measure_peak() - before

    def compare_greedy(self, work: Work) -> int:
        """Count the prompts whose greedy texts differ from transformers' where the best token is
        clear.
        """
        prompts = self.make_batch(work, 0).prompts
        ids = torch.tensor([prompt.ids for prompt in prompts], device=self.device)
        settings = GenerationConfig(
            do_sample=False, max_new_tokens=work.new, eos_token_id=None, pad_token_id=0
        )
        sequences = self.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings
        )
        rollouts = generate(self.decoder, prompts, 1, 1.0, work.new, frozenset(), None)
        differ = 0
        clear = 0
        for rollout, sequence in zip(rollouts, sequences):
            want = sequence[work.prompt :].tolist()
            differs = [actual != token for actual, token in zip(rollout.ids, want, strict=True)]
            if any(differs):
                differ += 1
                lead = self.compute_lead(sequence[: work.prompt + differs.index(True)])
                if lead > TIE:
                    clear += 1
        print(
            f"{self.title:<16}greedy: {differ} of {len(prompts)} texts of {work.new} tokens "
            f"differ from transformers', {clear} of them not at a tie"
        )
        return clear

    def compute_lead(self, ids: torch.Tensor) -> float:
        """Return by how much transformers' best next logit leads the second."""
        with torch.no_grad():
            logits = self.model(ids[None]).logits[0, -1]
        best, second = logits.topk(2).values.tolist()
        return best - second

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def compute_ratios(above: list[float], below: list[float]) -> list[float]:
    """Divide pairs of values."""
    return [a / b for a, b in zip(above, below)]


def count_computed(texts: list, group: int) -> float:
    """Return the share of decode rows that a sampler with shared rows computes.

    These are the distinct beginnings of the texts of a group, over tokens.
    """
    beginnings = set()
    tokens = 0
    for row, ids in enumerate(texts):
        tokens += len(ids)
        for end in range(1, 1 + len(ids)):
            beginning = tuple(ids[:end])
            beginnings.add((row // group, beginning))
    return len(beginnings) / tokens


THREE_SIDES = "     ours  dynamic   static"
HEADER = (
    f"{'':<42}{'texts, tokens per second':>27}{'ours over':>19}{'first token, ms':>27}"
    f"{'peak, MiB':>27}\n"
    f"{'':<42}{THREE_SIDES}{'faster theirs':>19}{THREE_SIDES}{THREE_SIDES}   rows"
)


@dataclass(frozen=True)
class Size:
    """Hold a model's shape."""

    config: DecoderConfig
    equal: float  # bars: ours over theirs
    ragged: float


SIZES = {
    "4x256": Size(make_qwen2_config(4, 256, 1024, 4, 8192), 2.0, 4.0),
    "12x512": Size(make_qwen2_config(12, 512, 1536, 8, 8192), 1.4, 3.0),
}
# bars: tokens/s; over theirs
GPU_SIZES = {"0.5B": (130_000, 6.0), "1.5B": (49_000, None), "3B": (29_000, None)}
GPU_WORK = Work(prompts=32, group=12, prompt=256, new=512)
DRY = Size(make_qwen2_config(2, 32, 48, 4, 128), 0.0, 0.0)
TINY = Work(prompts=3, group=2, prompt=8, new=8)


def make_bar(name: str, value: float, least: float) -> dict:
    """Return a bar for the line of JSON."""
    return dict(name=name, value=round(value, 4), bar=least, ok=value >= least)


def make_bars(name: str, size: Size, work: Work, repeats: int) -> list[dict]:
    """Measure a shape and return its bars."""
    pair = Pair(name, size.config, FLOAT32, "cpu")
    equal, ragged = measure_lengths(pair, work, repeats)
    clear = pair.compare_greedy(work)
    measure_lengths(Pair(name, size.config, BFLOAT16, "cpu"), work, min(repeats, 3))

    title = f"{name}: tokens per second over transformers generate"
    greedy = f"{name}: greedy texts that differ from transformers' where its best token is clear"
    return [
        make_bar(f"{title}, equal lengths", equal, size.equal),
        make_bar(f"{title}, ragged lengths", ragged, size.ragged),
        dict(name=greedy, value=clear, bar=0, ok=clear == 0),
    ]


def measure_lengths(pair: Pair, work: Work, repeats: int) -> tuple[float, float]:
    """Return ours over theirs, of texts of equal and of ragged lengths."""
    _, equal = pair.measure("equal", work, repeats)
    _, ragged = pair.measure("ragged", replace(work, ragged=True), repeats)
    return equal, ragged


def measure_alone(
    name: str, config: DecoderConfig, dtype: torch.dtype, side: str, work: Work, threads: int
) -> int:
    """Return the bytes by which a process of its own grows over the work."""
    torch.set_num_threads(threads)
    pair = Pair(name, config, dtype, "cpu")
    run = pair.sides[side]
    run(pair.make_batch(replace(work, new=4), 1))
    return pair.measure_growth(side, work)


def print_table(name: str, size: Size, base: Work, repeats: int, dry: bool) -> None:
    """Vary one of group size, prompt and completion at a time.

    The batch has as many texts when the group's size changes.
    """
    groups = (2,) if dry else (1, 2, 4, 8, 16)
    lengths = (8, 16) if dry else (64, 128, 256, 512)
    texts = base.prompts * base.group
    works = []
    for group in groups:
        works.append(replace(base, prompts=texts // group, group=group))
    for prompt in lengths:
        if prompt != base.prompt:
            works.append(replace(base, prompt=prompt))
    for new in lengths:
        if new != base.new:
            works.append(replace(base, new=new))
    prompts = texts // groups[-1]
    works.append(Work(prompts, groups[-1], prompt=lengths[-1], new=lengths[-1]))

    pair = Pair(name, size.config, FLOAT32, "cpu")
    for work in works:
        title = f"{work.prompts} of {work.prompt} x {work.group} to {work.new}"
        pair.measure(title, replace(work, ragged=True), repeats)


def measure_on_gpu(name: str, work: Work, repeats: int, dry: bool) -> list[dict]:
    """Measure the shapes of a GPU and return their bars."""
    shape = read_model_shape(
        f"Qwen/Qwen2.5-{name}-Instruct", str(ROOT / "experiments/configs/any.yaml")
    )
    least, least_ratio = GPU_SIZES[name]
    if dry:
        pair = Pair(name, DRY.config, BFLOAT16, "cpu")
        least = 0
    else:
        pair = Pair(name, shape, BFLOAT16, "cuda")
    title = f"{work.prompts} of {work.prompt} x {work.group} of {work.new}"
    speeds, ratio = pair.measure(title, work, repeats)
    speed = speeds["ours"]

    copy = measure_copy_rate(pair.device)
    share = speed / compute_roofline(shape, work, COPY)
    share_here = speed / compute_roofline(shape, work, copy)
    print(
        f"{'':<16}{share:.3f} of the serial roofline at {COPY / 1e12:.2f} TB/s, "
        f"{share_here:.3f} at the {copy / 1e12:.2f} TB/s of a copy here"
    )
    batch = f"{work.prompts} x {work.group}, {work.prompt} + {work.new}"
    bars = [make_bar(f"Qwen2.5-{name}, {batch}: tokens per second", speed, least)]
    if least_ratio:
        title = f"Qwen2.5-{name}: tokens per second over transformers generate"
        bars.append(make_bar(title, ratio, 0 if dry else least_ratio))
    return bars


def compute_roofline(c: DecoderConfig, work: Work, copy: float) -> float:
    """Return the tokens per second that reading and multiplying allow, in bfloat16.

    Each decode step first reads all, every row its whole context, and then multiplies, at the mean
    context.
    """
    rows = work.prompts * work.group
    context = work.prompt + work.new / 2
    heads = c.num_attention_heads * c.head_dim
    kv = c.num_key_value_heads * c.head_dim
    block = c.hidden_size * (2 * heads + 2 * kv + 3 * c.intermediate_size)
    weights = c.num_hidden_layers * block + c.hidden_size * c.vocab_size
    # numbers per row
    cached = 2 * c.num_hidden_layers * kv * context
    read = 2 * weights + rows * (2 * cached + 4 * c.vocab_size)
    flop = rows * (2 * weights + 4 * heads * context * c.num_hidden_layers)
    return rows / (read / copy + flop / PRODUCTS)


def measure_copy_rate(device: str) -> float:
    """Return the bytes read and written per second by a copy of 1 GiB (a CPU: 16 MiB), the fastest
    of ten.
    """
    size = 1 << (30 if device == "cuda" else 24)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        if device == "cuda":
            torch.cuda.synchronize()
        began = perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(perf_counter() - began)
    return 2 * source.nbytes / min(times)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    names = [*SIZES, *GPU_SIZES]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape",
        nargs="+",
        default=list(SIZES),
        choices=names,
        metavar="SHAPE",
        help=f"of {', '.join(names)}",
    )
    parser.add_argument("--repeats", type=int, help="default: 5; of the table and on a GPU 2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--table",
        action="store_true",
        help="group sizes 1-16, prompts and completions 64-512; no bars",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny sizes: their times mean nothing"
    )
    args = parser.parse_args()
    args.cpu_shapes = [name for name in args.shape if name in SIZES]
    args.gpu_shapes = [name for name in args.shape if name in GPU_SIZES]
    if args.gpu_shapes and (args.cpu_shapes or args.table):
        parser.error("shapes of a GPU go alone, without --table")
    if args.cpu_shapes or args.dry_run:
        # memory/measure.py counts a GPU's bytes where it sees one
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        parser.error("no GPU here; --dry-run shows that the bench works")
    args.repeats = args.repeats or get_default_repeats(args)
    return args


def get_default_repeats(args: argparse.Namespace) -> int:
    """Return how often the sides take turns where the command line does not say."""
    if args.dry_run:
        return 1
    if args.table or args.gpu_shapes:
        return 2
    return 5


def main() -> int:
    """Run the shapes and print the bars."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    device_name = f"CPU, {args.threads} threads"
    if torch.cuda.is_available():
        device_name = torch.cuda.get_device_name()
    print(f"{device_name}, torch {torch.__version__}, {args.repeats} repeats\n{HEADER}")

    bars = []
    for name in args.cpu_shapes:
        size = DRY if args.dry_run else SIZES[name]
        work = TINY if args.dry_run else Work()
        if args.table:
            print_table(name, size, work, args.repeats, args.dry_run)
        else:
            bars += make_bars(name, size, work, args.repeats)
    for name in args.gpu_shapes:
        work = TINY if args.dry_run else GPU_WORK
        bars += measure_on_gpu(name, work, args.repeats, args.dry_run)
    print(json.dumps({"bars": bars}))
    return 0 if all(bar["ok"] for bar in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
