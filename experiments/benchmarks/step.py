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

    def begin(self) -> None:
        self.phases = defaultdict(float)
        self.began = perf_counter()

    @contextmanager
    def phase(self, name: str):
        start = perf_counter()
        yield
        self.phases[name] += perf_counter() - start

    def timed(self, name: str, function):
        """Return the function with its calls counted to the phase."""

        def run(*args, **kwargs):
            with self.phase(name):
                return function(*args, **kwargs)

        return run

    def end(self) -> None:
        whole = perf_counter() - self.began
        self.steps.append(dict(self.phases, rest=whole - sum(self.phases.values()), step=whole))


def make_models(size: Size) -> tuple[Decoder, torch.nn.Module, PreTrainedTokenizerFast]:
    """Make our decoder and transformers' model with the same random weights, and a tokenizer.

    The tokenizer's tokens are words: w0, w1, ...
    """
    decoder, model = make_twins(
        make_qwen2_config(size.layers, size.width, size.inner, size.heads, size.vocabulary)
    )
    core = Tokenizer(
        models.WordLevel(
            {f"w{i}": i for i in range(size.vocabulary)} | {"<stop>": size.vocabulary},
            unk_token="<stop>",
        )
    )
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return (
        decoder,
        model,
        PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<stop>", pad_token="<stop>"),
    )


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
        self.shown = []
        # TRL adds 1e-4 to the standard deviation: the one setting that is not our default, so that
        # gradients can be compared
        self.cfg = Config(
            sampling=SamplingConfig(group_size=size.group, max_new_tokens=size.completion),
            loss=LossConfig(advantage_eps=1e-4),
        )
        weights = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
        self.policy = Sharded(
            Decoder(decoder.config),
            weights.__getitem__,
            device=torch.device("cpu"),
            checkpointing=self.cfg.train.gradient_checkpointing,
        )
        self.loss = resolve_objective(self.cfg.loss, self.cfg.model)
        self.optimizer = Optimizer(self.policy, self.cfg.optimizer, 10**6)
        with unsharded(self.policy):
            self.cache = make_cache(self.policy)

    def step(self, number: int, texts: list[str]) -> None:
        clock = self.clock
        s = self.cfg.sampling
        uniforms = np.random.default_rng(number).random(
            (len(texts), s.group_size, s.max_new_tokens)
        )
        clock.begin()
        prompts = [
            Prompt(str(i), i, text, tuple(ids))
            for i, (text, ids) in enumerate(zip(texts, self.tokenizer(texts)["input_ids"]))
        ]
        with unsharded(self.policy):
            with clock.phase("sample"):
                rollouts = generate(
                    self.policy,
                    prompts,
                    s.group_size,
                    s.temperature,
                    s.max_new_tokens,
                    frozenset(),
                    uniforms,
                    self.cache,
                )
            with clock.phase("reward"):
                rewards = [
                    Reward(score_text(text))
                    for text in self.tokenizer.batch_decode([r.ids for r in rollouts])
                ]
        done, norm = self.update(rollouts, rewards)
        clock.end()
        self.shown.append(
            dict(
                reward=float(np.mean([r.total for r in rewards])),
                length=float(np.mean([len(r.ids) for r in rollouts])),
                norm=norm,
                distinct=len(done.unique) / len(rollouts),
            )
        )

    def update(self, rollouts: list[Rollout], rewards: list[Reward]) -> tuple[StepRecord, float]:
        clock = self.clock
        cfg = self.cfg
        texts, first = deduplicate(rollouts)
        adv = compute_group_advantages(
            torch.tensor([r.total for r in rewards]),
            cfg.sampling.group_size,
            self.loss.advantage,
            cfg.loss,
        )
        done = StepRecord(rollouts, rewards, adv.tolist(), texts, first)
        for total, batches in make_updates(
            self.policy, None, texts, adv[first], cfg, self.loss.agg_mode
        ):
            for batch in batches:
                with clock.phase("forward"):
                    value, logp, stats = compute_policy_loss(
                        self.policy, batch, total, cfg.sampling.temperature, self.loss
                    )
                with clock.phase("backward"):
                    value.backward()
                done.add(value, logp, batch, stats)
            with clock.phase("optimizer"):
                norm, _ = self.optimizer.step()
        return done, norm


class Theirs(TrainerCallback):
    """Run trainer.train(), its steps and their phases timed, and a step of ours beside each."""

    def __init__(
        self, size: Size, model, tokenizer, ours: Ours, texts: list[list[str]], folder: str
    ):
        self.ours = ours
        self.texts = texts
        self.clock = Clock()
        self.shown = []
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
        data = Dataset.from_dict(dict(prompt=[text for step in texts for text in step]))
        self.trainer = GRPOTrainer(
            model=model,
            reward_funcs=self.reward,
            args=config,
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[self],
        )
        self.trainer.remove_callback(PrinterCallback)
        self.watch(self.trainer, self.clock)

    def watch(self, trainer: GRPOTrainer, clock: Clock) -> None:
        """Time TRL's phases: they are its own methods.

        The optimizer's begins at the clipping and ends with the step.
        """
        compute = clock.timed("forward", trainer.compute_loss)
        clip = trainer.accelerator.clip_grad_norm_

        def compute_loss(model, inputs, *args, **kwargs):
            self.inputs.append(inputs)
            return compute(model, inputs, *args, **kwargs)

        def clip_grad_norm_(*args, **kwargs):
            self.clipping = perf_counter()
            self.norm = clip(*args, **kwargs)
            return self.norm

        trainer._generate_single_turn = clock.timed("sample", trainer._generate_single_turn)
        trainer._calculate_rewards = clock.timed("reward", trainer._calculate_rewards)
        trainer.compute_loss = compute_loss
        trainer.accelerator.clip_grad_norm_ = clip_grad_norm_
        trainer.accelerator.backward = clock.timed("backward", trainer.accelerator.backward)

    def reward(self, prompts: list[str], completions: list[str], **_) -> list[float]:
        self.asked = prompts
        self.rewards = [score_text(text) for text in completions]
        return self.rewards

    def on_step_begin(self, args, state, control, **_):
        self.inputs = []  # by micro-batch
        if state.global_step % 2:
            self.ours.step(state.global_step, self.texts[state.global_step])
        self.clock.begin()

    def on_step_end(self, args, state, control, **_):
        self.clock.phases["optimizer"] = perf_counter() - self.clipping
        self.clock.end()
        number = state.global_step - 1
        lengths = torch.cat([inputs["completion_mask"] for inputs in self.inputs])
        ids = torch.cat([inputs["completion_ids"] for inputs in self.inputs])
        prompts = torch.cat([inputs["prompt_ids"] for inputs in self.inputs])
        assert self.asked == [
            text
            for text in self.texts[number]
            for _ in range(len(self.asked) // len(self.texts[number]))
        ]
        self.shown.append(
            dict(
                reward=float(np.mean(self.rewards)),
                length=lengths.sum(1).float().mean().item(),
                norm=float(self.norm),
                distinct=len(ids.unique(dim=0)) / len(ids),
            )
        )
        self.first = self.first or (prompts.tolist(), ids.tolist(), float(self.norm))
        if number % 2 == 0:
            self.ours.step(number, self.texts[number])


def compare_gradients(
    ours: Ours, prompts: list[list[int]], completions: list[list[int]], norm: float
) -> float:
    """Return the relative difference of gradient norms on the texts of TRL's first step.

    Ours is of an untrained model.
    """
    # TRL shuffles them
    group = ours.cfg.sampling.group_size
    together = sorted(zip(prompts, completions))
    rollouts = [
        Rollout(
            Prompt("", i // group, "", tuple(p)),
            i // group,
            i % group,
            tuple(c),
            (0.0,) * len(c),
            False,
        )
        for i, (p, c) in enumerate(together)
    ]
    ours.clock.begin()
    _, mine = ours.update(
        rollouts,
        [
            Reward(score_text(text))
            for text in ours.tokenizer.batch_decode([r.ids for r in rollouts])
        ],
    )
    return abs(mine / norm - 1)


def measure_pairs(name: str, size: Size, pairs: int) -> list[dict]:
    """Run both sides in turn and print their figures."""
    steps = WARM + pairs
    random = np.random.default_rng(0)
    texts = [
        [
            " ".join(f"w{i}" for i in random.integers(size.vocabulary, size=size.prompt))
            for _ in range(size.prompts)
        ]
        for _ in range(steps)
    ]
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
    print(
        f"  {'seconds':<8}"
        + "".join(f"{phase:>11}" for phase in PHASES)
        + f"{'reward':>11}{'length':>11}{'distinct':>11}{'norm':>11}"
    )
    for who, side in (("TRL", trl), ("ours", ours)):
        print(
            f"  {who:<8}"
            + "".join(
                f"{median(s[phase] for s in side.clock.steps[WARM:]):11.3f}" for phase in PHASES
            )
            + "".join(
                f"{np.mean([s[key] for s in side.shown]):11.4f}"
                for key in ("reward", "length", "distinct", "norm")
            )
        )
    whole = [[s["step"] for s in side.clock.steps[WARM:]] for side in (ours, trl)]
    ratio = median(whole[0]) / median(whole[1])
    print(
        f"  ours / TRL {ratio:.3f}; of the fastest steps {min(whole[0]) / min(whole[1]):.3f}; "
        f"by pair {' '.join(f'{a / b:.3f}' for a, b in zip(*whole))}"
    )
    for side in (ours, trl):
        assert all(s["length"] == size.completion for s in side.shown)
    off = compare_gradients(untrained, *trl.first)
    print(f"  gradient norm on TRL's first texts: relative difference {off:.1e}")
    return [
        dict(
            name=f"{name}: seconds per step, ours / TRL",
            value=round(ratio, 4),
            bar=size.bar,
            ok=ratio <= size.bar,
        ),
        dict(
            name=f"{name}: gradient norm on the same texts, relative difference",
            value=off,
            bar=1e-4,
            ok=off <= 1e-4,
        ),
    ]


def main() -> int:
    """Run the shapes and print the bars."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="all", choices=[*SIZES, "all"])
    parser.add_argument("--pairs", type=int, help="default: 5, of the long shape 3")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--dry-run", action="store_true", help="a tiny size: its times mean nothing"
    )
    args = parser.parse_args()
    memory.keep_freed_pages()  # as run.py does; here TRL profits too
    torch.set_num_threads(args.threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)  # of transformers, about its own names
    sizes = (
        {"dry run": DRY}
        if args.dry_run
        else {name: size for name, size in SIZES.items() if args.shape in (name, "all")}
    )
    bars = [
        bar
        for name, size in sizes.items()
        for bar in measure_pairs(name, size, args.pairs or size.pairs)
    ]
    print(json.dumps({"bars": bars}))
    return 0 if all(bar["ok"] for bar in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
