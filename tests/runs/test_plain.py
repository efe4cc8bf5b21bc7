"""recr1.plain and recr1.train are one algorithm: from the same config come the same rollouts, the
same rewards and the same weights.

The two share the config, the data, the retriever and the random numbers, and nothing of the
algorithm: plain's model is transformers'. What is compared is what the two leave in their folders.
"""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.tiny_world import FAMILIES, jsonl, refused, write_policy, write_yaml
from safetensors.torch import load_file
from test_ranks import torchrun

from recr1 import plain, train
from recr1.commands.explain import explain_step
from recr1.distributed.fsdp import Sharded
from recr1.rl import advantages, kl
from recr1.training import load_model
from recr1.training.launch import run_guarded
from recr1.training.optimizer import Optimizer
from recr1.training.plain_run import PlainRun
from recr1.training.run import Run

ROOT = Path(__file__).resolve().parents[2]
STEPS = 3

MODELS = {
    "quickstart": None,  # experiments/policy
    "qwen3": dict(family="qwen3", head_dim=16, vocab_size=420),  # more ids than the tokenizer has
    "llama": FAMILIES["llama"],
}
# Two group sizes, with and without KL; beside them what else plain.py has.
VARIANTS = {
    "G 4": {"sampling.group_size": 4},
    "G 4, KL": {
        "sampling.group_size": 4,
        "loss.kl_coef": 0.05,
        "loss.kind": "dr_grpo",
        "optimizer.warmup_steps": 2,
        "optimizer.min_lr_ratio": 0.1,
    },
    "G 6": {
        "sampling.group_size": 6,
        "sampling.temperature": 1.3,
        "loss.kind": "dapo",
        "loss.clip_ratio_low": 0.001,
        "loss.clip_ratio_high": 0.002,
        "train.num_mini_batches": 2,
        "optimizer.weight_decay": 0.1,
    },
    "G 6, KL": {
        "sampling.group_size": 6,
        "sampling.temperature": 0.9,
        "loss.kl_coef": 0.05,
        "loss.agg_mode": "seq-mean-token-mean",
        "data.shuffle_words": 0.6,
    },
}

# The largest deviation that the contract allows, by what deviates. Log-probs absolute, the others
# relative; `weights` is the norm of the difference to that of all weights.
# A unit in the last place of a logit of 20 is 1.9e-6, and CPUs add in different orders: a log-prob
# was up to 1.1e-5 apart on one of three.
LIMITS = {
    "ids": 0.0,
    "rewards": 0.0,
    "advantages": 1e-6,
    "sampler_logp": 2e-5,
    "trainer_logp": 2e-5,
    "ref_logp": 2e-5,
    "lr": 0.0,
    "loss": 1e-4,  # its terms cancel
    "kl": 1e-4,
    "grad_norm": 5e-5,
    "weights": 1e-6,
}
# In float64 what is left is transformers' own: it computes norms and rope in float32.
LIMITS_FLOAT64 = LIMITS | dict(weights=1e-8)

# A token may differ where the random number is so near to an edge between two ids.
NEAR = 1e-5


# --- Runs, and how far two of them are apart ------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> str:
    """A config of three small steps that logs all tokens and saves the weights of each step."""
    folder = tmp_path_factory.mktemp("plain")
    for name, shape in MODELS.items():
        if shape is not None:
            write_policy(folder / name, **shape)
    settings = {
        "train.steps": STEPS,
        "train.eval_every": 0,
        "log.tokens_every": 1,
        "log.show_every": 0,
        "optimizer.lr": 3e-4,  # the quickstart's
        # AdamW divides a gradient by its own size, so rounding moves a weight as far as a gradient
        # does. With this eps what is far below it moves nothing.
        "optimizer.eps": 1e-5,
        "save.every": 1,
        "save.keep_last": STEPS,
    }
    return write_yaml(folder, **settings)


def make_arguments(world: str, model: str, settings: dict) -> list[str]:
    folder = ROOT / "experiments/policy" if model == "quickstart" else Path(world).parent / model
    overrides = [f"{key}={value}" for key, value in settings.items()]
    return [world, f"model.path={folder}", *overrides]


def run_fast(arguments: list[str], folder: Path, patch: pytest.MonkeyPatch) -> list[list]:
    """Run recr1.train. Returns the rollouts of each step, all siblings."""
    rollouts = []
    generate = train.generate

    def keep_rollouts(*args, **kwargs):
        rollouts.append(generate(*args, **kwargs))
        return rollouts[-1]

    patch.setattr(train, "generate", keep_rollouts)
    assert run_guarded(train.main, [*arguments, f"run.dir={folder}"]) == 0
    return rollouts


def run_plain(
    arguments: list[str], folder: Path, patch: pytest.MonkeyPatch, rollouts: list[list]
) -> tuple[list[dict], int]:
    """Run recr1.plain. Returns the weights after each update, and how many rollouts differed.

    rollouts: the fast run's, by step. Where plain samples another token, and may, it goes on with
    theirs. Empty: nothing is compared.
    """
    states = []
    num_other = 0
    left = iter([None, *rollouts])  # it begins with the test split
    sample = plain.sample
    update_weights = plain.update_weights

    def sample_and_compare(policy, prompts, uniforms, run):
        nonlocal num_other
        ours = sample(policy, prompts, uniforms, run)
        theirs = next(left, None)
        if uniforms is None or theirs is None:
            return ours
        assert [r.prompt.ids for r in ours] == [r.prompt.ids for r in theirs]
        for row, (our, their) in enumerate(zip(ours, theirs)):
            if our.ids != their.ids and is_near_edge(policy, our, their, uniforms[row], run):
                num_other += 1
                ours[row] = replace(our, ids=their.ids, sampler_logp=their.sampler_logp)
        return ours

    def update_and_keep(policy, *args):
        norm = update_weights(policy, *args)
        states.append({name: t.clone() for name, t in policy.state_dict().items()})
        return norm

    patch.setattr(plain, "sample", sample_and_compare)
    patch.setattr(plain, "update_weights", update_and_keep)
    assert run_guarded(plain.main, [*arguments, f"run.dir={folder}"]) == 0
    return states, num_other


def is_near_edge(policy, our, their, uniforms: torch.Tensor, run) -> bool:
    """Whether the first token that differs was drawn where the two ids meet."""
    pairs = list(zip(our.ids, their.ids))
    t = next(t for t, (a, b) in enumerate(pairs) if a != b)
    tokens, is_text = plain.pad([(our.prompt.ids, our.ids[:t])], t)
    with torch.no_grad():
        log_pi = plain.compute_log_pi(policy, tokens, is_text, 1, run)[0, 0]
    edge = log_pi.double().exp().cumsum(-1)[min(pairs[t])]
    return abs(float(uniforms[t] - edge)) < NEAR


def measure_deviations(plain_run: Path, fast_run: Path, states: list[dict]) -> dict[str, float]:
    """Return the largest deviation of each kind (LIMITS) of the two runs."""
    ours = jsonl(plain_run / "rollouts.jsonl.gz")
    theirs = jsonl(fast_run / "rollouts.jsonl.gz")
    keys = ("step", "prompt", "prompt_ids", "sibling", "count", "ids", "finished", "text")
    found = dict(ids=float(select(ours, keys) != select(theirs, keys)))
    found["rewards"] = float(
        select(ours, ("reward", "reward_terms", "error"))
        != select(theirs, ("reward", "reward_terms", "error"))
    )
    found["advantages"] = largest(
        [[r["advantage"]] for r in ours], [[r["advantage"]] for r in theirs]
    )
    for name in ("sampler_logp", "trainer_logp", "ref_logp"):
        found[name] = largest([r[name] for r in ours], [r[name] for r in theirs])

    our_rows = jsonl(plain_run / "metrics.jsonl")
    their_rows = jsonl(fast_run / "metrics.jsonl")
    for name in ("lr", "loss", "kl", "grad_norm"):
        found[name] = max(relative(a[name], b[name]) for a, b in zip(our_rows, their_rows))

    found["weights"] = 0.0
    updates = len(states) // len(their_rows)
    for row in their_rows:
        step = row["step"]
        state = states[step * updates - 1]
        saved = load_file(fast_run / f"checkpoints/step_{step:06d}/model/model.safetensors")
        difference = sum((state[name] - saved[name]).double().square().sum() for name in saved)
        size = sum(tensor.double().square().sum() for tensor in saved.values())
        found["weights"] = max(found["weights"], math.sqrt(difference / size))
    return found


def select(rows: list[dict], keys: tuple[str, ...]) -> list[list]:
    return [[row[key] for key in keys] for row in rows]


def largest(ours: list, theirs: list) -> float:
    """The largest difference of two lists of lists; infinite where they do not fit."""
    if [a and len(a) for a in ours] != [b and len(b) for b in theirs]:
        return math.inf
    worst = 0.0
    for a, b in zip(ours, theirs):
        for x, y in zip(a or [], b or []):
            worst = max(worst, abs(x - y))
    return worst


def relative(ours: float | None, theirs: float | None) -> float:
    if ours is None or theirs is None:
        return 0.0 if ours is theirs else math.inf
    return abs(ours - theirs) / max(abs(theirs), 1e-3)


def list_broken(deviations: dict[str, float], limits: dict[str, float]) -> list[str]:
    return [name for name, limit in limits.items() if not deviations[name] <= limit]


# --- The contract ---------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model", MODELS)
def test_same_rollouts_rewards_and_weights(model, variant, world, tmp_path, monkeypatch):
    arguments = make_arguments(world, model, VARIANTS[variant])
    rollouts = run_fast(arguments, tmp_path / "fast", monkeypatch)
    states, num_other = run_plain(arguments, tmp_path / "plain", monkeypatch, rollouts)
    found = measure_deviations(tmp_path / "plain", tmp_path / "fast", states)
    print(f"{model}, {variant}: {num_other} other tokens", json.dumps(found))
    # Where a token differs plain goes on with the fast run's: what was found holds all the same.
    assert not list_broken(found, LIMITS)
    steps_that_teach = {
        r["step"] for r in jsonl(tmp_path / "plain/rollouts.jsonl.gz") if r["advantage"]
    }
    assert steps_that_teach


@pytest.mark.parametrize("model", MODELS)
def test_the_same_in_float64(model, world, tmp_path, monkeypatch):
    """The difference that is left is that of float32 norms and rope in transformers' model."""

    def load_in_float64(run):
        return inner(run).double()

    def shard_in_float64(decoder, read, **kwargs):
        return Sharded(decoder, read, **kwargs | dict(master=torch.float64, compute=torch.float64))

    inner = plain.load_model
    monkeypatch.setattr(plain, "load_model", load_in_float64)
    monkeypatch.setattr(load_model, "Sharded", shard_in_float64)
    arguments = make_arguments(world, model, VARIANTS["G 4, KL"])
    rollouts = run_fast(arguments, tmp_path / "fast", monkeypatch)
    states, num_other = run_plain(arguments, tmp_path / "plain", monkeypatch, rollouts)
    found = measure_deviations(tmp_path / "plain", tmp_path / "fast", states)
    print(f"{model}, float64: {num_other} other tokens", json.dumps(found))
    assert next(iter(states[0].values())).dtype == torch.float64
    assert not list_broken(found, LIMITS_FLOAT64)


def test_the_same_on_two_ranks(world, tmp_path, monkeypatch):
    runs = []
    for model in MODELS:
        arguments = make_arguments(world, model, VARIANTS["G 6, KL"])
        runs.append([*arguments, f"run.dir={tmp_path / model / 'fast'}"])
    (tmp_path / "runs.json").write_text(json.dumps(runs), encoding="utf-8")
    torchrun(2, str(ROOT / "tests/helpers/fast_runs.py"), str(tmp_path / "runs.json"))

    for model, arguments in zip(MODELS, runs):
        with monkeypatch.context() as patch:
            states, _ = run_plain(arguments, tmp_path / model / "plain", patch, [])
        found = measure_deviations(tmp_path / model / "plain", tmp_path / model / "fast", states)
        print(f"{model}, 2 ranks:", json.dumps(found))
        assert not list_broken(found, LIMITS), model


def test_explain_reads_a_plain_run(world, tmp_path):
    """`recr1 explain` works the step again in numpy and by our decoder: all its checks agree."""
    arguments = make_arguments(world, "llama", {"loss.kl_coef": 0.05, "train.steps": 1})
    assert run_guarded(plain.main, [*arguments, f"run.dir={tmp_path / 'run'}"]) == 0
    text, result = explain_step(str(tmp_path / "run"), 1)
    assert set(result["checks"]) == {"advantages", "loss", "grad_logp_norm", "grad_norm"}
    assert all(check["off"] is not None for check in result["checks"].values())
    assert result["agrees"], text


@pytest.mark.parametrize(
    "setting",
    ["loss.kind=gspo", "loss.kl_in=reward", "sampling.top_p=0.9", "train.frozen='*norm*'"],
)
def test_what_plain_lacks_is_refused(setting, world, tmp_path, capsys):
    folder = tmp_path / "run"
    message = refused([world, setting, f"run.dir={folder}"], capsys, main=plain.main)
    assert message.startswith(f"recr1: {setting.partition('=')[0]}: ")
    assert "python -m recr1.train" in message
    assert not folder.exists()


# --- Planted mistakes -----------------------------------------------------------------------------

# One step of two updates: after it a mistake has moved the weights, and then everything differs.
MISTAKEN = {
    "train.steps": 1,
    "sampling.group_size": 4,
    "sampling.temperature": 0.7,
    "loss.kl_coef": 0.05,
    "loss.clip_ratio_low": 0.001,
    "train.num_mini_batches": 2,
    "optimizer.lr": 1e-2,
    "optimizer.warmup_steps": 2,
    "optimizer.weight_decay": 0.1,
}


def wrap(patch, owner, name: str, wrapper) -> None:
    """Put wrapper(the function itself, its arguments ...) in a function's place."""
    inner = getattr(owner, name)
    patch.setattr(owner, name, lambda *args, **kwargs: wrapper(inner, *args, **kwargs))


def negate_loss(patch):
    wrap(patch, plain, "compute_loss", lambda inner, *args: -inner(*args))


def shift_mask(patch):
    wrap(patch, plain, "weigh_tokens", lambda inner, mask, cfg: inner(mask.roll(1, 1), cfg))


def leave_out_end_token(patch):
    def weigh(inner, mask, cfg):
        next_mask = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1)
        return inner(mask & next_mask, cfg)

    wrap(patch, plain, "weigh_tokens", weigh)


def average_over_sequences(patch):
    def weigh(inner, mask, cfg):
        return inner(mask, replace(cfg, loss=replace(cfg.loss, agg_mode="seq-mean-token-mean")))

    wrap(patch, plain, "weigh_tokens", weigh)


def train_without_temperature(patch):
    def compute(inner, model, tokens, is_text, run):
        cfg = replace(run.cfg, sampling=replace(run.cfg.sampling, temperature=1.0))
        other = copy.copy(run)
        other.cfg = cfg
        return inner(model, tokens, is_text, other)

    wrap(patch, plain, "compute_logp", compute)


def clip_widely(patch):
    def compute(inner, *args):
        *tensors, cfg = args
        return inner(*tensors, replace(cfg, loss=replace(cfg.loss, clip_ratio_low=0.2)))

    wrap(patch, plain, "compute_loss", compute)


def reward_at_another_depth(patch):
    patch.setattr(PlainRun, "score", lambda run, rollouts: run.test_scorer.score(rollouts))


def bias_std(patch):
    def normalize(rewards, config):
        std = rewards.std(1, correction=0, keepdim=True)
        return (rewards - rewards.mean(1, keepdim=True)) / (std + config.advantage_eps)

    patch.setitem(advantages.ADVANTAGES, "mean_std", normalize)


def turn_kl_around(patch):
    patch.setitem(kl.KL_ESTIMATORS, "k3", lambda logp, ref_logp: inner(ref_logp, logp))
    inner = kl.k3


def forget_siblings(patch):
    """Identical siblings are trained once, and not weighted by their number."""

    def deduplicate(inner, rollouts):
        unique, first = inner(rollouts)
        return [replace(rollout, count=1) for rollout in unique], first

    wrap(patch, train, "deduplicate", deduplicate)


def place_completions_later(patch):
    """Completions begin one position after their place."""

    def pack(inner, rollouts, *args):
        batches = inner(rollouts, *args)
        moved = []
        for batch in batches:
            num_prompt_rows = int(batch.layout.prompt_lengths.sum())
            positions = batch.positions.clone()
            positions[num_prompt_rows:] += 1
            moved.append(replace(batch, positions=positions))
        return moved

    wrap(patch, train, "pack_rollouts", pack)


def exchange_numbers_of_siblings(patch):
    def draw(inner, *args):
        uniforms = inner(*args)
        return uniforms[:, ::-1].copy()

    wrap(patch, Run, "draw_uniforms", draw)


def warm_up_too_late(patch):
    wrap(patch, Optimizer, "get_lr_scale", lambda inner, self, step: inner(self, max(0, step - 1)))


def decay_no_weights(patch):
    def make(inner, params, config):
        return inner(params, replace(config, weight_decay=0.0))

    from recr1.training import optimizer

    wrap(patch, optimizer, "make_adamw", make)


# (where, what): what sees it first, in the order of LIMITS
MISTAKES = {
    ("plain", negate_loss): "loss",
    ("plain", shift_mask): "loss",
    ("plain", leave_out_end_token): "loss",
    ("plain", average_over_sequences): "loss",
    ("plain", train_without_temperature): "trainer_logp",
    ("plain", clip_widely): "loss",
    ("plain", reward_at_another_depth): "rewards",
    ("fast", bias_std): "advantages",
    ("fast", turn_kl_around): "loss",
    ("fast", forget_siblings): "ids",
    ("fast", place_completions_later): "trainer_logp",
    ("fast", exchange_numbers_of_siblings): "ids",
    ("fast", warm_up_too_late): "lr",
    ("fast", decay_no_weights): "loss",
}


@pytest.fixture(scope="module")
def right(world, tmp_path_factory) -> tuple[Path, Path, list[dict]]:
    """Both runs without a mistake: their folders, and plain's weights."""
    folder = tmp_path_factory.mktemp("right")
    arguments = make_arguments(world, "policy", MISTAKEN)
    with pytest.MonkeyPatch.context() as patch:
        run_fast(arguments, folder / "fast", patch)
        states, _ = run_plain(arguments, folder / "plain", patch, [])
    return folder / "plain", folder / "fast", states


def test_no_mistake_is_seen_where_there_is_none(right):
    assert not list_broken(measure_deviations(*right), LIMITS)


@pytest.mark.parametrize(
    "where, mistake", MISTAKES, ids=[f"{where}: {m.__name__}" for where, m in MISTAKES]
)
def test_a_planted_mistake_is_caught(where, mistake, right, world, tmp_path, monkeypatch):
    """What is planted, and the first figure that is off by it, in the order of LIMITS.

    In plain: the loss with a wrong sign (loss), the mask shifted by one (loss), the end token not
    trained (loss), a mean over sequences in place of tokens (loss), no temperature in training
    (trainer_logp), another clip (loss), rewards at the depth of the evaluation (rewards).

    In the fast one: the biased std (advantages), the KL the other way round (loss), identical
    siblings weighted once (their number, under ids), completions one position too late
    (trainer_logp), the siblings' random numbers exchanged (ids), a warm-up one update late (lr),
    no weight decay (loss: that of the second update).
    """
    plain_run, fast_run, states = right
    arguments = make_arguments(world, "policy", MISTAKEN)
    mistake(monkeypatch)
    if where == "plain":
        plain_run = tmp_path / "plain"
        states, _ = run_plain(arguments, plain_run, monkeypatch, [])
    else:
        fast_run = tmp_path / "fast"
        run_fast(arguments, fast_run, monkeypatch)
    found = measure_deviations(plain_run, fast_run, states)
    broken = list_broken(found, LIMITS)
    print(where, mistake.__name__, {name: found[name] for name in broken})
    assert broken and broken[0] == MISTAKES[where, mistake]
