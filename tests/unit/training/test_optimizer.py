"""The optimizer against torch's own AdamW and clipping; nothing moves on a non-finite gradient."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from recr1.config.schema import OptimizerConfig as Config
from recr1.training.optimizer import NonFiniteGradient, Optimizer


def model_and_twin():
    torch.manual_seed(0)
    a = torch.nn.Linear(5, 3)
    b = torch.nn.Linear(5, 3)
    b.load_state_dict(a.state_dict())
    return a, b


@pytest.mark.parametrize("on_host", [False, True])
def test_equals_torchs_adamw_with_clipping_and_schedule(on_host):
    ours, theirs = model_and_twin()
    config = Config(
        cpu_offload=on_host,
        lr=0.05,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        warmup_steps=2,
        min_lr_ratio=0.2,
        max_grad_norm=0.5,
    )
    optimizer = Optimizer(ours, config, steps=6)
    adamw = torch.optim.AdamW(
        theirs.parameters(), lr=0.0, betas=(0.9, 0.95), eps=config.eps, weight_decay=0.1
    )
    rates = []
    for _ in range(6):
        x = torch.randn(4, 5) * 3
        for model in (ours, theirs):
            model(x).square().sum().backward()
        norm, lr = optimizer.step()
        rates.append(lr)
        for group in adamw.param_groups:
            group["lr"] = lr
        assert norm == pytest.approx(
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5).item(), rel=1e-6
        )
        adamw.step()
        adamw.zero_grad()
        for a, b in zip(ours.parameters(), theirs.parameters()):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
            assert a.grad is None
    # 2 of warm-up, then linear towards .2 * lr
    assert rates == pytest.approx([0.025, 0.05, 0.05, 0.04, 0.03, 0.02])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_moves_on_a_non_finite_gradient(value):
    for policy in ("stop", "skip"):
        model, twin = model_and_twin()
        optimizer = Optimizer(model, Config(lr=0.1, on_nonfinite=policy), steps=3)
        model(torch.ones(1, 5)).sum().backward()
        model.weight.grad[0, 0] = value
        if policy == "stop":
            with pytest.raises(NonFiniteGradient, match="step 1.*no weight was changed"):
                optimizer.step()
        else:
            optimizer.step()
            assert optimizer.num_skipped == 1
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))


def test_a_step_without_gradients_moves_nothing():
    model, twin = model_and_twin()
    optimizer = Optimizer(model, Config(lr=0.1, weight_decay=0.5), steps=3)
    assert optimizer.step()[0] == 0.0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))


def test_muon_takes_the_matrices_of_the_blocks():
    model = torch.nn.ModuleDict(
        dict(embed=torch.nn.Embedding(4, 3), layers=torch.nn.ModuleList([torch.nn.Linear(3, 3)]))
    )
    (_, adamw), (_, muon) = Optimizer(model, Config(kind="muon"), 1).optimizers
    names = {id(p): n for n, p in model.named_parameters()}
    assert [names[id(p)] for g in muon.param_groups for p in g["params"]] == ["layers.0.weight"]
    assert sorted(names[id(p)] for g in adamw.param_groups for p in g["params"]) == [
        "embed.weight",
        "layers.0.bias",
    ]


def set_gradients(model, seed):
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=g)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_momentum_does_not_act_without_gradients(kind):
    """Every group of the step had equal rewards: what earlier steps left in the state may not move
    a weight.
    """
    model = torch.nn.ModuleDict(
        dict(embed=torch.nn.Embedding(4, 3), layers=torch.nn.ModuleList([torch.nn.Linear(3, 3)]))
    )
    optimizer = Optimizer(model, Config(kind=kind, lr=0.1, weight_decay=0.5), steps=3)
    set_gradients(model, 0)
    start = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    before = [p.detach().clone() for p in model.parameters()]
    assert all((a != b).any() for a, b in zip(start, before))
    assert optimizer.step() == (0.0, 0.1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before))


def test_a_skipped_step_leaves_no_trace_in_the_state():
    config = Config(lr=0.1, weight_decay=0.1, on_nonfinite="skip")
    models = model_and_twin()
    for model, skips in zip(models, (1, 0)):
        optimizer = Optimizer(model, config, steps=5)
        for step in range(3):
            set_gradients(model, step)
            if step == 1 and skips:
                model.bias.grad[0] = float("nan")
            elif step == 1:
                continue
            optimizer.step()
        assert optimizer.num_skipped == skips
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models)))


START = """
import sys
import torch
from recr1.config.schema import OptimizerConfig
from recr1.model.hf_weights import make_empty_model
from recr1.training.optimizer import Optimizer

make_empty_model("experiments/policy")
for on_host in (False, True):
    layer = torch.nn.Linear(5, 3)
    optimizer = Optimizer(layer, OptimizerConfig(on_host=on_host), 1)
    layer(torch.ones(1, 5)).sum().backward()
    optimizer.step()
print("torch._dynamo" in sys.modules)
"""


def test_a_run_starts_without_torchs_compiler():
    """Its import takes each rank seconds, and torch's own Embedding and AdamW ask for it."""
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-c", START], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
