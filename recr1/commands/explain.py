"""One logged GRPO step with its real tensors, from prompt to gradient, worked again in numpy and
held against what the run logged: `recr1 explain`.

The chain is checked link by link, each with the inputs that the run itself had: rewards ->
advantages; advantages and per-token log-probs -> loss and d loss / d logp; that, pulled through the
weights before the update by torch -> the gradient's norm.

Legend: P prompts, G group, R = P*G rollouts, D distinct texts, N their tokens. A text's identical
siblings are one row of weight `count`.
"""

from __future__ import annotations

import inspect
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from recr1 import train
from recr1.config import loader as configs
from recr1.config.schema import Config, ConfigError, LossConfig
from recr1.distributed import collectives as dist
from recr1.model.log_probs import compute_log_probs
from recr1.rl import advantages, kl, losses, packing, policy_loss
from recr1.rl.replay import Replay
from recr1.tasks.scorer import Scorer
from recr1.training.load_model import COMPUTE_DTYPES, load_policy
from recr1.training.optimizer import Optimizer
from recr1.utils.files import Damaged, check_file, read_manifest
from recr1.utils.hf_hub import ModelFolderError, load_tokenizer, resolve_model_folder

# relative; of a loss, whose terms cancel, to a tenth of their sizes where that is more: float32
# knows it no better
EXACT = 1e-5

# bfloat16: 2e-5 with other micro-batches on one CPU; other kernels round otherwise
GRADIENT = {torch.float32: 1e-4, torch.bfloat16: 1e-2}

WORKED = {
    losses.clipped_surrogate,
    losses.sequence_clipped_surrogate,
    losses.cispo_surrogate,
    losses.reinforce_surrogate,
}

SHOWN = 16  # tokens of the text that is shown


@dataclass(frozen=True)
class Check:
    """A figure of the run beside ours. `off`: relative error (advantages: the largest error of
    one); allowed: what `off` may be; why: not checked.
    """

    name: str
    logged: float | None = None
    ours: float | None = None
    off: float | None = None
    allowed: float | None = None
    why: str = ""

    @property
    def agrees(self) -> bool:
        return bool(self.why) or bool(self.off <= self.allowed)  # NaN: no

    def figures(self) -> dict:
        """As JSON."""
        return {
            name: float(v) if isinstance(v, np.floating) else v for name, v in vars(self).items()
        } | dict(agrees=self.agrees)


@dataclass(frozen=True)
class LoggedStep:
    """A step as its run logged it. rows: of rollouts.jsonl.gz, siblings adjacent; metrics: its line
    of metrics.jsonl.
    """

    run: Path
    step: int
    cfg: Config
    replay: Replay
    rows: list[dict]
    metrics: dict


def read_logged_step(run: str, step: int) -> LoggedStep:
    """Raises ConfigError for what cannot be worked again, ReplayError."""
    folder = Path(run)
    cfg = configs.load_config(str(folder / "config.yaml"), [])
    replay = Replay(str(folder / "rollouts.jsonl.gz"))
    if step not in replay.steps:
        raise ConfigError(
            f"{run}: step {step} is not logged with its tokens (log.tokens_every); those are: {', '.join(map(str, replay.steps))}"
        )
    if cfg.train.inner_steps > 1:
        raise ConfigError(
            f"{run}: train.inner_steps is {cfg.train.inner_steps}: the log-probs of the second optimiser step on a batch are not saved, so its "
            "loss cannot be worked again; explain a run with train.inner_steps=1"
        )
    gain, advantage, _ = get_recipe(cfg.loss)
    for key, value, known in (
        ("kind", gain, losses.RECIPES),
        ("advantage", advantage, advantages.ADVANTAGES),
    ):
        if value is None:
            raise ConfigError(
                f"{run}: loss.{key} is {getattr(cfg.loss, key)!r}, a function of yours; explain knows {', '.join(known)}"
            )
    rows = replay.rows[replay.steps.index(step)]
    path = folder / "metrics.jsonl"
    try:
        metrics = next(
            (
                row
                for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())
                if row["step"] == step
            ),
            {},
        )
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ConfigError(f"{path}: cannot be read: {e}") from None
    if lacks := [name for name in ("loss", "dlogp_norm", "grad_norm") if metrics.get(name) is None]:
        raise ConfigError(
            f"{path}: step {step} has no {', '.join(lacks)}; the run was made by an older recr1, or is still at this step"
        )
    try:
        lengths = {
            len(
                {
                    len(row[name])
                    for name in ("ids", "sampler_logp", "old_logp", "trainer_logp", "entropy")
                }
            )
            for row in rows
        }
        reference = {row["ref_logp"] is not None for row in rows}
    except (KeyError, TypeError) as e:
        raise ConfigError(
            f"{replay.path}: a row of step {step} lacks per-token values: {e}"
        ) from None
    if (
        lengths != {1}
        or reference != {cfg.loss.kl > 0}
        or replay.sizes != {cfg.sampling.group_size}
    ):
        raise ConfigError(
            f"{replay.path}: step {step} is not what {folder / 'config.yaml'} would log; the files are not of one run"
        )
    return LoggedStep(folder, step, cfg, replay, rows, metrics)


def get_recipe(c: LossConfig) -> tuple:
    """Gain function, advantage's name (None: not ours), average."""
    gain, advantage, average = losses.RECIPES.get(c.kind, (None, "mean_std", "token"))
    name = c.advantage or advantage
    return (
        gain if gain in WORKED else None,
        name if name in advantages.ADVANTAGES else None,
        c.average or average,
    )


def compute_by_hand(cfg: Config, rows: list[dict]) -> dict:
    """The step in numpy: arrays by name, of R, D or N numbers as the comments say. float64, from
    the float32 values that the run logged.
    """
    c, (gain, advantage, average) = cfg.loss, get_recipe(cfg.loss)
    # (D,), (D,)
    n, count = (np.array(x) for x in zip(*((len(row["ids"]), row["count"]) for row in rows)))
    text = np.repeat(np.arange(len(rows)), n)  # (N,)
    # (N,)
    logp, old, sampler, H = (
        np.concatenate([row[name] for row in rows])
        for name in ("trainer_logp", "old_logp", "sampler_logp", "entropy")
    )
    r = np.array([row["reward"] for row in rows], np.float32)  # (D,)
    in_loss = c.kl * (c.kl_in == "loss")
    d = 0.0
    kl = 0.0
    if c.kl > 0:
        d = np.concatenate([row["ref_logp"] for row in rows]) - (logp if in_loss else sampler)
        kl = {"k1": -d, "k2": d**2 / 2, "k3": np.expm1(d) - d}[c.kl_estimator]  # (N,)
    if c.kl > 0 and not in_loss:
        r = r - np.float32(c.kl) * np.bincount(text, kl).astype(np.float32)
    r = np.repeat(r.astype(float), count).reshape(-1, cfg.sampling.group_size)  # (P, G)
    # (P, 1)
    mean = r.mean(1, keepdims=True)
    std = r.std(1, ddof=1, keepdims=True)
    G = r.shape[1]
    same = r.max(1, keepdims=True) == r.min(1, keepdims=True)
    # (P, 1)
    divide_by = np.where(
        same,
        1.0,
        {"mean_std": std + c.std_floor, "mean": 1.0, "leave_one_out": (G - 1) / G}[advantage],
    )
    adv = np.where(same, 0.0, (r - mean) / divide_by).ravel()  # (R,)
    A = np.repeat([row["adv"] for row in rows], n)  # (N,), as the run had them
    # (N,)
    rho = (
        np.exp(np.bincount(text, logp - old) / n)[text]
        if gain is losses.sequence_clipped_surrogate
        else np.exp(logp - old)
    )
    low = 0.0 if gain is losses.cispo_surrogate else 1 - c.clip
    high = 1 + c.high
    bound = rho.clip(low, high)
    if gain in (losses.cispo_surrogate, losses.reinforce_surrogate):
        slope = bound * A if gain is losses.cispo_surrogate else A  # d gain / d logp
        gains = slope * logp
    else:
        gains = np.minimum(rho * A, bound * A)
        slope = np.where(rho * A <= bound * A, rho * A, 0.0)
    trust = np.exp(old - sampler).clip(max=c.importance_cap) if c.importance_cap > 0 else 1.0
    total = max(
        1,
        {
            "token": (count * n).sum(),
            "sequence": count.sum(),
            "constant": count.sum() * cfg.sampling.max_new_tokens,
        }[average],
    )
    live = (A != 0) | (in_loss > 0)  # what the loop trains on: train.make_updates
    w = live * (count / n if average == "sequence" else count)[text] / total  # (N,)
    pull = w * trust * slope
    if gain is losses.sequence_clipped_surrogate:
        # a token moves the one ratio of its rollout by 1/n
        pull = (np.bincount(text, pull) / n)[text]
    loss = w * (in_loss * kl - trust * gains - c.entropy * H)  # (N,), their sum is the loss
    slope_kl = {"k1": 1.0, "k2": -d, "k3": -np.expm1(d)}[c.kl_estimator]
    return dict(
        n=n,
        count=count,
        text=text,
        logp=logp,
        old=old,
        r=r,
        mean=mean,
        std=std,
        divide_by=divide_by,
        adv=adv,
        A=A,
        rho=rho,
        bound=bound,
        gain=gains,
        trust=trust,
        kl=kl,
        total=total,
        live=live,
        loss=loss,
        d_logp=in_loss * w * slope_kl - pull,
        d_entropy=-c.entropy * w,
    )


def estimate_noise(step: LoggedStep) -> float:
    """By how much a token's log-prob in training may differ from the logged one, which stood in
    another micro-batch: nothing where the loss does not ask, else the gap that the run measured
    between its sampler and its trainer (1e-7 in float32, 1e-3 and more in bfloat16).
    """
    c = step.cfg.loss
    asks = (
        get_recipe(c)[0] in (losses.cispo_surrogate, losses.reinforce_surrogate)
        or c.importance_cap > 0
        or c.entropy > 0
        or c.kl > 0
        and c.kl_in == "loss"
    )
    return step.metrics["logprob_gap_mean"] if asks and not step.cfg.train.replay else 0.0


def compare_with_log(step: LoggedStep, x: dict) -> list[Check]:
    """Advantages, loss and the norm of d loss / d logp: the run's against numpy's."""
    theirs = np.repeat([row["adv"] for row in step.rows], x["count"])
    loose = estimate_noise(step)
    # a difference of rewards in float32, divided by how far they lie apart
    rounding = np.repeat(
        4 * 2.0**-24 * np.abs(x["r"]).max(1) / x["divide_by"][:, 0], x["r"].shape[1]
    )
    off = np.abs(x["adv"] - theirs) / np.maximum(1.0, np.abs(theirs))
    worst = int(np.argmax(off - rounding))
    found = [
        Check("advantages", theirs[worst], x["adv"][worst], off[worst], EXACT + rounding[worst])
    ]
    size = np.abs(x["loss"]).sum()
    found.append(
        _make_check(
            "loss",
            step.metrics["loss"],
            x["loss"].sum(),
            EXACT + 10 * loose,
            least=max(1e-30, size / 10),
        )
    )
    return found + [
        _make_check(
            "dlogp_norm",
            step.metrics["dlogp_norm"],
            math.sqrt((x["d_logp"] ** 2).sum()),
            EXACT + loose,
        )
    ]


def _make_check(
    name: str, logged: float, ours: float, allowed: float, least: float = 1e-30
) -> Check:
    """By its error relative to the logged figure, or to `least` where that is more."""
    return Check(name, logged, ours, abs(ours - logged) / max(abs(logged), least), allowed)


def compute_gradient(step: LoggedStep, x: dict) -> tuple[Check, float | None]:
    """The norm of the parameters' gradient by torch from numpy's d loss / d logp, with the weights
    before the step; and the largest |log-prob - logged| on the way.
    """
    cfg = step.cfg
    try:
        folder, device = _find_weights_before(step)
        compute = COMPUTE_DTYPES[
            cfg.model.compute
            if cfg.model.compute != "auto"
            else "bfloat16"
            if device == "cuda"
            else "float32"
        ]
        policy = load_policy(
            folder,
            len(load_tokenizer(folder)),
            compute,
            cfg.train.checkpointing,
            cfg.train.frozen,
            "sdpa",
            False,
            cfg.model.head_float32,
        )
    except (ModelFolderError, Damaged, OSError) as e:
        return Check("grad_norm", step.metrics["grad_norm"], why=str(e)), None
    rollouts, _, _ = step.replay.step(step.replay.steps.index(step.step) + 1)
    texts, _ = packing.deduplicate(rollouts)
    assert [t.ids for t in texts] == [tuple(row["ids"]) for row in step.rows]
    places = np.split(np.arange(len(x["text"])), x["n"].cumsum()[:-1])
    live = [i for i, at in enumerate(places) if x["live"][at[0]]]
    gap = 0.0
    for batch in packing.pack_rollouts(
        [texts[i] for i in live], cfg.train.tokens_per_micro_batch, dist.device()
    ):
        at = np.concatenate([places[live[i]] for i in batch.rollout.unique_consecutive().tolist()])
        logp, entropy = compute_log_probs(policy, batch, cfg.sampling.temperature)
        gap = max(gap, float(np.abs(logp.detach().cpu().double().numpy() - x["logp"][at]).max()))
        torch.autograd.backward(
            [logp, entropy],
            [
                torch.as_tensor(x[name][at], dtype=y.dtype, device=y.device)
                for name, y in (("d_logp", logp), ("d_entropy", entropy))
            ],
        )
    return _make_check(
        "grad_norm",
        step.metrics["grad_norm"],
        Optimizer(policy, cfg.optimizer, 1).compute_norm(),
        GRADIENT[compute],
    ), gap


def _find_weights_before(step: LoggedStep) -> tuple[str, str]:
    """The folder of the weights that the step began with, and the kind of device that the run
    computed on. Raises ModelFolderError, Damaged.
    """
    checkpoint = step.run / f"checkpoints/step_{step.step - 1:06d}"
    if step.step == 1:
        return resolve_model_folder(step.cfg.model.path), dist.device().type
    if not checkpoint.is_dir():
        raise ModelFolderError(
            f"the weights before the step are gone: no {checkpoint} (save.every, save.keep)"
        )
    files = read_manifest(checkpoint)
    for name in files:
        if name.startswith("model/") or name == "state.json":
            check_file(checkpoint, name, files[name])
    return str(checkpoint / "model"), json.loads(
        (checkpoint / "state.json").read_text(encoding="utf-8")
    )["device"]


def explain_step(run: str, step: int, prompt: str | None = None) -> tuple[str, dict]:
    """The text of `recr1 explain`, and {"run", "step", "shapes", "checks": {name: figures},
    "agrees"}. prompt: the id of the one that is shown.
    """
    logged = read_logged_step(run, step)
    x = compute_by_hand(logged.cfg, logged.rows)
    norm, gap = compute_gradient(logged, x)
    found = [*compare_with_log(logged, x), norm]
    wrong = [c.name for c in found if not c.agrees]
    text = "\n".join(
        [
            *_tell_story(logged, x, _choose_shown(logged, x, prompt)),
            "",
            *_format_verdict(logged, found, gap, wrong),
        ]
    )
    P, G = x["r"].shape
    shapes = dict(P=P, G=G, R=P * G, D=len(logged.rows), N=len(x["text"]))
    return text, dict(
        run=run,
        step=step,
        shapes=shapes,
        checks={c.name: c.figures() for c in found},
        agrees=not wrong,
    )


def _choose_shown(step: LoggedStep, x: dict, prompt: str | None) -> list[int]:
    """Rows of the group to be shown: the named prompt's, or the one whose rewards lie furthest
    apart.
    """
    if prompt is None:
        first = np.cumsum(x["count"]) - x["count"]
        prompt = step.rows[int(np.searchsorted(first, int(x["std"].argmax()) * x["r"].shape[1]))][
            "prompt"
        ]
    rows = [i for i, row in enumerate(step.rows) if row["prompt"] == prompt]
    if not rows:
        raise ConfigError(
            f"--prompt: {prompt!r} is not in step {step.step}; there are {', '.join(dict.fromkeys(row['prompt'] for row in step.rows))}"
        )
    return rows


def locate_source(function, text: str) -> str:
    """Where the line of `function` that holds `text` stands, and the line: "recr1/rl/policy_loss.py:66  rho =
    (logp - old).exp()".
    """
    function = inspect.unwrap(function)
    lines, start = inspect.getsourcelines(function)
    [at] = [i for i, line in enumerate(lines) if text in line]
    path = Path(inspect.getsourcefile(function)).relative_to(Path(__file__).parents[2])
    return f"{path.as_posix()}:{start + at}  {lines[at].split('  # ')[0].strip()}"


def _tell_story(step: LoggedStep, x: dict, rows: list[int]) -> list[str]:
    """From prompt to gradient: each line with its equation, shape, an example from the group that
    is shown, and its place in the source.
    """
    cfg, c, (gain, advantage, average) = step.cfg, step.cfg.loss, get_recipe(step.cfg.loss)
    (P, G), N, D = x["r"].shape, len(x["text"]), len(step.rows)
    show = max(rows, key=lambda i: abs(step.rows[i]["adv"]))
    row = step.rows[rows[0]]
    g = int((np.cumsum(x["count"]) - x["count"])[rows[0]]) // G
    words = _make_decoder(step)
    by_rollout = gain is losses.sequence_clipped_surrogate
    lines = [
        f"step {step.step} of {step.run}: loss {c.kind} ({gain.__name__}, {advantage}, per {average}), P = {P} prompts x G = {G} siblings = {P * G} rollouts, "
        f"D = {D} distinct texts, N = {N} tokens of them; shown: prompt {row['prompt']}",
        "",
    ]

    def add(name: str, equation: str, shape: str, example: str = "", *places: str):
        lines.append(f"{name:<14}{equation}" + f"   {shape}" * bool(shape))
        lines.extend(f"{'':<14}{part}" for part in (example, *places) if part)

    if cfg.train.replay:
        add(
            "prompt",
            "token ids, chat template around the query; this run replays logged rollouts",
            f"({len(row['prompt_ids'])},)",
            words(row["prompt_ids"]),
            locate_source(train.sample_and_score, "run.replay.step"),
        )
    else:
        add(
            "prompt",
            "token ids, chat template around the query",
            f"({len(row['prompt_ids'])},)",
            words(row["prompt_ids"]),
            locate_source(train.sample_once, "generate("),
        )
    add(
        "group",
        f"{G} completions of it; identical siblings are one row, counted",
        f"(R,) = ({P * G},), distinct ({D},)",
        "",
        locate_source(packing.deduplicate, "counts[r.group"),
    )
    lines += [
        f"{'':<14}{i:>5}: x {step.rows[i]['count']}, {x['n'][i]:>3} tokens, reward {step.rows[i]['reward']:.4g}  {_fit_line(step.rows[i]['text'])}"
        for i in rows
    ]
    ours = " ".join(f"{v:.4g}" for v in x["r"][g])
    kl_in_reward = c.kl > 0 and c.kl_in == "reward"
    add(
        "rewards",
        "r = reward of the text"
        + f" - {c.kl:g} sum_t KL_t ({c.kl_estimator}, of the sampler's log-probs)" * kl_in_reward,
        f"(P, G) = {P, G}",
        f"[{ours}]",
        locate_source(Scorer.score_texts, "self.parts.reward("),
        *[locate_source(train.train, "divergence = ")] * kl_in_reward,
    )
    add(
        "mean and std",
        "mean_G r, std_G r (divided by G - 1)",
        f"(P, 1) = {P, 1}",
        f"{x['mean'][g, 0]:.6g}, {x['std'][g, 0]:.6g}",
        locate_source(advantages.subtract_mean, "return"),
    )
    add(
        "advantages",
        {
            "mean_std": f"A = (r - mean) / (std + {c.std_floor:g})",
            "mean": "A = r - mean",
            "leave_one_out": "A = (r - mean) G / (G - 1)",
        }[advantage]
        + ", exactly 0 where a group's rewards are equal",
        f"(R,) = ({P * G},)",
        "[" + " ".join(f"{v:.4g}" for v in x["adv"][g * G : g * G + G]) + "]",
        locate_source(advantages.ADVANTAGES[advantage], "return"),
        locate_source(advantages.compute_group_advantages, "torch.where"),
    )
    if gain is not losses.reinforce_surrogate:
        same = "; one optimiser step per batch: log pi_old is log pi, every ratio is exactly 1" * (
            not cfg.train.replay
        )
        formula = (
            "rho = exp(mean_t (log pi_t - log pi_old,t)), one per rollout"
            if by_rollout
            else "rho_t = exp(log pi_t - log pi_old,t)"
        )
        add(
            "ratio",
            formula + same,
            f"(N,) = ({N},)",
            f"from {x['rho'].min():.6g} to {x['rho'].max():.6g}",
            locate_source(gain, "mean_log = " if by_rollout else "exp()"),
        )
        clipped = x["live"] & (x["rho"] != x["bound"])
        inert = int(
            (
                x["count"][x["text"]]
                * (clipped & (x["gain"] == x["bound"] * x["A"]) & (x["A"] != 0))
            ).sum()
        )
        formula = (
            f"gain_t = sg(min(rho_t, {1 + c.high:g})) A log pi_t"
            if gain is losses.cispo_surrogate
            else f"gain_t = min(rho_t A, clip(rho_t, {1 - c.clip:g}, {1 + c.high:g}) A)"
        )
        where = "return" if gain is losses.cispo_surrogate else "torch.minimum"
        add(
            "clip",
            formula,
            f"(N,) = ({N},)",
            f"{int(clipped.sum())} tokens outside"
            + f"; the clip takes the gradient of {inert} (siblings counted)"
            * (gain is not losses.cispo_surrogate),
            locate_source(
                gain if gain is losses.cispo_surrogate else losses.clipped_surrogate, where
            ),
        )
    else:
        add("gain", "gain_t = A log pi_t", f"(N,) = ({N},)", "", locate_source(gain, "return"))
    if c.importance_cap > 0:
        add(
            "trust",
            f"gain_t *= min(exp(log pi_old,t - log pi_sampler,t), {c.importance_cap:g})",
            f"(N,) = ({N},)",
            "",
            locate_source(policy_loss.compute_token_loss, "gain = gain * "),
        )
    terms = "gain_t"
    if c.kl > 0 and c.kl_in == "loss":
        formula = {"k1": "-d", "k2": "d^2 / 2", "k3": "e^d - 1 - d"}[c.kl_estimator]
        add(
            "KL",
            f"KL_t = {formula},  d = log pi_ref,t - log pi_t",
            f"(N,) = ({N},)",
            "",
            locate_source(kl.KL_ESTIMATORS[c.kl_estimator], "return"),
        )
        terms += f" - {c.kl:g} KL_t"
    if c.entropy > 0:
        add(
            "entropy",
            "H_t of the policy at the token",
            f"(N,) = ({N},)",
            "",
            locate_source(policy_loss.compute_token_loss, "d_entropy = "),
        )
        terms += f" + {c.entropy:g} H_t"
    weight = {
        "token": "w = siblings; T = tokens of all rollouts",
        "sequence": "w = siblings / tokens of the text; T = rollouts",
        "constant": f"w = siblings; T = rollouts x {cfg.sampling.max_new_tokens} (sampling.max_new_tokens)",
    }[average]
    add(
        "loss",
        f"L = sum_t -w_t ({terms}) / T,  {weight}",
        f"T = {x['total']}, L = {x['loss'].sum():.9g}",
        "",
        locate_source(policy_loss.count_denominator, '"constant":'),
        locate_source(
            policy_loss.compute_token_weights,
            "batch.weight / size" if average == "sequence" else "return batch.weight\n",
        ),
        locate_source(policy_loss.compute_token_loss, "loss = -("),
    )
    add(
        "d loss/d logp",
        "dL / d log pi_t, what each token's grad log pi_t is multiplied by",
        f"(N,) = ({N},), norm {math.sqrt((x['d_logp'] ** 2).sum()):.9g}",
        "",
        locate_source(policy_loss.compute_token_loss, "[d_logp] = "),
    )
    add(
        "gradient",
        "dL / d theta = sum_t dL / d log pi_t  d log pi_t / d theta"
        + f" - {c.entropy:g} sum_t w_t / T  dH_t / d theta" * (c.entropy > 0),
        "",
        "",
        locate_source(train.train, "loss.backward()"),
        locate_source(Optimizer.compute_norm, "_foreach_norm"),
    )
    return lines + ["", *_format_tokens(step, x, show, words)]


def _format_tokens(step: LoggedStep, x: dict, i: int, words) -> list[str]:
    """The text's tokens, a line each."""
    at = np.flatnonzero(x["text"] == i)
    row = step.rows[i]
    lines = [
        f"tokens of text {i}, A = {row['adv']:.6g}, {row['count']} of its group wrote it:",
        f"{'t':>4}{'id':>9} {'token':<16}{'log pi':>11}{'log pi_old':>11}{'rho':>10}{'clip(rho)':>10}{'gain':>11}{'loss_t':>12}{'dL/dlogp_t':>12}",
    ]
    lines += [
        f"{t:>4}{row['ids'][t]:>9} {_fit_line(words(row['ids'][t : t + 1]), 15):<16}"
        + f"{x['logp'][j]:>11.5f}{x['old'][j]:>11.5f}{x['rho'][j]:>10.5f}{x['bound'][j]:>10.5f}"
        f"{x['gain'][j]:>11.5f}{x['loss'][j]:>12.4e}{x['d_logp'][j]:>12.4e}"
        for t, j in enumerate(at[:SHOWN])
    ]
    return lines + [f"{'':>4}... {len(at) - SHOWN} more"] * (len(at) > SHOWN)


def _format_verdict(
    step: LoggedStep, found: list[Check], gap: float | None, wrong: list[str]
) -> list[str]:
    lines = [f"{'':<14}{'logged':>18}{'here':>18}{'off by':>10}{'allowed':>10}"]
    for c in found:
        lines.append(
            f"{c.name:<14}{c.logged:>18.9g}"
            + (
                f"{'-':>18}  not checked: {c.why}"
                if c.why
                else f"{c.ours:>18.9g}{c.off:>10.1e}{c.allowed:>10.1e}  {'agrees' if c.agrees else 'DISAGREES'}"
            )
        )
    lines.append(
        "advantages, loss, dlogp_norm: numpy, float64, from the logged values; grad_norm: torch, from numpy's d loss / d logp and the weights before the step"
        + (
            f" (their log-probs differ from the logged ones by {gap:.1e} at most)"
            if gap is not None
            else ""
        )
    )
    if wrong:
        lines.append(
            f"{', '.join(wrong)}: not what the run logged. Either the files were changed since, or the code was, or the loss is not what it says"
        )
    return lines


def _make_decoder(step: LoggedStep):
    """ids -> text on one line; without a tokenizer at hand the ids themselves."""
    for folder in (step.run / "model", Path(step.cfg.model.path)):
        try:
            if folder.is_dir():
                tokenizer = load_tokenizer(str(folder))
                return lambda ids: _fit_line(
                    tokenizer.decode(ids, clean_up_tokenization_spaces=False), 200
                )
        except ModelFolderError:
            pass
    return lambda ids: " ".join(map(str, ids))


def _fit_line(text: str, most: int = 80) -> str:
    text = repr(text)[1:-1]
    return text if len(text) <= most else text[: most - 3] + "..."
