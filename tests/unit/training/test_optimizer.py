"""The optimizer against torch's own AdamW and clipping; nothing moves on a non-finite gradient."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from recr1.config.schema import OptimizerConfig as Config
from recr1.training.optimizer import NonFiniteGradient, Optimizer


def build_model_and_twin() -> tuple[torch.nn.Module, torch.nn.Module]:
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    twin = torch.nn.Linear(5, 3)
    twin.load_state_dict(model.state_dict())
    return model, twin


def build_model_with_blocks() -> torch.nn.Module:
    embed = torch.nn.Embedding(4, 3)
    block = torch.nn.Linear(3, 3)
    layers = torch.nn.ModuleList([block])
    return torch.nn.ModuleDict(dict(embed=embed, layers=layers))


def copy_weights(model: torch.nn.Module) -> list[torch.Tensor]:
    return [weight.detach().clone() for weight in model.parameters()]


def assert_same_weights(model: torch.nn.Module, expected: list[torch.Tensor]) -> None:
    for weight, expected_weight in zip(model.parameters(), expected, strict=True):
        assert torch.equal(weight, expected_weight)


def set_gradients(model: torch.nn.Module, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.grad = torch.randn(weight.shape, generator=rng)


@pytest.mark.parametrize("on_host", [False, True])
def test_equals_torchs_adamw_with_clipping_and_schedule(on_host):
    ours, theirs = build_model_and_twin()
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
        theirs.parameters(),
        lr=0.0,
        betas=(0.9, 0.95),
        eps=config.eps,
        weight_decay=0.1,
    )

    rates = []
    for _ in range(6):
        x = torch.randn(4, 5) * 3
        for model in (ours, theirs):
            loss = model(x).square().sum()
            loss.backward()

        norm, lr = optimizer.step()
        rates.append(lr)

        for group in adamw.param_groups:
            group["lr"] = lr
        expected_norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        adamw.step()
        adamw.zero_grad()

        assert norm == pytest.approx(expected_norm.item(), rel=1e-6)
        for weight, expected_weight in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(weight, expected_weight, rtol=1e-6, atol=1e-7)
            assert weight.grad is None

    # 2 of warm-up, then linear towards .2 * lr
    assert rates == pytest.approx([0.025, 0.05, 0.05, 0.04, 0.03, 0.02])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_moves_on_a_non_finite_gradient(value):
    for policy in ("stop", "skip"):
        model, _ = build_model_and_twin()
        before = copy_weights(model)
        config = Config(lr=0.1, on_nonfinite=policy)
        optimizer = Optimizer(model, config, steps=3)
        output = model(torch.ones(1, 5)).sum()
        output.backward()
        model.weight.grad[0, 0] = value

        if policy == "stop":
            with pytest.raises(NonFiniteGradient, match="step 1.*no weight was changed"):
                optimizer.step()
        else:
            optimizer.step()
            assert optimizer.num_skipped == 1

        assert_same_weights(model, before)


@pytest.mark.parametrize("on_host", [False, True])
def test_the_moments_are_there_before_the_first_step(on_host):
    """A run makes its optimizer before it samples: what lasts is then below what comes and goes."""
    model, _ = build_model_and_twin()

    optimizer = Optimizer(model, Config(cpu_offload=on_host), steps=1)

    [(_, adamw)] = optimizer.optimizers
    for weight in model.parameters():
        state = adamw.state[weight]
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == weight.shape
        assert not any(tensor.any() for tensor in state.values())
        assert not any(tensor.requires_grad for tensor in state.values())


def test_a_step_without_gradients_moves_nothing():
    model, _ = build_model_and_twin()
    before = copy_weights(model)
    config = Config(lr=0.1, weight_decay=0.5)
    optimizer = Optimizer(model, config, steps=3)

    norm, _ = optimizer.step()

    assert norm == 0.0
    assert_same_weights(model, before)


def test_muon_takes_the_matrices_of_the_blocks():
    model = build_model_with_blocks()
    name_of = {id(weight): name for name, weight in model.named_parameters()}

    def list_names(optimizer):
        names = []
        for group in optimizer.param_groups:
            for weight in group["params"]:
                names.append(name_of[id(weight)])
        return sorted(names)

    optimizer = Optimizer(model, Config(kind="muon"), steps=1)

    (_, adamw), (_, muon) = optimizer.optimizers
    assert list_names(muon) == ["layers.0.weight"]
    assert list_names(adamw) == ["embed.weight", "layers.0.bias"]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_momentum_does_not_act_without_gradients(kind):
    """Every group of the step had equal rewards: what earlier steps left in the state may not move
    a weight.
    """
    model = build_model_with_blocks()
    config = Config(kind=kind, lr=0.1, weight_decay=0.5)
    optimizer = Optimizer(model, config, steps=3)
    set_gradients(model, seed=0)
    initial = copy_weights(model)

    optimizer.step()
    after_one_step = copy_weights(model)
    for initial_weight, weight in zip(initial, after_one_step):
        assert (initial_weight != weight).any()

    assert optimizer.step() == (0.0, 0.1)
    assert_same_weights(model, after_one_step)


def test_a_skipped_step_leaves_no_trace_in_the_state():
    config = Config(lr=0.1, weight_decay=0.1, on_nonfinite="skip")
    skipping_model, plain_model = build_model_and_twin()
    skipping = Optimizer(skipping_model, config, steps=5)
    plain = Optimizer(plain_model, config, steps=5)

    # step 1 is not finite in one, and is no step in the other
    for step in (0, 1, 2):
        set_gradients(skipping_model, seed=step)
        if step == 1:
            skipping_model.bias.grad[0] = float("nan")
        skipping.step()
    for step in (0, 2):
        set_gradients(plain_model, seed=step)
        plain.step()

    assert skipping.num_skipped == 1
    assert plain.num_skipped == 0
    assert_same_weights(skipping_model, list(plain_model.parameters()))


START = """
import sys
import torch
from recr1.config.schema import OptimizerConfig
from recr1.model.hf_weights import make_empty_model
from recr1.training.optimizer import Optimizer

make_empty_model("experiments/policy")
for cpu_offload in (False, True):
    layer = torch.nn.Linear(5, 3)
    optimizer = Optimizer(layer, OptimizerConfig(cpu_offload=cpu_offload), 1)
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
