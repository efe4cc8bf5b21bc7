"""Which backend is taken for what is asked, and what every pass of a run asks for."""

import pytest
import torch
from helpers.tiny_world import write_yaml

from recr1 import train
from recr1.kernels import availability, logprob, sample_token
from recr1.kernels.availability import choose_backend, explain_unavailable, require_backend

CPU = torch.device("cpu")
GPU = torch.device("cuda")


@pytest.mark.parametrize("triton_fault", [None, "kernels: triton needs the package triton"])
def test_auto_is_triton_on_a_gpu_that_can_run_it(monkeypatch, triton_fault):
    monkeypatch.setattr(availability, "explain_unavailable", lambda backend, device: triton_fault)

    assert choose_backend("auto", GPU) == ("torch" if triton_fault else "triton")
    assert choose_backend("auto", CPU) == "torch"
    assert choose_backend("torch", GPU) == "torch"


def test_a_name_is_never_replaced(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    assert choose_backend("triton", CPU) == "triton"
    assert require_backend("auto", CPU) == "torch"
    with pytest.raises(RuntimeError, match="kernels: triton needs"):
        require_backend("triton", CPU)
    with pytest.raises(RuntimeError, match="'eager' is none of auto, torch, triton"):
        require_backend("eager", CPU)
    assert explain_unavailable("auto", CPU) is None


def test_every_pass_of_a_run_asks_for_the_configs_kernels(tmp_path, monkeypatch, capsys):
    """Sampling, loss, reference, old policy, logged tokens, validation and test: each asks by the
    setting's own word.
    """
    asked = []
    for module in (logprob, sample_token):

        def record(backend, device):
            asked.append(backend)
            return require_backend(backend, device)

        monkeypatch.setattr(module, "require_backend", record)
    settings = {
        "model.kernels": "auto",
        "loss.kl_coef": 0.1,
        "train.num_mini_batches": 2,
        "log.tokens_every": 1,
    }
    config = write_yaml(tmp_path, **settings)

    train.main([config])

    assert set(asked) == {"auto"}
    assert ", kernels torch, " in capsys.readouterr().out
