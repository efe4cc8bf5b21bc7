"""Compare one whole GRPO step with TRL's GRPOTrainer on a CPU.

python experiments/benchmarks/step.py [--shape
4x256|12x512|long|all] [--pairs N] [--threads 2]

Both sides: the same Qwen2 (tied, V = 8,192, random weights) in float32, 8 prompts of 64 tokens x 8
generations of 64 tokens (the stop id lies outside the vocabulary, so nothing stops early),
temperature 1, the same reward on the decoded text, the token-mean loss of group advantages (TRL's
default, dapo; our grpo), no KL, one optimizer step on everything, clipping, fused AdamW. Ours is
the loop of recr1/train.py with the config's defaults; TRL's is trainer.train(), its settings stand
in `Theirs`: no gradient checkpointing (its default has it), micro-batches of 8 (its default, and
its fastest: see Size). TRL drives: each of its steps, from on_step_begin to on_step_end, stands
beside one of ours, now before it, now after. Random weights are the hard case for a sampler that
shares rows: siblings part at their first token (`distinct`). Then the gradient norm of TRL's first
step against ours on its texts and weights: both compute the same.

`long`: 4x256 with prompts of 256 tokens, as recommendation's are; TRL takes 4 to 5 times as long
there, so 3 pairs in place of 5. Medians over the pairs after two warm-up steps. Ends with one line
of JSON: the bars and whether they hold. Needs a quiet machine and 6 GB. `--dry-run` takes a tiny
size: it shows that the bench works, its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import warnings
from collections import defaultdict
from contextlib import contextmanager
from itertools import chain
from statistics import median
from time import perf_counter
from types import SimpleNamespace

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback

try:
    from datasets import Dataset  # comes with trl
    from trl import GRPOConfig, GRPOTrainer
except ImportError:
    sys.exit("step.py: the package trl is not installed: pip install trl")

from twins import make_qwen2_config, make_twins

from recr1.config.schema import Config, LossConfig, SamplingConfig
from recr1.data_types import Prompt, Reward, Rollout
from recr1.distributed.fsdp import Sharded, unsharded
from recr1.memory import measure as memory
from recr1.model.decoder import Decoder
from recr1.rl.advantages import compute_group_advantages
from recr1.rl.losses import resolve_objective
from recr1.rl.packing import deduplicate
from recr1.rl.policy_loss import compute_policy_loss
from recr1.sampling.generate import generate, make_cache
from recr1.tracking.step_metrics import StepRecord
from recr1.train import make_updates
from recr1.training.optimizer import Optimizer

WARM = 2  # steps before the first pair that counts
PHASES = ("sample", "reward", "forward", "backward", "optimizer", "rest", "step")


class Size(SimpleNamespace):
    """Hold layers, width, inner (of the MLP), heads; the rest has defaults."""

    vocabulary = 8192
    prompts = 8
    group = 8
    prompt = 64
    completion = 64
    pairs = 5
    # TRL's per_device_train_batch_size: its default, and the fastest of 4 to 64 (4x256) and of 8,
    # 32, 64 (12x512)
    batch = 8


SMALL = dict(layers=4, width=256, inner=1024, heads=4)
WIDE = dict(layers=12, width=512, inner=1536, heads=8)
SIZES = {
    "4x256": Size(**SMALL, bar=0.40),
    "12x512": Size(**WIDE, bar=0.55),
    "long": Size(**SMALL, bar=0.20, prompt=256, pairs=3),
}
DRY = Size(
    layers=2,
    width=32,
    inner=48,
    heads=4,
    bar=1000.0,
    vocabulary=128,
    prompts=3,
    group=4,
    prompt=8,
    completion=8,
    batch=6,
)


class Clock:
    """Measure seconds by phase, of one step after another."""

    def __init__(self):
        self.steps: list[dict[str, float]] = []

    def begin_step(self) -> None:
        self.phases = defaultdict(float)
        self.began = perf_counter()

    @contextmanager
    def time_phase(self, name: str):
        start = perf_counter()
        yield
        self.phases[name] += perf_counter() - start

    def wrap(self, name: str, function):
        """Return the function with its calls counted to the phase."""

        def run(*args, **kwargs):
            with self.time_phase(name):
                return function(*args, **kwargs)

        return run

    def end_step(self) -> None:
        step = perf_counter() - self.began
        rest = step - sum(self.phases.values())
        self.steps.append(dict(self.phases, rest=rest, step=step))

    def get_seconds(self, phase: str) -> list[float]:
        """Return a phase's seconds in each step that counts."""
        return [step[phase] for step in self.steps[WARM:]]


def make_models(size: Size) -> tuple[Decoder, torch.nn.Module, PreTrainedTokenizerFast]:
    """Make our decoder and transformers' model with the same random weights, and a tokenizer.

    The tokenizer's tokens are words: w0, w1, ...
    """
    config = make_qwen2_config(size.layers, size.width, size.inner, size.heads, size.vocabulary)
    decoder, model = make_twins(config)
    vocabulary = {f"w{number}": number for number in range(size.vocabulary)}
    vocabulary["<stop>"] = size.vocabulary
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<stop>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<stop>", pad_token="<stop>"
    )
    return decoder, model, tokenizer


def score_text(text: str) -> float:
    """Return the reward of both sides: the share of even words."""
    words = text.split()
    return sum(int(word[1:]) % 2 == 0 for word in words) / len(words)


class Ours:
    """Run the loop of recr1/train.py, one step at a time."""

    def __init__(self, size: Size, decoder: Decoder, tokenizer):
        self.size = size
        self.tokenizer = tokenizer
        self.clock = Clock()
        self.rows = []
        # TRL adds 1e-4 to the standard deviation: the one setting that is not our default, so that
        # gradients can be compared
        self.cfg = Config(
            sampling=SamplingConfig(group_size=size.group, max_new_tokens=size.completion),
            loss=LossConfig(advantage_eps=1e-4),
        )
        weights = {}
        for name, tensor in decoder.state_dict().items():
            weights[name] = tensor.clone()
        self.policy = Sharded(
            Decoder(decoder.config),
            weights.__getitem__,
            device=torch.device("cpu"),
            gradient_checkpointing=self.cfg.train.gradient_checkpointing,
        )
        self.loss = resolve_objective(self.cfg.loss, self.cfg.model)
        self.optimizer = Optimizer(self.policy, self.cfg.optimizer, 10**6)
        with unsharded(self.policy):
            self.cache = make_cache(self.policy)

    def run_step(self, number: int, texts: list[str]) -> None:
        clock = self.clock
        sampling = self.cfg.sampling
        shape = (len(texts), sampling.group_size, sampling.max_new_tokens)
        uniforms = np.random.default_rng(number).random(shape)
        clock.begin_step()
        prompts = self.make_prompts(texts)
        with unsharded(self.policy):
            with clock.time_phase("sample"):
                rollouts = generate(
                    self.policy,
                    prompts,
                    sampling.group_size,
                    sampling.temperature,
                    sampling.max_new_tokens,
                    frozenset(),
                    uniforms,
                    self.cache,
                )
            with clock.time_phase("reward"):
                rewards = self.score_rollouts(rollouts)
        record, norm = self.update_policy(rollouts, rewards)
        clock.end_step()

        totals = [reward.total for reward in rewards]
        lengths = [len(rollout.ids) for rollout in rollouts]
        row = dict(
            reward=float(np.mean(totals)),
            length=float(np.mean(lengths)),
            norm=norm,
            distinct=len(record.unique) / len(rollouts),
        )
        self.rows.append(row)

    def make_prompts(self, texts: list[str]) -> list[Prompt]:
        prompts = []
        all_ids = self.tokenizer(texts)["input_ids"]
        for number, (text, ids) in enumerate(zip(texts, all_ids)):
            prompts.append(Prompt(str(number), number, text, tuple(ids)))
        return prompts

    def score_rollouts(self, rollouts: list[Rollout]) -> list[Reward]:
        texts = self.tokenizer.batch_decode([rollout.ids for rollout in rollouts])
        return [Reward(score_text(text)) for text in texts]

    def update_policy(
        self, rollouts: list[Rollout], rewards: list[Reward]
    ) -> tuple[StepRecord, float]:
        clock = self.clock
        cfg = self.cfg
        loss = self.loss
        texts, first = deduplicate(rollouts)
        totals = torch.tensor([reward.total for reward in rewards])
        advantages = compute_group_advantages(
            totals, cfg.sampling.group_size, loss.advantage, cfg.loss
        )
        record = StepRecord(rollouts, rewards, advantages.tolist(), texts, first)
        for total, batches in make_updates(
            self.policy, None, texts, advantages[first], cfg, loss.agg_mode
        ):
            for batch in batches:
                with clock.time_phase("forward"):
                    value, logp, stats = compute_policy_loss(
                        self.policy, batch, total, cfg.sampling.temperature, loss
                    )
                with clock.time_phase("backward"):
                    value.backward()
                record.add(value, logp, batch, stats)
            with clock.time_phase("optimizer"):
                norm, _ = self.optimizer.step()
        return record, norm


class Theirs(TrainerCallback):
    """Run trainer.train(), its steps and their phases timed, and a step of ours beside each."""

    def __init__(
        self, size: Size, model, tokenizer, ours: Ours, texts: list[list[str]], folder: str
    ):
        self.ours = ours
        self.texts = texts
        self.clock = Clock()
        self.rows = []
        self.first = None
        config = GRPOConfig(
            output_dir=folder,
            max_steps=len(texts),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_num_workers=0,
            shuffle_dataset=False,
            learning_rate=ours.cfg.optimizer.lr,
            weight_decay=ours.cfg.optimizer.weight_decay,
            lr_scheduler_type="constant",
            per_device_train_batch_size=size.batch,
            gradient_accumulation_steps=size.prompts * size.group // size.batch,
            num_generations=size.group,
            num_iterations=1,
            max_completion_length=size.completion,
            temperature=1.0,
            beta=0.0,
        )
        prompts = list(chain.from_iterable(texts))
        self.trainer = GRPOTrainer(
            model=model,
            reward_funcs=self.score_completions,
            args=config,
            train_dataset=Dataset.from_dict(dict(prompt=prompts)),
            processing_class=tokenizer,
            callbacks=[self],
        )
        self.trainer.remove_callback(PrinterCallback)
        self.watch_phases(self.trainer, self.clock)

    def watch_phases(self, trainer: GRPOTrainer, clock: Clock) -> None:
        """Time TRL's phases: they are its own methods.

        The optimizer's begins at the clipping and ends with the step.
        """
        compute = clock.wrap("forward", trainer.compute_loss)
        clip = trainer.accelerator.clip_grad_norm_

        def compute_loss(model, inputs, *args, **kwargs):
            self.inputs.append(inputs)
            return compute(model, inputs, *args, **kwargs)

        def clip_grad_norm_(*args, **kwargs):
            self.clipping = perf_counter()
            self.norm = clip(*args, **kwargs)
            return self.norm

        trainer._generate_single_turn = clock.wrap("sample", trainer._generate_single_turn)
        trainer._calculate_rewards = clock.wrap("reward", trainer._calculate_rewards)
        trainer.compute_loss = compute_loss
        trainer.accelerator.clip_grad_norm_ = clip_grad_norm_
        trainer.accelerator.backward = clock.wrap("backward", trainer.accelerator.backward)

    def score_completions(self, prompts: list[str], completions: list[str], **_) -> list[float]:
        self.prompts = prompts
        self.rewards = [score_text(text) for text in completions]
        return self.rewards

    def on_step_begin(self, args, state, control, **_):
        self.inputs = []  # by micro-batch
        number = state.global_step
        if number % 2:
            self.ours.run_step(number, self.texts[number])
        self.clock.begin_step()

    def on_step_end(self, args, state, control, **_):
        self.clock.phases["optimizer"] = perf_counter() - self.clipping
        self.clock.end_step()
        number = state.global_step - 1
        self.check_prompts(self.texts[number])
        prompts = self.join_inputs("prompt_ids")
        ids = self.join_inputs("completion_ids")
        lengths = self.join_inputs("completion_mask").sum(1)
        row = dict(
            reward=float(np.mean(self.rewards)),
            length=lengths.float().mean().item(),
            norm=float(self.norm),
            distinct=len(ids.unique(dim=0)) / len(ids),
        )
        self.rows.append(row)
        if self.first is None:
            self.first = (prompts.tolist(), ids.tolist(), float(self.norm))
        if number % 2 == 0:
            self.ours.run_step(number, self.texts[number])

    def check_prompts(self, texts: list[str]) -> None:
        """Assert that TRL asked for the step's own prompts, each for its whole group."""
        group = len(self.prompts) // len(texts)
        want = []
        for text in texts:
            want += [text] * group
        assert self.prompts == want

    def join_inputs(self, name: str) -> torch.Tensor:
        """Return a tensor of all micro-batches of the step."""
        return torch.cat([inputs[name] for inputs in self.inputs])


def compare_gradients(
    ours: Ours, prompts: list[list[int]], completions: list[list[int]], their_norm: float
) -> float:
    """Return the relative difference of gradient norms on the texts of TRL's first step.

    Ours is of an untrained model.
    """
    # TRL shuffles them
    together = sorted(zip(prompts, completions))
    rollouts = []
    for number, (prompt_ids, ids) in enumerate(together):
        row, sibling = divmod(number, ours.cfg.sampling.group_size)
        prompt = Prompt("", row, "", tuple(prompt_ids))
        logp = (0.0,) * len(ids)
        rollouts.append(Rollout(prompt, row, sibling, tuple(ids), logp, False))
    ours.clock.begin_step()
    _, norm = ours.update_policy(rollouts, ours.score_rollouts(rollouts))
    return abs(norm / their_norm - 1)


def measure_pairs(name: str, size: Size, pairs: int) -> list[dict]:
    """Run both sides in turn, print their figures and return the bars."""
    texts = draw_texts(size, WARM + pairs)
    decoder, model, tokenizer = make_models(size)
    ours = Ours(size, decoder, tokenizer)
    untrained = Ours(size, decoder, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        trl = Theirs(size, model, tokenizer, ours, texts, folder)
        trl.trainer.train()

    print(
        f"{name}: {ours.policy.size:,} parameters, {size.prompts} prompts of {size.prompt} x "
        f"{size.group} generations of {size.completion}, "
        f"{torch.get_num_threads()} threads, {pairs} pairs"
    )
    print_header()
    print_side("TRL", trl)
    print_side("ours", ours)
    our_seconds = ours.clock.get_seconds("step")
    their_seconds = trl.clock.get_seconds("step")
    ratio = compare_seconds(our_seconds, their_seconds)
    for row in ours.rows + trl.rows:
        assert row["length"] == size.completion
    difference = compare_gradients(untrained, *trl.first)
    print(f"  gradient norm on TRL's first texts: relative difference {difference:.1e}")

    time_name = f"{name}: seconds per step, ours / TRL"
    norm_name = f"{name}: gradient norm on the same texts, relative difference"
    return [
        dict(name=time_name, value=round(ratio, 4), bar=size.bar, ok=ratio <= size.bar),
        dict(name=norm_name, value=difference, bar=1e-4, ok=difference <= 1e-4),
    ]


def draw_texts(size: Size, steps: int) -> list[list[str]]:
    """Draw the prompts of all steps: random words."""
    random = np.random.default_rng(0)
    texts = []
    for _ in range(steps):
        step_texts = []
        for _ in range(size.prompts):
            words = [f"w{i}" for i in random.integers(size.vocabulary, size=size.prompt)]
            step_texts.append(" ".join(words))
        texts.append(step_texts)
    return texts


def print_header() -> None:
    """Print the names of the columns."""
    columns = [*PHASES, "reward", "length", "distinct", "norm"]
    print(f"  {'seconds':<8}" + "".join(f"{column:>11}" for column in columns))


def print_side(name: str, side: Ours | Theirs) -> None:
    """Print a side's median seconds, and what it sampled."""
    columns = ""
    for phase in PHASES:
        columns += f"{median(side.clock.get_seconds(phase)):11.3f}"
    for key in ("reward", "length", "distinct", "norm"):
        mean = np.mean([row[key] for row in side.rows])
        columns += f"{mean:11.4f}"
    print(f"  {name:<8}{columns}")


def compare_seconds(ours: list[float], theirs: list[float]) -> float:
    """Print the comparison of the steps' seconds; return the ratio of the medians."""
    ratio = median(ours) / median(theirs)
    fastest = min(ours) / min(theirs)
    by_pair = " ".join(f"{our / their:.3f}" for our, their in zip(ours, theirs))
    print(f"  ours / TRL {ratio:.3f}; of the fastest steps {fastest:.3f}; by pair {by_pair}")
    return ratio


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="all", choices=[*SIZES, "all"])
    parser.add_argument("--pairs", type=int, help="default: 5, of the long shape 3")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--dry-run", action="store_true", help="a tiny size: its times mean nothing"
    )
    return parser.parse_args()


def main() -> int:
    """Run the shapes and print the bars."""
    args = parse_arguments()
    memory.keep_freed_pages()  # as run.py does; here TRL profits too
    torch.set_num_threads(args.threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)  # of transformers, about its own names
    if args.dry_run:
        sizes = {"dry run": DRY}
    elif args.shape == "all":
        sizes = SIZES
    else:
        sizes = {args.shape: SIZES[args.shape]}
    bars = []
    for name, size in sizes.items():
        bars += measure_pairs(name, size, args.pairs or size.pairs)
    print(json.dumps({"bars": bars}))
    return 0 if all(bar["ok"] for bar in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
