"""recr1 explain: its numpy against float64 autograd written from the papers' formulas, and against
what runs logged; what it refuses, what it finds.
"""

import gzip
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers.tiny_world import jsonl, write_yaml
from test_ranks import torchrun
from transformers import AutoModelForCausalLM

from recr1 import cli, train
from recr1.commands import explain
from recr1.config.schema import Config, LossConfig, SamplingConfig
from recr1.training.launch import run_guarded

G = 6


def rows_of(seed: int, kl: bool, on_policy: bool = False) -> list[dict]:
    """Five groups of texts of unequal length and count, one group with equal rewards, ratios on
    both sides of the clip.
    """
    g = torch.Generator().manual_seed(seed)
    rows = []
    for p in range(5):
        left = G
        while left:
            n = int(torch.randint(1, 9, (1,), generator=g))
            count = min(left, int(torch.randint(1, 4, (1,), generator=g)))
            left -= count
            old = -3 * torch.rand(n, generator=g) - 0.01

            def near(by):
                return (old + by * torch.randn(n, generator=g)).tolist()

            rows.append(
                dict(
                    prompt=f"q{p}",
                    count=count,
                    ids=list(range(n)),
                    reward=0.3 if p == 2 else float(torch.rand(1, generator=g)),
                    advantage=None,
                    old_logp=old.tolist(),
                    trainer_logp=old.tolist() if on_policy else near(0.3),
                    sampler_logp=near(0.2),
                    ref_logp=near(0.4) if kl else None,
                    entropy=torch.rand(n, generator=g).tolist(),
                )
            )
    return rows


def by_autograd(cfg: Config, rows: list[dict], logs: list[torch.Tensor]) -> torch.Tensor:
    """The loss of the step from its formulas, a text at a time. logs: log-probs of each text,
    leaves.
    """
    c = cfg.loss
    kind = c.kind
    average = c.agg_mode or {
        "dr_grpo": "seq-mean-token-sum-norm",
        "gspo": "seq-mean-token-mean",
    }.get(c.kind, "token-mean")
    R = sum(row["count"] for row in rows)
    T = sum(row["count"] * len(row["ids"]) for row in rows)
    total = {
        "token-mean": T,
        "seq-mean-token-mean": R,
        "seq-mean-token-sum-norm": R * cfg.sampling.max_new_tokens,
    }[average]
    loss = 0.0

    def kl(lp, ref):
        d = ref - lp
        return {"k1": -d, "k2": d * d / 2, "k3": d.exp() - 1 - d}[c.kl_estimator]

    for row, lp in zip(rows, logs):
        old, sampler, H = (
            torch.tensor(row[name], dtype=torch.float64)
            for name in ("old_logp", "sampler_logp", "entropy")
        )
        A = row["advantage"]
        n = len(old)
        if A == 0 and not (c.kl_coef and c.kl_in == "loss"):
            continue
        rho = ((lp - old).mean().exp() if kind == "gspo" else (lp - old).exp()) * torch.ones(
            n, dtype=torch.float64
        )
        gain = {
            "cispo": lambda: rho.detach().clamp(max=1 + c.upper_clip_ratio) * A * lp,
            "rloo": lambda: A * lp,
            "reinforce": lambda: A * lp,
        }.get(
            kind,
            lambda: torch.minimum(
                rho * A, rho.clamp(1 - c.clip_ratio_low, 1 + c.upper_clip_ratio) * A
            ),
        )()
        if c.tis_cap:
            gain = gain * (old - sampler).exp().clamp(max=c.tis_cap)
        each = -gain - c.entropy_coef * H
        if c.kl_coef and c.kl_in == "loss":
            each = each + c.kl_coef * kl(lp, torch.tensor(row["ref_logp"], dtype=torch.float64))
        loss = (
            loss
            + row["count"]
            * (each.mean() if average == "seq-mean-token-mean" else each.sum())
            / total
        )
    return loss


def advantages(cfg: Config, rows: list[dict]) -> list[float]:
    """One per row, by Python's own arithmetic."""
    c = cfg.loss
    found = []
    groups = {}
    for row in rows:
        r = float(np.float32(row["reward"]))
        if c.kl_coef and c.kl_in == "reward":
            r -= c.kl_coef * sum(
                {"k1": s - f, "k2": (f - s) ** 2 / 2, "k3": math.exp(f - s) - 1 - (f - s)}[
                    c.kl_estimator
                ]
                for s, f in zip(row["sampler_logp"], row["ref_logp"])
            )
        groups.setdefault(row["prompt"], []).append((r, row["count"]))
    for group in groups.values():
        every = [r for r, count in group for _ in range(count)]
        mean = math.fsum(every) / G
        std = math.sqrt(math.fsum((r - mean) ** 2 for r in every) / (G - 1))
        for r, _ in group:
            name = c.advantage or {
                "dr_grpo": "mean",
                "rloo": "leave_one_out",
                "reinforce": "mean",
            }.get(c.kind, "mean_std")
            others = (sum(every) - r) / (G - 1)
            found.append(
                0.0
                if max(every) == min(every)
                else {
                    "mean_std": (r - mean) / (std + c.advantage_eps),
                    "mean": r - mean,
                    "leave_one_out": r - others,
                }[name]
            )
    return found


SETTINGS = [
    dict(kind=kind, **more)
    for kind in ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce")
    for more in (
        {},
        dict(clip_ratio_low=0.1, clip_ratio_high=0.3, tis_cap=1.1),
        dict(kl_coef=0.1, kl_estimator="k3"),
        dict(kl_coef=0.2, kl_estimator="k2", kl_in="reward", agg_mode="seq-mean-token-mean"),
        dict(kl_coef=0.3, kl_estimator="k1", entropy_coef=0.05, agg_mode="seq-mean-token-sum-norm"),
    )
] + [
    dict(kind="gspo", agg_mode="token-mean", tis_cap=1.2, kl_coef=0.1),
    dict(kind="grpo", advantage="leave_one_out", agg_mode="seq-mean-token-mean", entropy_coef=0.1),
]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: " ".join(map(str, s.values())))
@pytest.mark.parametrize("seed", [0, 1])
def test_numpy_is_float64_autograd(setting, seed):
    cfg = Config(
        loss=LossConfig(advantage_eps=0.01, **setting),
        sampling=SamplingConfig(group_size=G, max_new_tokens=9),
    )
    rows = rows_of(seed, kl=cfg.loss.kl_coef > 0, on_policy=seed == 1)
    for row, adv in zip(rows, advantages(cfg, rows)):
        row["advantage"] = adv
    logs = [
        torch.tensor(row["trainer_logp"], dtype=torch.float64, requires_grad=True) for row in rows
    ]
    loss = by_autograd(cfg, rows, logs)
    slopes = torch.cat(
        [
            torch.zeros_like(lp) if g is None else g
            for lp, g in zip(logs, torch.autograd.grad(loss, logs, allow_unused=True))
        ]
    )
    x = explain.compute_by_hand(cfg, rows)
    assert x.loss.sum() == pytest.approx(loss.item(), rel=1e-10, abs=1e-14)
    assert np.abs(x.grad_logp - slopes.numpy()).max() <= 1e-12
    # float32 once, where the run rounds: the KL's share of the reward
    assert x.advantages == pytest.approx(
        [row["advantage"] for row in rows for _ in range(row["count"])],
        abs=1e-4 if cfg.loss.kl_in == "reward" else 1e-12,
    )
    is_clipped = x.ratio != x.clipped_ratio
    assert seed == 1 or setting["kind"] in ("rloo", "reinforce") or is_clipped.any()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_yaml(
        tmp_path_factory.mktemp("world"),
        **{"save.every": 1, "save.keep_last": 9, "log.tokens_every": 1, "optimizer.lr": 0.01},
    )


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    """run(overrides...) -> the folder of a finished run; the same overrides run once."""
    done = {}

    def run(*overrides):
        if overrides not in done:
            folder = tmp_path_factory.mktemp("runs") / "run"
            assert run_guarded(train.main, [world, *overrides, f"run.dir={folder}"]) == 0
            done[overrides] = folder
        return done[overrides]

    return run


SMALL = "train.tokens_per_micro_batch=80"
RUNS = {
    "GRPO": (),
    "GRPO, small micro-batches": (SMALL,),
    "GRPO, recompute": ("model.head=recompute", SMALL),
    "Dr.GRPO": ("loss.kind=dr_grpo",),
    "Dr.GRPO, recompute, small micro-batches": ("loss.kind=dr_grpo", "model.head=recompute", SMALL),
    "GSPO": ("loss.kind=gspo", "model.head=recompute"),
    "GSPO, small micro-batches": ("loss.kind=gspo", "model.head=recompute", SMALL),
    "KL in the loss": ("loss.kl_coef=0.5", SMALL),
    "KL in the reward": ("loss.kl_coef=0.1", "loss.kl_in=reward", "loss.kl_estimator=k1"),
    "resampled": ("sampling.dynamic_sampling=2", "sampling.temperature=0.7"),
    "entropy, frozen": ("loss.entropy_coef=0.1", "train.frozen='model.embed_tokens.*'"),
    "CISPO, trusting": ("loss.kind=cispo", "loss.tis_cap=1.5"),
    "RLOO, by the sequence": ("loss.kind=rloo", "loss.agg_mode=seq-mean-token-mean"),
}


@pytest.mark.parametrize("name", RUNS)
def test_agrees_with_the_run(name, run):
    for step in (1, 3):  # the initial weights; those of a checkpoint
        text, result = explain.explain_step(str(run(*RUNS[name])), step)
        figures = result["checks"]
        ours = figures["loss"]["ours"]
        logged = figures["loss"]["logged"]
        plain = abs(ours - logged) / max(1e-30, abs(logged))
        errors = ", ".join(f"{key} {c['off']:.1e}" for key, c in figures.items())
        print(f"{name}, step {step}: {errors} plain loss {plain:.1e}")
        assert result["agrees"]
        assert "not checked" not in text
        assert "DISAGREES" not in text
        assert figures["grad_logp_norm"]["off"] <= 1e-5
        assert figures["grad_norm"]["off"] <= 1e-4
        assert figures["grad_norm"]["logged"] > 0
        if "GSPO" not in name:  # whose advantages sum to 0: its loss is rounding
            assert figures["loss"]["ours"] == pytest.approx(figures["loss"]["logged"], rel=1e-5), (
                "plain relative"
            )


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "gspo"])
@pytest.mark.parametrize("budget", [(), (SMALL,)], ids=["one batch", "small batches"])
def test_off_policy(kind, budget, run):
    """A replay's ratios are not 1 and some are clipped: the loss of GSPO is then more than
    rounding.
    """
    first = run("train.steps=2")
    folder = run(
        f"loss.kind={kind}",
        "model.head=recompute",
        "loss.clip_ratio_low=0.05",
        "train.steps=4",
        f"train.replay={first}/rollouts.jsonl.gz",
        *budget,
    )
    text, result = explain.explain_step(str(folder), 4)
    figures = result["checks"]
    print(kind, {key: f"{c['off']:.1e}" for key, c in figures.items()})
    assert result["agrees"]
    assert figures["grad_norm"]["off"] <= 1e-4
    assert "this run replays" in text
    assert " 0 tokens outside" not in text
    assert figures["loss"]["ours"] == pytest.approx(figures["loss"]["logged"], rel=1e-5)
    assert jsonl(folder / "metrics.jsonl")[3]["clip_ratio"] > 0


def test_dlogp_norm_does_not_depend_on_the_heads_nor_on_micro_batches(run):
    """Nor the loss: the first step of each run has the same rollouts."""
    for kind in ("grpo", "dr_grpo"):
        names = [
            overrides
            for overrides in RUNS.values()
            if (
                f"loss.kind={kind}" in overrides
                if kind != "grpo"
                else not any(o.startswith("loss") for o in overrides)
            )
        ]
        rows = [
            jsonl(run(*overrides) / "metrics.jsonl")[0]
            for overrides in names
            if "sampling.dynamic_sampling=2" not in overrides
        ]
        assert len(rows) >= 2
        for key in ("loss", "grad_logp_norm"):
            assert [row[key] for row in rows] == pytest.approx([rows[0][key]] * len(rows), rel=1e-6)


def test_several_ranks(run, world, tmp_path):
    """Groups of two ranks, idle micro-batches among them: the merged log is the step's, and its
    figures are those of one rank.
    """
    torchrun(
        2,
        "-m",
        "recr1.train",
        world,
        SMALL,
        "train.prompts_per_step=3",
        f"run.dir={tmp_path / 'run'}",
    )
    text, result = explain.explain_step(str(tmp_path / "run"), 2)
    assert result["agrees"]
    assert "not checked" not in text
    assert result["shapes"]["P"] == 3
    alone = jsonl(run(SMALL, "train.prompts_per_step=3") / "metrics.jsonl")[0]
    both = jsonl(tmp_path / "run/metrics.jsonl")[0]
    assert {key: both[key] for key in ("loss", "grad_logp_norm", "grad_norm")} == pytest.approx(
        {key: alone[key] for key in ("loss", "grad_logp_norm", "grad_norm")}, rel=1e-5
    )


def test_the_gradient_by_transformers_in_float64(run):
    """The whole chain without our model, head, packing or numpy: transformers, rows of one text,
    autograd of the formulas.
    """
    for overrides, kind in (
        ((), "grpo"),
        (("loss.kind=gspo", "model.head=recompute"), "gspo"),
        (("loss.kl_coef=0.5", SMALL), "grpo"),
    ):
        folder = run(*overrides)
        model = AutoModelForCausalLM.from_pretrained(
            folder / "checkpoints/step_000002/model"
        ).double()
        step = explain.read_logged_step(str(folder), 3)
        logs = []
        for row in step.rows:
            logits = (
                model(input_ids=torch.tensor([row["prompt_ids"] + row["ids"]]))
                .logits[0, len(row["prompt_ids"]) - 1 : -1]
                .log_softmax(-1)
            )
            logs.append(logits.gather(-1, torch.tensor(row["ids"])[:, None])[:, 0])
        rows = [row | dict(old_logp=lp.tolist()) for row, lp in zip(step.rows, logs)]
        by_autograd(
            replace(step.cfg, loss=replace(step.cfg.loss, kind=kind)), rows, logs
        ).backward()
        want = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
        check, gap = explain.compute_gradient(step, explain.compute_by_hand(step.cfg, step.rows))
        assert check.ours == pytest.approx(want, rel=1e-5)
        assert gap < 1e-5


def test_a_step_without_variance(run):
    """One token is no answer: every advantage, the loss and the gradient are 0, and a floor of 0
    divides nothing.
    """
    _, result = explain.explain_step(
        str(run("sampling.max_new_tokens=1", "train.steps=1", "loss.advantage_eps=0")), 1
    )
    assert result["agrees"]
    assert all(c["ours"] == c["logged"] == 0 for c in result["checks"].values())


def test_the_story(run):
    """Every link is there, with shapes and a place in the source where that very line stands."""
    root = Path(explain.__file__).parents[2]
    for overrides in RUNS.values():
        text, result = explain.explain_step(str(run(*overrides)), 3)
        P = result["shapes"]["P"]
        size = result["shapes"]["N"]
        places = [
            line.strip().split("  ", 1)
            for line in text.splitlines()
            if line.strip().startswith("recr1/") and ".py:" in line
        ]
        for place, code in places:
            path, number = place.split(":")
            assert code in (root / path).read_text().splitlines()[int(number) - 1]
        heads = [
            line[:14].strip()
            for line in text.splitlines()
            if line[:1].strip() and not line.startswith(("step", "tokens", " "))
        ]
        order = [
            "prompt",
            "group",
            "rewards",
            "mean and std",
            "advantages",
            "ratio",
            "clip",
            "loss",
            "d loss/d logp",
            "gradient",
        ]
        if "loss.kind=rloo" in overrides:
            order[5:7] = ["gain"]
        assert [h for h in heads if h in order][: len(order)] == order
        assert len(places) >= 12
        assert f"(P, G) = ({P}, 4)" in text
        assert f"(N,) = ({size},)" in text
    assert "KL_t = e^d - 1 - d" in explain.explain_step(str(run(*RUNS["KL in the loss"])), 3)[0]
    assert "- 0.1 sum_t KL_t (k1" in explain.explain_step(str(run(*RUNS["KL in the reward"])), 3)[0]


def copied(folder: Path, tmp_path, change_rows=None, change_metrics=None) -> Path:
    """The run with its log changed."""
    shutil.copytree(folder, tmp_path / "copy")
    if change_rows:
        rows = jsonl(folder / "rollouts.jsonl.gz")
        change_rows(rows)
        (tmp_path / "copy/rollouts.jsonl.gz").write_bytes(
            gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
        )
    if change_metrics:
        rows = jsonl(folder / "metrics.jsonl")
        change_metrics(rows)
        (tmp_path / "copy/metrics.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )
    return tmp_path / "copy"


def scaled(key, by):
    def change(rows):
        row = next(row for row in rows if row["step"] == 3 and row.get("advantage", 1) != 0)
        row[key] *= by

    return change


WRONG = {
    "a reward": (scaled("reward", 1.01), None, {"advantages"}),
    "an advantage": (
        scaled("advantage", 1.01),
        None,
        {"advantages", "loss", "grad_logp_norm", "grad_norm"},
    ),
    "the loss": (None, scaled("loss", 1.0001), {"loss"}),
    "grad_logp_norm": (None, scaled("grad_logp_norm", 1.0001), {"grad_logp_norm"}),
    "grad_norm": (None, scaled("grad_norm", 1.001), {"grad_norm"}),
    "not finite": (None, scaled("loss", math.nan), {"loss"}),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_disagrees_is_named(name, run, tmp_path, capsys):
    rows, metrics, want = WRONG[name]
    folder = copied(run(), tmp_path, rows, metrics)
    with pytest.raises(SystemExit) as exit:
        run_guarded(cli.main, ["explain", "--run", str(folder), "--step", "3", "--json"])
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])
    wrong = {key for key, check in found["checks"].items() if not check["agrees"]}
    assert exit.value.code == 1
    assert not found["agrees"]
    assert wrong & {"advantages", "loss", "grad_logp_norm", "grad_norm"} == wrong
    assert wrong == want if name != "an advantage" else wrong >= {"advantages", "grad_logp_norm"}
    assert (
        f"{', '.join(key for key in found['checks'] if key in wrong)}: not what the run logged"
        in out
    )


def test_another_step_s_weights_are_noticed(run, tmp_path):
    folder = copied(run(), tmp_path)
    shutil.rmtree(folder / "checkpoints/step_000002")
    text, result = explain.explain_step(str(folder), 3)
    assert result["agrees"]
    assert "not checked: the weights before the step are gone" in text
    model = folder / "checkpoints/step_000001/model/model.safetensors"
    model.write_bytes(model.read_bytes()[:-1] + b"\x00")
    assert "not checked: model/model.safetensors" in explain.explain_step(str(folder), 2)[0]
    # whole, but of another step
    shutil.copytree(run() / "checkpoints/step_000003", folder / "checkpoints/step_000002")
    found = explain.explain_step(str(folder), 3)[1]["checks"]
    assert not found["grad_norm"]["agrees"]
    assert found["loss"]["agrees"]


def test_bfloat16(run):
    """Its log-probs depend on the micro-batch, so what they enter is known less well."""
    for overrides in ((), ("loss.kl_coef=0.5",)):
        _, result = explain.explain_step(str(run("model.compute=bfloat16", SMALL, *overrides)), 3)
        print({key: f"{c['off']:.1e} of {c['allowed']:.1e}" for key, c in result["checks"].items()})
        assert result["agrees"]
        assert result["checks"]["advantages"]["off"] <= 1e-5


def test_shown(run, capsys):
    ids = [row["prompt"] for row in jsonl(run() / "rollouts.jsonl.gz") if row["step"] == 3]
    assert (
        run_guarded(cli.main, ["explain", "--run", str(run()), "--step", "3", "--prompt", ids[-1]])
        == 0
    )
    assert f"shown: prompt {ids[-1]}\n" in capsys.readouterr().out
    assert (
        run_guarded(cli.main, ["explain", "--run", str(run()), "--step", "3", "--prompt", "nobody"])
        == 2
    )
    assert "'nobody' is not in step 3; there are" in capsys.readouterr().err


def test_refused(run, tmp_path, capsys, monkeypatch):
    def refused(folder, step=1):
        capsys.readouterr()
        assert run_guarded(cli.main, ["explain", "--run", str(folder), "--step", str(step)]) == 2
        err = capsys.readouterr().err
        assert err.startswith("recr1: ")
        assert err.count("\n") == 1
        return err

    assert "step 9 is not logged" in refused(run(), 9)
    assert "no such file" in refused(tmp_path / "nowhere")
    assert "train.num_mini_batches is 2" in refused(
        run("train.num_mini_batches=2", "train.steps=1")
    )
    (tmp_path / "my_gain.py").write_text(
        "def gain(logp, old, batch, c):\n    return batch.advantages * logp\n"
        "gain.per_token = True\n"
        "def adv(r, c):\n    return r - r.mean(1, keepdim=True)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert "loss.kind is 'my_gain:gain', a function of yours" in refused(
        run("loss.kind='my_gain:gain'", "train.steps=1")
    )
    assert "loss.advantage is 'my_gain:adv'" in refused(
        run("loss.advantage='my_gain:adv'", "train.steps=1")
    )
    old = copied(run(), tmp_path, change_metrics=lambda rows: [row.pop("loss") for row in rows])
    assert "step 1 has no loss; the run was made by an older recr1" in refused(old)
    tree = yaml.safe_load((old / "config.yaml").read_text())
    tree["sampling"]["group_size"] = 8
    shutil.copy(run() / "metrics.jsonl", old)
    (old / "config.yaml").write_text(yaml.safe_dump(tree))
    assert "the files are not of one run" in refused(old)
    (old / "metrics.jsonl").write_text("{\n")
    assert "cannot be read" in refused(old)
