"""What the sections share: where they run, in which size, models with random weights, and clocks.

Legend: P prompts, G siblings, C width, V vocabulary.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import NamedTuple

import torch

from recr1.data_types import Prompt
from recr1.distributed.fsdp import Sharded
from recr1.kernels.availability import BACKENDS, explain_unavailable
from recr1.memory.estimate import MemoryEstimate
from recr1.model.decoder import Decoder
from recr1.model.rope import DecoderConfig
from recr1.training.dry_run import read_model_shape
from recr1.training.load_model import choose_model_backend

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "experiments/benchmarks"
BUNDLED_POLICY = ROOT / "experiments/policy"

REACHABLE = 151_665  # ids that Qwen2.5's tokenizer has: an odd number

TINY_SHAPE = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=512,
)
TINY_REACHABLE = 401


class Work(NamedTuple):
    """What is sampled or trained: P prompts, G texts of each, and their tokens."""

    prompts: int
    group: int
    prompt: int
    completion: int


PAPER_STEP = Work(prompts=32, group=12, prompt=256, completion=512)  # of Rec-R1
TINY_STEP = Work(prompts=2, group=2, prompt=8, completion=8)


@dataclass(frozen=True)
class Setting:
    """Where the sections run, and how large.

    Attributes:
        tiny: take sizes with which a CPU or a stand-in GPU is through in seconds; then times and
            rates mean nothing.
        folder: for the files of the sections; it is removed in the end.
    """

    device: torch.device
    tiny: bool
    folder: Path

    @property
    def has_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def has_real_gpu(self) -> bool:
        """Tell a GPU from a stand-in: a torch that was built without CUDA has no other."""
        is_built_for_gpus = torch.version.cuda is not None or torch.version.hip is not None
        return self.has_gpu and is_built_for_gpus

    @property
    def compute(self) -> torch.dtype:
        """Return what a run computes in here: the value that model.compute=auto stands for."""
        return torch.bfloat16 if self.has_gpu else torch.float32

    @property
    def kernels(self) -> list[str]:
        """List what can compute heads and choose tokens here: torch, and triton where it runs."""
        if self.has_gpu and not self.has_real_gpu:
            return ["torch"]  # a stand-in runs no machine code
        return [name for name in BACKENDS if explain_unavailable(name, self.device) is None]

    @property
    def fastest_kernels(self) -> str:
        return self.kernels[-1]

    @property
    def step(self) -> Work:
        return TINY_STEP if self.tiny else PAPER_STEP

    @property
    def reachable(self) -> int:
        return TINY_REACHABLE if self.tiny else REACHABLE

    def pick(self, full: int, tiny: int) -> int:
        """Return the size that is meant."""
        return tiny if self.tiny else full

    def draw(
        self, *shape: int, std: float = 1.0, dtype: torch.dtype = torch.bfloat16
    ) -> torch.Tensor:
        """Draw normal numbers on the device."""
        if self.tiny:  # a stand-in GPU has no random numbers of its own
            return (torch.randn(shape) * std).to(dtype).to(self.device)
        return torch.randn(shape, device=self.device).mul_(std).to(dtype)

    def draw_uniforms(self, *shape: int) -> torch.Tensor:
        """Draw float64 numbers in [0, 1) on the device."""
        return torch.rand(shape, dtype=torch.float64).to(self.device)

    def draw_ids(self, *shape: int) -> torch.Tensor:
        """Draw ids that the tokenizer has, on the device."""
        return torch.randint(self.reachable, shape).to(self.device)

    def synchronize(self) -> None:
        """Wait for the GPU, where there is one."""
        if self.has_gpu:
            torch.cuda.synchronize()

    def time(self, run: Callable[[], object]) -> float:
        """Return the seconds of one call, the GPU's work included."""
        self.synchronize()
        began = time.perf_counter()
        run()
        self.synchronize()
        return time.perf_counter() - began

    def time_many(self, run: Callable[[], object], calls: int = 20) -> float:
        """Return the seconds of a call: the median of five rows of calls without a wait between."""
        if self.tiny:
            return self.time(run)

        def run_row() -> None:
            for _ in range(calls):
                run()

        run_row()
        return median(self.time(run_row) for _ in range(5)) / calls


def free_memory(setting: Setting) -> None:
    """Give back what the last section has left."""
    gc.collect()
    if setting.has_gpu:
        try:
            torch.cuda.empty_cache()
        except RuntimeError:  # CUDA has ended in this process: gpu_day.py looks for that itself
            pass


def relative_error(actual: torch.Tensor, want: torch.Tensor) -> float:
    """Return ||actual - want|| / ||want||."""
    want = want.double()
    return ((actual.double() - want).norm() / want.norm()).item()


def measure_copy_rate(setting: Setting) -> float:
    """Return the bytes per second that a copy of 1 GiB reads and writes."""
    source = torch.ones(setting.pick(1 << 30, 1 << 12), dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    seconds = setting.time_many(lambda: target.copy_(source), calls=5)
    return 2 * source.nbytes / seconds


# --- models and prompts ---------------------------------------------------------------------------


def read_shape(size: str, tiny: bool) -> DecoderConfig:
    """Read the shape of Qwen2.5 of that size ("0.5B", "1.5B", "3B"), or a tiny one of its kind."""
    any_config = str(ROOT / "experiments/configs/any.yaml")  # shapes.yaml is beside it
    shape = read_model_shape(f"Qwen/Qwen2.5-{size}-Instruct", any_config)
    return replace(shape, **TINY_SHAPE) if tiny else shape


def make_random_policy(
    setting: Setting,
    size: str,
    *,
    compute: torch.dtype = torch.bfloat16,
    checkpointing: bool = False,
    is_reference: bool = False,
    kernels: str = "torch",
) -> Sharded:
    """Make a policy with random weights, as training/load_model.py makes one of a folder."""
    shape = read_shape(size, setting.tiny)
    with torch.device("meta"):
        decoder = Decoder(shape, setting.reachable)
    backend = choose_model_backend(shape, "auto", compute, setting.device, kernels)
    decoder.set_backend(backend)
    sizes = {name: parameter.shape for name, parameter in decoder.named_parameters()}

    def draw_weight(name: str) -> torch.Tensor:
        if len(sizes[name]) == 1:
            return torch.ones(sizes[name])
        return setting.draw(*sizes[name], std=0.02, dtype=torch.float32)

    return Sharded(
        decoder,
        draw_weight,
        device=setting.device,
        master=compute if is_reference else torch.float32,
        compute=compute,
        gradient_checkpointing=checkpointing,
        frozen=("*",) if is_reference else (),
    )


def make_prompts(count: int, length: int, vocabulary: int) -> list[Prompt]:
    """Make prompts of random ids, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (count, length), generator=generator)
    prompts = []
    for row, prompt_ids in enumerate(ids.tolist()):
        prompts.append(Prompt(str(row), row, "", tuple(prompt_ids)))
    return prompts


def predict_phase_bytes(estimate: MemoryEstimate) -> dict[str, float]:
    """Return what `recr1 plan` counts for each phase, in bytes."""
    phases = {}
    for name, terms in estimate.phases().items():
        phases[name] = sum(term.bytes for term in terms)
    return phases


# --- others' code ---------------------------------------------------------------------------------


@cache
def load_benchmark(name: str) -> ModuleType:
    """Load a script of experiments/benchmarks for its functions.

    Their folder does not stay on the path: it has a kernels.py, and Hugging Face's package of that
    name is looked for by others.
    """
    path = BENCHMARKS / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    sys.path.append(str(BENCHMARKS))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


@contextmanager
def attribute_set(owner: object, name: str, value: object) -> Iterator[None]:
    """Set an attribute of a module for the duration of the block."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def run_python(
    arguments: list[str], timeout: float, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run this Python on the checkout in a process of its own; its output is in the result."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path} | env,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
