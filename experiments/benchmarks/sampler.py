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
from types import SimpleNamespace

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
        ids = random.integers(vocabulary - 1, size=(self.prompts, self.prompt)).tolist()
        shape = self.prompts, self.group
        ends = (
            draw_lengths(random.standard_normal(shape), self.new)
            if self.ragged
            else np.full(shape, self.new)
        )
        return Batch(
            self, [Prompt(str(i), i, "", tuple(row)) for i, row in enumerate(ids)], ends, number
        )


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
        ends = np.exp(middle + SIGMA * z).round().clip(1, most).astype(int)
        low, high = (middle, high) if ends.mean() < MEAN * most else (low, middle)
    return ends


class Ours:
    """Run our sampler."""

    def __init__(self, decoder: Decoder):
        self.model = decoder
        self.last = decoder.config.vocab_size - 1
        self.cache = make_cache(decoder)

    def __call__(self, batch: Batch) -> list[tuple[int, ...]]:
        w = batch.work
        u = draw_uniforms(0, batch.number, np.arange(w.prompts), w.group, w.new)
        # float32 sums of a distribution that gives its last id more than 1e-6 and less than .01:
        # see the assert
        if w.ragged:
            u *= 0.99
            np.put_along_axis(u, batch.lengths[..., None] - 1, np.nextafter(1, 0), axis=-1)
        stops = frozenset([self.last] if w.ragged else [])
        texts = [
            r.ids
            for r in generate(self.model, batch.prompts, w.group, 1.0, w.new, stops, u, self.cache)
        ]
        assert [len(ids) for ids in texts] == batch.lengths.flatten().tolist(), (
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
        ids = torch.tensor([p.ids for p in batch.prompts], device=self.model.device)
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
        cache = (
            dict(
                past_key_values=StaticCache(
                    config=self.model.config, max_cache_len=w.prompt + w.new
                )
            )
            if self.static
            else {}
        )
        ends = Ends(torch.as_tensor(batch.lengths.flatten(), device=self.model.device), w.prompt)
        torch.manual_seed(batch.number)
        out = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=settings,
            stopping_criteria=StoppingCriteriaList([ends] if w.ragged else []),
            **cache,
        )
        assert out.shape == (w.prompts * w.group, w.prompt + batch.lengths.max()), out.shape
        return [
            row[w.prompt : w.prompt + n].tolist() for row, n in zip(out, batch.lengths.flatten())
        ]


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
        self.title = f"{name} {str(dtype).removeprefix('torch.')}"
        self.decoder, self.model = make_twins(config, dtype, device)
        self.sides = dict(
            ours=Ours(self.decoder),
            dynamic=Theirs(self.model, False),
            static=Theirs(self.model, True),
        )

    def seconds(self, work: Work, repeats: int) -> dict[str, list[float]]:
        found = {name: [] for name in self.sides}
        # ours grows its cache to this work's size; a GPU compiles
        for side in self.sides.values():
            side(work.batch(self.config.vocab_size, 0))
        for i in range(1, 1 + repeats):
            batch = work.batch(self.config.vocab_size, i)
            for name, side in list(self.sides.items())[:: 1 if i % 2 else -1]:
                self.synchronize()
                began = perf_counter()
                texts = side(batch)
                self.synchronize()
                found[name].append(perf_counter() - began)
                if name == "ours":
                    self.shared = count_computed(texts, work.group)
        return found

    def measure(self, title: str, work: Work, repeats: int) -> SimpleNamespace:
        """Prints a line of the table and returns its figures."""
        peak = {name: self.peak(name, work) for name in self.sides}
        first = {
            name: median(times)
            for name, times in self.seconds(replace(work, new=1, ragged=False), repeats).items()
        }
        seconds = self.seconds(work, repeats)
        tokens = [
            int(work.batch(self.config.vocab_size, i).lengths.sum()) for i in range(1, 1 + repeats)
        ]
        speed = {
            name: median(n / t for n, t in zip(tokens, times)) for name, times in seconds.items()
        }
        best = max("dynamic", "static", key=speed.get)
        ratio = speed["ours"] / speed[best]
        by_turn = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds[best])]
        print(
            f"{self.title:<16}{title:<26}"
            + "".join(f"{speed[n]:>9,.0f}" for n in speed)
            + f"{ratio:>7.2f} ({min(by_turn):.2f}-{max(by_turn):.2f})"
            + "".join(f"{1e3 * first[n]:>9,.1f}" for n in first)
            + "".join(f"{peak[n] / 2**20:>9,.1f}" for n in peak)
            + f"{self.shared:>7.3f}",
            flush=True,
        )
        return SimpleNamespace(speed=speed, ratio=ratio)

    def peak(self, side: str, work: Work) -> int:
        if self.device == "cuda":
            return self.growth(side, work)
        # a process that has only imported, and its forks
        fresh = multiprocessing.get_context("forkserver")
        fresh.set_forkserver_preload(
            [
                "transformers.models.qwen2.modeling_qwen2",
                "recr1.training.dry_run",
                "recr1.sampling.generate",
            ]
        )
        with ProcessPoolExecutor(1, fresh) as process:
            return process.submit(
                measure_alone,
                self.name,
                self.config,
                self.dtype,
                side,
                work,
                torch.get_num_threads(),
            ).result()

    def growth(self, side: str, work: Work) -> int:
        # ours with a cache of its own
        run = Ours(self.decoder) if side == "ours" else self.sides[side]
        memory.restart_peak()
        before = memory.measure_peak()
        run(work.batch(self.config.vocab_size, 0))
        return memory.measure_peak() - before

    def greedy(self, work: Work) -> int:
        """Count the prompts whose greedy texts differ from transformers' where the best token is
        clear.
        """
        prompts = work.batch(self.config.vocab_size, 0).prompts
        differ = 0
        clear = 0
        settings = GenerationConfig(
            do_sample=False, max_new_tokens=work.new, eos_token_id=None, pad_token_id=0
        )
        ids = torch.tensor([p.ids for p in prompts], device=self.device)
        theirs = self.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings
        )
        for r, row in zip(
            generate(self.decoder, prompts, 1, 1.0, work.new, frozenset(), None), theirs
        ):
            differs = [a != b for a, b in zip(r.ids, row[work.prompt :].tolist(), strict=True)]
            if any(differs):
                with torch.no_grad():
                    best, second = (
                        self.model(row[None, : work.prompt + differs.index(True)])
                        .logits[0, -1]
                        .topk(2)
                        .values.tolist()
                    )
                differ = differ + 1
                clear = clear + (best - second > TIE)
        print(
            f"{self.title:<16}greedy: {differ} of {len(prompts)} texts of {work.new} tokens "
            f"differ from transformers', {clear} of them not at a tie"
        )
        return clear

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def count_computed(texts: list, group: int) -> float:
    """Return the share of decode rows that a sampler with shared rows computes.

    These are the distinct beginnings of the texts of a group, over tokens.
    """
    rows = {
        (i // group, tuple(ids[: n + 1])) for i, ids in enumerate(texts) for n in range(len(ids))
    }
    return len(rows) / sum(map(len, texts))


HEADER = (
    f"{'':<42}{'texts, tokens per second':>27}{'ours over':>19}{'first token, ms':>27}"
    f"{'peak, MiB':>27}\n"
    f"{'':<42}"
    + "     ours  dynamic   static"
    + f"{'faster theirs':>19}"
    + 2 * "     ours  dynamic   static"
    + "   rows"
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
DRY = Size(make_qwen2_config(2, 32, 48, 4, 128), 0.0, 0.0)
TINY = dict(prompts=3, group=2, prompt=8, new=8)


def make_bar(name: str, value: float, least: float) -> dict:
    """Return a bar for the line of JSON."""
    return dict(name=name, value=round(value, 4), bar=least, ok=value >= least)


def make_bars(name: str, size: Size, work: Work, repeats: int) -> list[dict]:
    """Measure a shape and return its bars."""
    bars = []
    for dtype in (FLOAT32, BFLOAT16):
        pair = Pair(name, size.config, dtype, "cpu")
        figures = [
            pair.measure(
                title,
                replace(work, ragged=title == "ragged"),
                repeats if dtype == FLOAT32 else min(repeats, 3),
            )
            for title in ("equal", "ragged")
        ]
        if dtype == FLOAT32:
            clear = pair.greedy(work)
            bars += [
                make_bar(
                    f"{name}: tokens per second over transformers generate, {how} lengths",
                    f.ratio,
                    least,
                )
                for how, f, least in zip(("equal", "ragged"), figures, (size.equal, size.ragged))
            ]
            bars.append(
                dict(
                    name=f"{name}: greedy texts that differ from transformers' where its best "
                    "token is clear",
                    value=clear,
                    bar=0,
                    ok=clear == 0,
                )
            )
    return bars


def measure_alone(
    name: str, config: DecoderConfig, dtype: torch.dtype, side: str, work: Work, threads: int
) -> int:
    """Return the bytes by which a process of its own grows over the work."""
    torch.set_num_threads(threads)
    pair = Pair(name, config, dtype, "cpu")
    pair.sides[side](replace(work, new=4).batch(config.vocab_size, 1))
    return pair.growth(side, work)


def print_table(name: str, size: Size, base: Work, repeats: int, dry: bool) -> None:
    """Vary one of group size, prompt and completion at a time.

    The batch has as many texts when the group's size changes.
    """
    pair = Pair(name, size.config, FLOAT32, "cpu")
    rows = base.prompts * base.group
    groups, more = ((2,), (8, 16)) if dry else ((1, 2, 4, 8, 16), (64, 128, 256, 512))
    works = [replace(base, prompts=rows // g, group=g) for g in groups]
    works += [replace(base, prompt=n) for n in more if n != base.prompt] + [
        replace(base, new=n) for n in more if n != base.new
    ]
    works += [
        replace(base, prompts=rows // groups[-1], group=groups[-1], prompt=more[-1], new=more[-1])
    ]
    for w in works:
        pair.measure(
            f"{w.prompts} of {w.prompt} x {w.group} to {w.new}", replace(w, ragged=True), repeats
        )


def measure_on_gpu(name: str, work: Work, repeats: int, dry: bool) -> list[dict]:
    """Measure the shapes of a GPU and return their bars."""
    shape = read_model_shape(
        f"Qwen/Qwen2.5-{name}-Instruct", str(ROOT / "experiments/configs/any.yaml")
    )
    pair = Pair(name, DRY.config if dry else shape, BFLOAT16, "cpu" if dry else "cuda")
    f = pair.measure(f"{work.prompts} of {work.prompt} x {work.group} of {work.new}", work, repeats)
    speed = f.speed["ours"]
    copy = measure_copy_rate(pair.device)
    least, over = GPU_SIZES[name]
    reached = [speed / compute_roofline(shape, work, rate) for rate in (COPY, copy)]
    print(
        f"{'':<16}{reached[0]:.3f} of the serial roofline at {COPY / 1e12:.2f} TB/s, "
        f"{reached[1]:.3f} at the {copy / 1e12:.2f} TB/s of a copy here"
    )
    bars = [
        make_bar(
            f"Qwen2.5-{name}, {work.prompts} x {work.group}, {work.prompt} + {work.new}: "
            "tokens per second",
            speed,
            0 if dry else least,
        )
    ]
    if over:
        bars.append(
            make_bar(
                f"Qwen2.5-{name}: tokens per second over transformers generate",
                f.ratio,
                0 if dry else over,
            )
        )
    return bars


def compute_roofline(c: DecoderConfig, work: Work, copy: float) -> float:
    """Return the tokens per second that reading and multiplying allow, in bfloat16.

    Each decode step first reads all, every row its whole context, and then multiplies, at the mean
    context.
    """
    rows = work.prompts * work.group
    context = work.prompt + work.new / 2
    heads = c.num_attention_heads * c.head_dim
    block = c.hidden_size * (
        2 * heads + 2 * c.num_key_value_heads * c.head_dim + 3 * c.intermediate_size
    )
    weights = c.num_hidden_layers * block + c.hidden_size * c.vocab_size
    # numbers per row
    cached = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * context
    read = 2 * weights + rows * (2 * cached + 4 * c.vocab_size)
    flop = rows * (2 * weights + 4 * heads * context * c.num_hidden_layers)
    return rows / (read / copy + flop / PRODUCTS)


def measure_copy_rate(device: str) -> float:
    """Return the bytes read and written per second by a copy of 1 GiB (a CPU: 16 MiB), the fastest
    of ten.
    """
    source = torch.ones(1 << (30 if device == "cuda" else 24), dtype=torch.uint8, device=device)
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


def main() -> int:
    """Run the shapes and print the bars."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape",
        nargs="+",
        default=list(SIZES),
        choices=[*SIZES, *GPU_SIZES],
        metavar="SHAPE",
        help=f"of {', '.join([*SIZES, *GPU_SIZES])}",
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
    on_cpu = [name for name in args.shape if name in SIZES]
    gpu = [name for name in args.shape if name in GPU_SIZES]
    if gpu and (on_cpu or args.table):
        parser.error("shapes of a GPU go alone, without --table")
    if on_cpu or args.dry_run:
        os.environ["CUDA_VISIBLE_DEVICES"] = (
            ""  # memory/measure.py counts a GPU's bytes where it sees one
        )
    elif not torch.cuda.is_available():
        parser.error("no GPU here; --dry-run shows that the bench works")
    repeats = args.repeats or (1 if args.dry_run else 2 if args.table or gpu else 5)
    torch.set_num_threads(args.threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    device_name = f"CPU, {args.threads} threads"
    if torch.cuda.is_available():
        device_name = torch.cuda.get_device_name()
    print(f"{device_name}, torch {torch.__version__}, {repeats} repeats\n{HEADER}")
    bars = []
    tiny = Work(**TINY)
    for name in on_cpu:
        size, work = (DRY, tiny) if args.dry_run else (SIZES[name], Work())
        if args.table:
            print_table(name, size, work, repeats, args.dry_run)
        else:
            bars += make_bars(name, size, work, repeats)
    for name in gpu:
        bars += measure_on_gpu(
            name,
            tiny if args.dry_run else Work(prompts=32, group=12, prompt=256, new=512),
            repeats,
            args.dry_run,
        )
    print(json.dumps({"bars": bars}))
    return 0 if all(bar["ok"] for bar in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
