"""Report what this machine and this environment would run recr1 with, what clashes, and what to do
about it: `recr1 doctor`, or `python -m recr1.doctor`.

The second form needs nothing but Python: packages are tried in processes of their own, so one that
cannot be imported, or crashes, is a finding. --gpu also runs what of experiments/gpu_day.py must be
right on a GPU, about two minutes.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

GIB = 2**30

IMPORT_TIMEOUT = 300  # seconds: the first import on a network disk is slow

# What --gpu runs. Only a checkout has it: experiments/ is no part of the package.
GPU_DAY = Path(__file__).resolve().parents[1] / "experiments/gpu_day.py"
GPU_MINUTES = 2  # none of its sections begins later

# The packages whose versions are reported.
VERSIONS = (
    "recr1",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "numpy",
    "nltk",
    "regex",
    "rank-bm25",
    "tqdm",
    "pyyaml",
    "triton",
    "flash-attn",
    "numba",
    "faiss-cpu",
    "faiss-gpu",
    "faiss-gpu-cu12",
    "kernels",
    "tensorboard",
)

# The packages whose requirements are checked, beside those of recr1 ...
DEMANDING = (
    "torch",
    "transformers",
    "tokenizers",
    "numba",
    "flash-attn",
    "faiss-cpu",
    "faiss-gpu",
    "faiss-gpu-cu12",
)

# ... and the packages that they may require a version of.
RANGED = {
    "torch",
    "triton",
    "numpy",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface-hub",
    "regex",
    "llvmlite",
}

# The environment variables that are reported.
ENVIRONMENT = (
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
    "MKL_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "TOKENIZERS_PARALLELISM",
    "TRITON_INTERPRET",
    "HF_HUB_OFFLINE",
    "HF_HOME",
    "USE_HUB_KERNELS",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "NCCL_DEBUG",
    "NCCL_P2P_DISABLE",
    "NCCL_SOCKET_IFNAME",
)

# Code that sets `facts`, which a process of its own prints as one JSON object. It runs in the
# current folder, as python -m recr1.train would.
PROBES = {
    "torch": """
import torch, torch.distributed
gpus = []
for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
    p = torch.cuda.get_device_properties(i)
    free, _ = torch.cuda.mem_get_info(i)
    gpus.append(
        dict(name=p.name, capability=[p.major, p.minor], free=free, total=p.total_memory)
    )
is_distributed = torch.distributed.is_available()
facts = dict(
    cuda=torch.version.cuda,
    hip=torch.version.hip,
    gpus=gpus,
    arch=torch.cuda.get_arch_list(),
    threads=torch.get_num_threads(),
    onednn=torch.backends.mkldnn.is_available(),
    cpu=torch.backends.cpu.get_cpu_capability(),
    nccl=is_distributed and torch.distributed.is_nccl_available(),
    gloo=is_distributed and torch.distributed.is_gloo_available(),
)""",
    "transformers": """
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
import transformers.modeling_utils
facts = {}""",
    "recr1": """
import torch
from recr1 import train
from recr1.config.schema import ModelConfig, RetrieverConfig
from recr1.distributed import collectives
from recr1.kernels.availability import explain_unavailable
from recr1.kernels.cpu_linear import explain_inexact
from recr1.model.varlen_attention import AttentionUnavailable, choose_attention
from recr1.retrieval.bm25.searcher import SCORERS, check_scorer
device = collectives.device()
compute = torch.bfloat16 if device.type == "cuda" else torch.float32

def try_attention(name):
    try:
        backend = choose_attention(name, True, 128, compute, device)
    except AttentionUnavailable as e:
        return str(e)
    return str(backend) if name == "auto" else "can"

def try_scorer(name):
    try:
        check_scorer(name)
    except ValueError as e:
        return str(e)
    return "can"

facts = dict(
    device=device.type,
    compute=str(compute).removeprefix("torch."),
    attention={name: try_attention(name) for name in ("auto", "varlen", "flash", "sdpa")},
    head=ModelConfig().head,
    kernels=ModelConfig().kernels,
    triton=explain_unavailable("triton", device) or "can",
    batch_invariant=explain_inexact(compute, device) or "can",
    scorer=RetrieverConfig().scorer,
    scorers={name: try_scorer(name) for name in SCORERS},
)""",
    "numba": """
import numba
numba.njit(lambda x: x + 1)(1)
facts = {}""",
    "triton": """
import triton, triton.language
facts = {}""",
    "faiss": """
import faiss
faiss.IndexHNSWFlat, faiss.IndexFlatIP
gpus = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
facts = dict(version=faiss.__version__, gpus=gpus)""",
    "flash_attn": """
import flash_attn
flash_attn.flash_attn_varlen_func
facts = dict(version=flash_attn.__version__)""",
}

# Modules that may be absent, and the packages that bring them.
OPTIONAL = {
    "numba": ("numba",),
    "triton": ("triton",),
    "faiss": ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu12"),
    "flash_attn": ("flash-attn",),
}

# What does not work without a module.
NEEDED_BY = {
    "numba": "retriever.scorer=numba",
    "triton": "model.kernels=triton",
    "faiss": "retriever.kind=dense",
    "flash_attn": "model.attention=flash",
    "torch": "recr1",
    "transformers": "recr1",
    "recr1": "recr1",
}


@dataclass(frozen=True)
class Finding:
    """Say what is wrong and what to do. `broken`: something will not work; otherwise it works, but
    not as well as it could, or at a risk.
    """

    broken: bool
    what: str
    do: str


def report_broken(what: str, do: str) -> Finding:
    return Finding(True, what, do)


def warn(what: str, do: str) -> Finding:
    return Finding(False, what, do)


def examine_machine(run: str = "runs/run", gpu: bool = False) -> tuple[dict, list[Finding]]:
    """Return facts by section, and what is wrong.

    Args:
        run: the folder that a run would write to.
        gpu: run the correctness sections of experiments/gpu_day.py too.
    """
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": get_versions(),
        **probe_packages(),
        "cores": count_cores(),
        "memory": measure_memory(),
        "disk": measure_disk(run),
        "kernels": locate_kernels(),
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    }
    findings = [
        *check_imports(facts),
        *check_versions(),
        *check_packages(facts),
        *check_devices(facts),
        *check_machine(facts),
    ]
    if gpu:
        findings += check_gpu_day(facts)
    return facts, findings


# --- packages ---------------------------------------------------------------------------------


def probe_packages() -> dict[str, dict]:
    """Return the facts of each of PROBES, or {"error": its last line, "crashed": whether it died
    without one}. All run at once.
    """
    processes = {name: _start_probe(code) for name, code in PROBES.items()}
    return {name: _finish_probe(process) for name, process in processes.items()}


def _start_probe(code: str) -> subprocess.Popen:
    program = f"import json\n{code}\nprint('\\n' + json.dumps(facts))"
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )


def _finish_probe(process: subprocess.Popen) -> dict:
    try:
        out, err = process.communicate(timeout=IMPORT_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return {"error": f"no end after {IMPORT_TIMEOUT} s", "crashed": True}
    if process.returncode == 0:
        return json.loads(out.splitlines()[-1])
    messages = [line for line in err.splitlines() if line.strip()]
    error = messages[-1] if messages else f"died with exit code {process.returncode}"
    return {"error": error, "crashed": process.returncode < 0}


def get_versions() -> dict[str, str]:
    """Return the version of each of VERSIONS that is installed."""
    versions = {}
    for name in VERSIONS:
        version = _get_version(name)
        if version:
            versions[name] = version
    return versions


def _get_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_imports(facts: dict) -> Iterator[Finding]:
    """Yield what is installed and cannot be imported.

    A package that the others depend on is reported once.
    """
    versions = facts["versions"]
    has_gpu = bool(facts["torch"].get("gpus"))
    broken: set[str] = set()
    for name in PROBES:
        error = facts[name].get("error")
        if not error:
            continue
        packages = OPTIONAL.get(name, (name,))
        is_absent = name in OPTIONAL and not any(package in versions for package in packages)
        if is_absent:
            if name == "faiss" and "No module named 'faiss'" not in error:
                yield report_broken(
                    "faiss imports as what an uninstalled package left behind "
                    f"({error}): retriever.kind=dense will not work",
                    "pip uninstall -y faiss-cpu faiss-gpu, remove the folder faiss/ that stays, "
                    "then pip install faiss-cpu",
                )
            continue
        if name == "flash_attn" and not has_gpu:
            continue
        if name in ("recr1", "transformers") and broken & {"torch", "transformers"}:
            continue
        broken.add(name)
        yield report_broken(
            f"{name} cannot be imported ({error}): {NEEDED_BY[name]} will not work",
            _advise_import(name, [package for package in packages if package in versions]),
        )


def _advise_import(name: str, installed: list[str]) -> str:
    """Return what to do about a module that cannot be imported."""
    if name == "flash_attn":
        return (
            "it was built for another torch: pip uninstall flash-attn "
            "(model.attention=varlen needs no package), "
            "or build it anew with --no-build-isolation"
        )
    if name == "recr1":
        return "read that line; pip install -e . in the checkout, or pip install recr1 anew"
    return f"pip install --force-reinstall {' or '.join(installed) or name}"


def check_versions() -> Iterator[Finding]:
    """Yield installed versions outside of what recr1, and the packages it depends on, ask for."""
    try:
        import packaging.requirements  # noqa: F401
    except ImportError:
        yield report_broken(
            "the package packaging is not installed; transformers needs it",
            "pip install packaging",
        )
        return
    for package in ("recr1", *DEMANDING):
        try:
            metadata = importlib.metadata.metadata(package)
        except importlib.metadata.PackageNotFoundError:
            if package == "recr1":
                yield warn(
                    "recr1 is not installed here, "
                    "so the version ranges in its setup.py were not looked at",
                    "pip install -e . in the checkout",
                )
            continue
        yield from _check_python(package, metadata)
        for requirement in metadata.get_all("Requires-Dist") or []:
            yield from _check_requirement(package, metadata["Version"], requirement)


def _check_python(package: str, metadata: Any) -> Iterator[Finding]:
    """Yield a Python version that the package does not run on."""
    from packaging.specifiers import SpecifierSet

    wanted = metadata["Requires-Python"]
    installed = platform.python_version()
    if wanted and not SpecifierSet(wanted).contains(installed, prereleases=True):
        yield report_broken(
            f"{package} {metadata['Version']} needs Python {wanted}, this is {installed}",
            "make an environment with such a Python",
        )


def _check_requirement(package: str, package_version: str, text: str) -> Iterator[Finding]:
    """Yield a requirement of the package that is not met."""
    from packaging.requirements import Requirement

    wanted = Requirement(text)
    if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
        return
    is_ours = package == "recr1"
    version = _get_version(wanted.name)
    install = f"pip install '{wanted.name}{wanted.specifier}'"
    if version is None:
        if is_ours:
            yield report_broken(f"{wanted.name} is not installed; recr1 needs it", install)
        return
    normalized_name = re.sub(r"[-_.]+", "-", wanted.name).lower()
    is_checked = is_ours or normalized_name in RANGED
    if is_checked and not wanted.specifier.contains(version, prereleases=True):
        alternative = "" if is_ours else f", or another {package}"
        yield report_broken(
            f"{package} {package_version} needs {wanted.name}{wanted.specifier}, "
            f"{version} is installed",
            install + alternative,
        )


def check_packages(facts: dict) -> Iterator[Finding]:
    """Yield packages that spoil each other although each is in range."""
    versions = facts["versions"]
    faiss = [name for name in OPTIONAL["faiss"] if name in versions]
    if len(faiss) > 1:
        yield report_broken(
            f"{' and '.join(faiss)} are installed together and spoil each other: "
            "retriever.kind=dense will not work",
            f"pip uninstall -y {' '.join(faiss)}, then pip install one of them: "
            "uninstalling one alone leaves the other broken",
        )
    if "triton" in versions and "numpy" in versions:
        is_old_triton = _parse_numbers(versions["triton"]) < (3, 7, 1)
        is_new_numpy = _parse_numbers(versions["numpy"]) >= (2, 4)
        if is_old_triton and is_new_numpy:
            yield warn(
                f"triton {versions['triton']} in its interpreter (TRITON_INTERPRET=1) "
                f"fails under numpy {versions['numpy']} in loops whose end is known "
                "at run time only; on a GPU nothing is wrong",
                "pip install 'numpy<2.4', or a torch whose triton is 3.7.1 or newer",
            )
    yield from _check_kernels(facts["kernels"])
    torch_sees_no_gpu = not facts["torch"].get("gpus") and not facts["torch"].get("error")
    if "flash-attn" in versions and torch_sees_no_gpu:
        yield warn(
            f"flash-attn {versions['flash-attn']} is installed, but torch sees no GPU: "
            "model.attention=flash will not run here",
            "leave model.attention at auto, or pip uninstall flash-attn",
        )


def _check_kernels(kernels: dict) -> Iterator[Finding]:
    """Yield a top-level package that is named as Hugging Face's kernels."""
    imported = kernels["found"]
    installed = kernels["installed"]
    if not imported:
        return
    if installed and imported != installed:
        yield report_broken(
            f"{imported} shadows Hugging Face's package kernels: "
            "transformers will not import where it is asked for",
            "start from another folder, or rename that one; "
            "recr1's own kernels/ has no __init__.py and shadows nothing",
        )
    if not installed and kernels["package"]:
        yield warn(
            f"{imported} is a top-level package named as Hugging Face's kernels: "
            "transformers imports it to see what it is",
            "start from another folder, or rename it",
        )


# --- devices ----------------------------------------------------------------------------------


def check_devices(facts: dict) -> Iterator[Finding]:
    """Yield a GPU that is there and would not be used, or not well; and what torch lacks."""
    torch = facts["torch"]
    if torch.get("error"):
        return
    gpus = torch["gpus"]
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    if not gpus and not is_hidden and Path("/dev/nvidia0").exists():
        reason = "it is a build without CUDA"
        if torch["cuda"]:
            reason = f"it is built for CUDA {torch['cuda']}, the driver may be too old"
        yield report_broken(
            f"this machine has an NVIDIA GPU and torch {facts['versions'].get('torch')} "
            f"does not see it: {reason}",
            "compare the CUDA version that nvidia-smi shows, "
            "and install a torch for that one or an older; "
            "CUDA_VISIBLE_DEVICES='' for a run on the CPU",
        )
    for gpu in gpus:
        yield from _check_gpu(gpu, torch["arch"])
    if gpus and os.environ.get("TRITON_INTERPRET") == "1":
        yield report_broken(
            "TRITON_INTERPRET=1 makes Triton's kernels run on the CPU, a thousand times slower",
            "unset TRITON_INTERPRET",
        )
    if len(gpus) > 1 and not torch["nccl"]:
        yield report_broken(
            f"{len(gpus)} GPUs, but this torch has no NCCL: more than one rank will not work",
            "install a torch with NCCL (Linux, CUDA)",
        )
    if not gpus and not torch["gloo"]:
        yield warn(
            "this torch has no gloo: only one rank on the CPU",
            "install torch from its own index",
        )
    if not gpus and not torch["onednn"]:
        yield warn(
            "this torch has no oneDNN: float32 products are slower on a CPU, "
            "and model.batch_invariant will not work",
            "install torch from its own index",
        )


def _check_gpu(gpu: dict, architectures: list[str]) -> Iterator[Finding]:
    """Yield a compute capability that this torch has no code for, or that is old.

    `architectures`: what torch was built for, e.g. sm_90 (machine code, which later minor versions
    run as well) or compute_90 (which any later GPU compiles).
    """
    major, minor = gpu["capability"]
    capability = f"{gpu['name']} has compute capability {major}.{minor}"
    has_machine_code = False
    runs_here = any(name.startswith("compute_") for name in architectures)
    for name in architectures:
        if name.startswith("sm_"):
            has_machine_code = True
            match = re.fullmatch(r"(\d+)(\d)", name[3:].rstrip("af"))
            assert match is not None, name
            built_major, built_minor = map(int, match.groups())
            if built_major == major and built_minor <= minor:
                runs_here = True
    if has_machine_code and not runs_here:
        yield report_broken(
            f"{capability}; this torch holds code for {', '.join(architectures)}",
            "install a torch whose notes name that capability",
        )
    elif (major, minor) < (8, 0):
        yield warn(
            f"{capability}: no bfloat16 units and no varlen attention",
            "model.compute=float32 model.attention=sdpa",
        )


# --- what a GPU computes ----------------------------------------------------------------------


def check_gpu_day(facts: dict) -> Iterator[Finding]:
    """Run the correctness sections of experiments/gpu_day.py, and yield those that do not hold.

    Their results become facts["gpu_day"].
    """
    facts["gpu_day"] = []
    if not facts["torch"].get("gpus"):
        yield report_broken(
            "--gpu: torch sees no GPU here, so nothing was checked on one",
            "run it on the machine that has the GPU; without --gpu the rest is checked",
        )
        return
    if not GPU_DAY.exists():
        yield report_broken(
            "--gpu: its checks are experiments/gpu_day.py, and this recr1 is installed without "
            "experiments/",
            "get a checkout of recr1's repository and run python experiments/gpu_day.py in it",
        )
        return
    results, exit_code = run_gpu_day()
    facts["gpu_day"] = results
    if not results:
        yield report_broken(
            f"--gpu: {GPU_DAY} ended with exit code {exit_code} before its first section",
            f"run it by itself and read what it says: python {GPU_DAY} --only correctness",
        )
    for result in results:
        name = result["section"]
        if result["status"] in ("not ok", "raised"):
            yield report_broken(
                f"on this GPU the check {name} does not hold ({result['status']}): {result['why']}",
                f"python {GPU_DAY} --only {name} prints its figures; do not trust a run here "
                "until it holds",
            )
        elif result["status"] == "left out":
            yield warn(
                f"the check {name} was left out: {GPU_MINUTES} minutes were over",
                f"python {GPU_DAY} --only {name}",
            )


def run_gpu_day() -> tuple[list[dict], int]:
    """Run the sections in a process of its own; return their results and its exit code.

    What it says on the way goes to stderr, as it comes.
    """
    python_path = [str(GPU_DAY.parents[1]), os.environ.get("PYTHONPATH", "")]
    arguments = ["--only", "correctness", "--minutes", str(GPU_MINUTES), "--no-record"]
    process = subprocess.run(
        [sys.executable, str(GPU_DAY), *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, python_path))},
        stdout=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    results = []
    for line in process.stdout.splitlines():
        if line.startswith('{"section"'):
            results.append(json.loads(line))
    return results, process.returncode


# --- the machine ------------------------------------------------------------------------------


def check_machine(facts: dict) -> Iterator[Finding]:
    """Yield what is short or in the way: cores, memory, disk, environment variables."""
    cores = facts["cores"]
    if cores["usable"] < cores["count"]:
        yield warn(
            f"the machine has {cores['count']} cores, this process may use {cores['usable']}: "
            "a run takes as many threads as cores",
            f"run.threads={cores['usable']} (divided by the ranks)",
        )
    available = facts["memory"]["available"]
    if available is not None and available < 2 * GIB:
        yield warn(
            f"{_format_gib(available)} GiB of memory are free",
            "recr1 plan CONFIG says what a run needs",
        )
    disk = facts["disk"]
    if disk["why"]:
        yield report_broken(
            f"{disk['folder']}: a run could not write there: {disk['why']}",
            "set run.dir to a folder of yours",
        )
    elif disk["free"] < GIB:
        yield warn(
            f"{disk['folder']}: {_format_gib(disk['free'])} GiB are free; "
            "a checkpoint takes 16 bytes a weight, and two or three stand at once",
            "make room, set run.dir to another disk, or save.every=0",
        )
    parallelism = os.environ.get("TOKENIZERS_PARALLELISM", "")
    if parallelism.lower() in ("1", "true", "yes", "on", "y"):
        yield warn(
            "TOKENIZERS_PARALLELISM is on: a process that forks after it has tokenised can hang",
            "unset TOKENIZERS_PARALLELISM",
        )


def count_cores() -> dict[str, int]:
    """Count the cores. count: of the machine; usable: by this process, by its affinity and its
    control group.
    """
    count = os.cpu_count() or 1
    usable = count
    if hasattr(os, "sched_getaffinity"):
        usable = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            allowed = -(-int(quota) // int(period))  # rounded up
            usable = min(usable, max(1, allowed))
    except (OSError, ValueError):
        pass
    return {"count": count, "usable": usable}


def measure_memory() -> dict[str, int | None]:
    """Measure the bytes of the machine, and what this process may still have.

    They are None where the system does not say.
    """
    try:
        text = Path("/proc/meminfo").read_text()
        total, available = (
            # no such line: the TypeError below
            int(re.search(rf"{name}:\s+(\d+) kB", text)[1]) * 1024  # type: ignore[index]
            for name in ("MemTotal", "MemAvailable")
        )
    except (OSError, TypeError):
        return {"total": None, "available": None}
    try:
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        available = min(available, limit - used)
    except (OSError, ValueError):  # no control group, or "max"
        pass
    return {"total": total, "available": available}


def measure_disk(run: str) -> dict[str, Any]:
    """Measure the disk of the folder that a run would write to, which need not exist yet.

    why: the reason that it could not be written to, or empty.
    """
    folder = Path(run).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    usage = shutil.disk_usage(existing)
    why = ""
    if not existing.is_dir():
        why = f"{existing} is no folder"
    elif not os.access(existing, os.W_OK | os.X_OK):
        why = f"{existing} is not writable"
    return {"folder": str(folder), "free": usage.free, "total": usage.total, "why": why}


def locate_kernels() -> dict[str, Any]:
    """Find what `import kernels` would import from here, whether that is a package (a bare folder
    is none), and where Hugging Face's own is installed.
    """
    path = [os.getcwd(), *(entry for entry in sys.path if entry)]
    spec = PathFinder.find_spec("kernels", path)
    imported = None
    if spec:
        imported = spec.origin or next(iter(spec.submodule_search_locations or ()))

    installed = None
    try:
        files = importlib.metadata.files("kernels") or ()
    except importlib.metadata.PackageNotFoundError:
        files = ()
    for file in files:
        if file.as_posix() == "kernels/__init__.py":
            installed = file.locate()
            break
    return {
        "found": str(Path(imported).resolve()) if imported else None,
        "package": bool(spec and spec.origin),
        "installed": str(Path(installed).resolve()) if installed else None,
    }


def _parse_numbers(version: str) -> tuple[int, ...]:
    """Return the first three numbers of a version: "3.7.1+cu13" -> (3, 7, 1)."""
    public, _, _ = version.partition("+")
    numbers = re.findall(r"\d+", public)
    return tuple(map(int, numbers[:3]))


# --- the report -------------------------------------------------------------------------------


def format_report(facts: dict, findings: list[Finding]) -> str:
    """Return the report as text: the facts, then the findings, the broken ones first."""
    versions = facts["versions"]
    rows = [
        ("python", f"{facts['python']}, {facts['system']}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        *_list_torch_rows(facts["torch"]),
        *_list_recr1_rows(facts["recr1"]),
        *_list_machine_rows(facts),
        *_list_gpu_day_rows(facts.get("gpu_day", [])),
    ]
    if facts["environment"]:
        settings = [f"{name}={value}" for name, value in facts["environment"].items()]
        rows.append(("environment", " ".join(settings)))
    lines = [f"{name:<13}{value}" for name, value in rows]
    lines.append("")

    for finding in sorted(findings, key=lambda finding: not finding.broken):
        weight = "BROKEN " if finding.broken else "warning"
        lines.append(f"{weight} {finding.what}")
        lines.append(f"        do: {finding.do}")
    broken = sum(finding.broken for finding in findings)
    if findings:
        lines.append(f"will not work: {broken}, warnings: {len(findings) - broken}")
    else:
        lines.append("nothing is wrong")
    return "\n".join(lines)


def _list_torch_rows(torch: dict) -> Iterator[tuple[str, str]]:
    if torch.get("error"):
        return
    gpus = []
    for gpu in torch["gpus"]:
        major, minor = gpu["capability"]
        free = _format_gib(gpu["free"])
        gpus.append(
            f"{gpu['name']} ({major}.{minor}), {free} of {_format_gib(gpu['total'])} GiB free"
        )
    if gpus:
        yield "devices", "; ".join(gpus)
    else:
        build = f"for CUDA {torch['cuda']}" if torch["cuda"] else "without CUDA"
        onednn = ", oneDNN" if torch["onednn"] else ""
        yield "devices", f"cpu ({torch['cpu']}{onednn}); torch is built {build}"

    backend = "nothing: one rank only"
    if gpus:
        backend = "nccl"
    elif torch["gloo"]:
        backend = "gloo"
    yield "ranks", f"joined by {backend}"


def _list_recr1_rows(recr1: dict) -> Iterator[tuple[str, str]]:
    if recr1.get("error"):
        return
    yield (
        "compute",
        f"{recr1['compute']} on {recr1['device']} (model.compute=auto); "
        f"batch_invariant: {recr1['batch_invariant']}",
    )
    attention = recr1["attention"]
    yield "attention", f"{attention['auto']} (model.attention=auto, heads of 128)"
    for name in ("varlen", "flash"):
        yield f"  {name}", attention[name]
    yield "kernels", f"head {recr1['head']} by {recr1['kernels']} (the defaults)"
    yield "  triton", recr1["triton"]
    yield "scorer", f"{recr1['scorer']} (the default)"
    for name, verdict in recr1["scorers"].items():
        if name != recr1["scorer"]:
            yield f"  {name}", verdict


def _list_machine_rows(facts: dict) -> Iterator[tuple[str, str]]:
    faiss = facts["faiss"]
    if faiss.get("error"):
        yield (
            "dense",
            "faiss is not there or not usable: pip install faiss-cpu for retriever.kind=dense",
        )
    else:
        yield "dense", f"faiss {faiss['version']}, {faiss['gpus']} GPUs"

    cores = facts["cores"]
    torch = facts["torch"]
    threads = f", torch takes {torch['threads']} threads" if "threads" in torch else ""
    yield "cores", f"{cores['usable']} of {cores['count']} usable{threads}"

    memory = facts["memory"]
    available = _format_gib(memory["available"])
    yield "memory", f"{available} of {_format_gib(memory['total'])} GiB free"

    disk = facts["disk"]
    free = _format_gib(disk["free"])
    yield (
        "disk",
        f"{disk['folder']}: {free} of {_format_gib(disk['total'])} GiB free; "
        "a checkpoint takes 16 bytes a weight",
    )


def _list_gpu_day_rows(results: list[dict]) -> Iterator[tuple[str, str]]:
    name = "gpu"
    for result in results:
        why = f" ({result['why']})" if result["status"] == "cannot run" else ""
        yield name, f"{result['section']}: {result['status']}{why}"
        name = ""


def _format_gib(size: int | None) -> str:
    return "?" if size is None else f"{size / GIB:.1f}"


def main(run: str, as_json: bool, gpu: bool = False) -> int:
    """Print the report. Return 1 when something will not work, else 0."""
    facts, findings = examine_machine(run, gpu)
    print(format_report(facts, findings))
    ok = not any(finding.broken for finding in findings)
    if as_json:
        report = {"ok": ok, "facts": facts, "findings": [asdict(f) for f in findings]}
        print(json.dumps(report))
    return 0 if ok else 1


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(prog="python -m recr1.doctor")
    parser.add_argument("--run", metavar="RUN", default="runs/run")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--gpu", action="store_true")
    arguments = parser.parse_args()
    sys.exit(main(arguments.run, arguments.json, arguments.gpu))
