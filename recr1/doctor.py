"""What this machine and this environment would run recr1 with, what clashes, and what to do about
it: `recr1 doctor`, or `python -m recr1.doctor`.

The second form needs nothing but Python: packages are tried in processes of their own, so one that
cannot be imported, or crashes, is a finding.
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
from dataclasses import asdict, dataclass
from importlib.machinery import PathFinder
from pathlib import Path

GIB = 2**30

LIMIT = 300  # seconds that an import may take: the first one on a network disk is slow

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

# whose ranges are looked at, beside ours
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

# what they may ask of
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

ENVIRONMENT = (
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "TOKENIZERS_PARALLELISM",
    "TRITON_INTERPRET",
    "HF_HUB_OFFLINE",
    "HF_HOME",
    "USE_HUB_KERNELS",
    "PYTORCH_CUDA_ALLOC_CONF",
    "NCCL_DEBUG",
    "NCCL_P2P_DISABLE",
    "NCCL_SOCKET_IFNAME",
)

# each prints one JSON object; from the folder one stands in, as python -m recr1.train would
PROBES = {
    "torch": """
import torch, torch.distributed as td
gpus = [dict(name=p.name, capability=[p.major, p.minor], free=torch.cuda.mem_get_info(i)[0], total=p.total_memory)
        for i, p in enumerate(map(torch.cuda.get_device_properties, range(torch.cuda.device_count() if torch.cuda.is_available() else 0)))]
found = dict(cuda=torch.version.cuda, hip=torch.version.hip, gpus=gpus, arch=torch.cuda.get_arch_list(), threads=torch.get_num_threads(),
             onednn=torch.backends.mkldnn.is_available(), cpu=torch.backends.cpu.get_cpu_capability(), nccl=td.is_available() and td.is_nccl_available(),
             gloo=td.is_available() and td.is_gloo_available())""",
    "transformers": """
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
import transformers.modeling_utils
found = {}""",
    "recr1": """
import torch
from recr1 import dist, train
from recr1.config import Model, Retriever
from recr1.kernels.launch import refusal
from recr1.linear import inexact
from recr1.retrieval import bm25
from recr1.varlen import Unusable, choose
device = dist.device()
compute = torch.bfloat16 if device.type == "cuda" else torch.float32
def attention(name):
    try:
        return "can" if name != "auto" and choose(name, True, 128, compute, device) else str(choose(name, True, 128, compute, device))
    except Unusable as e:
        return str(e)
def scorer(name):
    try:
        return bm25.check(name) or "can"
    except ValueError as e:
        return str(e)
found = dict(device=device.type, compute=str(compute).removeprefix("torch."), attention={name: attention(name) for name in ("auto", "varlen", "flash", "sdpa")},
             head=Model().head, kernels=Model().kernels, triton=refusal("triton", device) or "can", batch_invariant=inexact(compute, device) or "can",
             scorer=Retriever().scorer, scorers={name: scorer(name) for name in bm25.SCORERS})""",
    "numba": """
import numba
numba.njit(lambda x: x + 1)(1)
found = {}""",
    "triton": """
import triton, triton.language
found = {}""",
    "faiss": """
import faiss
faiss.IndexHNSWFlat, faiss.IndexFlatIP
found = dict(version=faiss.__version__, gpus=faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0)""",
    "flash_attn": """
import flash_attn
flash_attn.flash_attn_varlen_func
found = dict(version=flash_attn.__version__)""",
}

OPTIONAL = {
    "numba": ("numba",),
    "triton": ("triton",),
    "faiss": ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu12"),
    "flash_attn": ("flash-attn",),
}

MEANS = {
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
    """broken: something will not work. Otherwise it works, but not as well as it could, or at a
    risk.
    """

    broken: bool
    what: str
    do: str


def examine_machine(run: str = "runs/run") -> tuple[dict, list[Finding]]:
    """Facts by section, and what is wrong. run: the folder that a run would write to."""
    probes = probe_packages()
    versions = {name: version for name in VERSIONS if (version := _get_version(name))}
    facts = dict(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        versions=versions,
        **probes,
        cores=count_cores(),
        memory=measure_memory(),
        disk=measure_disk(run),
        kernels=locate_kernels(),
        environment={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    )
    return facts, [
        *check_imports(facts),
        *check_versions(facts),
        *check_packages(facts),
        *check_devices(facts),
        *check_machine(facts),
    ]


def probe_packages() -> dict[str, dict]:
    """What each of PROBES found, or {"error": its last line, "crashed": whether it died without
    one}; all at once.
    """
    running = {
        name: subprocess.Popen(
            [
                sys.executable,
                "-W",
                "ignore",
                "-c",
                f"import json\n{code}\nprint('\\n' + json.dumps(found))",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        for name, code in PROBES.items()
    }
    found = {}
    for name, process in running.items():
        try:
            out, err = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            found[name] = dict(error=f"no end after {LIMIT} s", crashed=True)
            continue
        if process.returncode == 0:
            found[name] = json.loads(out.splitlines()[-1])
        else:
            last = next((line for line in reversed(err.splitlines()) if line.strip()), "")
            found[name] = dict(
                error=last or f"died with exit code {process.returncode}",
                crashed=process.returncode < 0,
            )
    return found


def _get_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_imports(facts: dict) -> list[Finding]:
    """What is there and cannot be imported. A package that the others stand on is said once."""
    found = []
    broken = set()
    for name in PROBES:
        error = facts[name].get("error")
        absent = name in OPTIONAL and not any(
            package in facts["versions"] for package in OPTIONAL[name]
        )
        if name == "faiss" and error and absent and "No module named 'faiss'" not in error:
            found.append(
                Finding(
                    True,
                    f"faiss imports as what an uninstalled package left behind ({error}): retriever.kind=dense will not work",
                    "pip uninstall -y faiss-cpu faiss-gpu, remove the folder faiss/ that stays, then pip install faiss-cpu",
                )
            )
        elif error and not absent and not (name == "flash_attn" and not facts["torch"].get("gpus")):
            if name in ("recr1", "transformers") and broken & {"torch", "transformers"}:
                continue
            broken.add(name)
            do = {
                "flash_attn": "it was built for another torch: pip uninstall flash-attn (model.attention=varlen needs no package), or build it anew with --no-build-isolation",
                "recr1": "read that line; pip install -e . in the checkout, or pip install recr1 anew",
            }.get(
                name,
                f"pip install --force-reinstall {' or '.join(p for p in OPTIONAL.get(name, (name,)) if p in facts['versions']) or name}",
            )
            found.append(
                Finding(
                    True, f"{name} cannot be imported ({error}): {MEANS[name]} will not work", do
                )
            )
    return found


def check_versions(facts: dict) -> list[Finding]:
    """Installed versions outside of what recr1, and the packages it stands on, ask for."""
    try:
        from packaging.requirements import Requirement
        from packaging.specifiers import SpecifierSet
    except ImportError:
        return [
            Finding(
                True,
                "the package packaging is not installed; transformers needs it",
                "pip install packaging",
            )
        ]
    found = []
    for demands in ("recr1", *DEMANDING):
        try:
            metadata = importlib.metadata.metadata(demands)
        except importlib.metadata.PackageNotFoundError:
            if demands == "recr1":
                found.append(
                    Finding(
                        False,
                        "recr1 is not installed here, so the version ranges in its setup.py were not looked at",
                        "pip install -e . in the checkout",
                    )
                )
            continue
        if (python := metadata["Requires-Python"]) and not SpecifierSet(python).contains(
            platform.python_version(), prereleases=True
        ):
            found.append(
                Finding(
                    True,
                    f"{demands} {metadata['Version']} needs Python {python}, this is {platform.python_version()}",
                    "make an environment with such a Python",
                )
            )
        for text in metadata.get_all("Requires-Dist") or []:
            wanted = Requirement(text)
            if wanted.marker and not wanted.marker.evaluate(dict(extra="")):
                continue
            name = re.sub(r"[-_.]+", "-", wanted.name).lower()
            version = _get_version(wanted.name)
            if version is None and demands == "recr1":
                found.append(
                    Finding(
                        True,
                        f"{wanted.name} is not installed; recr1 needs it",
                        f"pip install '{wanted.name}{wanted.specifier}'",
                    )
                )
            elif (
                version is not None
                and (demands == "recr1" or name in RANGED)
                and not wanted.specifier.contains(version, prereleases=True)
            ):
                found.append(
                    Finding(
                        True,
                        f"{demands} {metadata['Version']} needs {wanted.name}{wanted.specifier}, {version} is installed",
                        f"pip install '{wanted.name}{wanted.specifier}'"
                        + (f", or another {demands}" if demands != "recr1" else ""),
                    )
                )
    return found


def check_packages(facts: dict) -> list[Finding]:
    """Packages that spoil each other although each is in range."""
    versions = facts["versions"]
    found = []
    faiss = [name for name in OPTIONAL["faiss"] if name in versions]
    if len(faiss) > 1:
        found.append(
            Finding(
                True,
                f"{' and '.join(faiss)} are installed together and spoil each other: retriever.kind=dense will not work",
                f"pip uninstall -y {' '.join(faiss)}, then pip install one of them: uninstalling one alone leaves the other broken",
            )
        )
    if (
        "triton" in versions
        and "numpy" in versions
        and _parse_numbers(versions["triton"]) < (3, 7, 1)
        and _parse_numbers(versions["numpy"]) >= (2, 4)
    ):
        found.append(
            Finding(
                False,
                f"triton {versions['triton']} in its interpreter (TRITON_INTERPRET=1) fails under numpy {versions['numpy']} in loops whose end is known "
                "at run time only; on a GPU nothing is wrong",
                "pip install 'numpy<2.4', or a torch whose triton is 3.7.1 or newer",
            )
        )
    stray = facts["kernels"]["found"]
    theirs = facts["kernels"]["installed"]
    if stray and theirs and stray != theirs:
        found.append(
            Finding(
                True,
                f"{stray} shadows Hugging Face's package kernels: transformers will not import where it is asked for",
                "start from another folder, or rename that one; recr1's own kernels/ has no __init__.py and shadows nothing",
            )
        )
    elif stray and not theirs and facts["kernels"]["package"]:
        found.append(
            Finding(
                False,
                f"{stray} is a top-level package named as Hugging Face's kernels: transformers imports it to see what it is",
                "start from another folder, or rename it",
            )
        )
    if (
        "flash-attn" in versions
        and not facts["torch"].get("gpus")
        and not facts["torch"].get("error")
    ):
        found.append(
            Finding(
                False,
                f"flash-attn {versions['flash-attn']} is installed, but torch sees no GPU: model.attention=flash will not run here",
                "leave model.attention at auto, or pip uninstall flash-attn",
            )
        )
    return found


def check_devices(facts: dict) -> list[Finding]:
    """A GPU that is there and would not be used, or not well."""
    torch = facts["torch"]
    versions = facts["versions"]
    found = []
    if torch.get("error"):
        return []
    nvidia = Path("/dev/nvidia0").exists() and os.environ.get("CUDA_VISIBLE_DEVICES") != ""
    if nvidia and not torch["gpus"]:
        found.append(
            Finding(
                True,
                f"this machine has an NVIDIA GPU and torch {versions.get('torch')} does not see it: "
                + (
                    f"it is built for CUDA {torch['cuda']}, the driver may be too old"
                    if torch["cuda"]
                    else "it is a build without CUDA"
                ),
                "compare the CUDA version that nvidia-smi shows, and install a torch for that one or an older; CUDA_VISIBLE_DEVICES='' for a run on the CPU",
            )
        )
    for gpu in torch["gpus"]:
        major, minor = gpu["capability"]
        built = [
            tuple(map(int, re.fullmatch(r"(\d+)(\d)", name[3:].rstrip("af")).groups()))
            for name in torch["arch"]
            if name.startswith("sm_")
        ]
        if (
            built
            and not any(m == major and n <= minor for m, n in built)
            and not any(name.startswith("compute_") for name in torch["arch"])
        ):
            found.append(
                Finding(
                    True,
                    f"{gpu['name']} has compute capability {major}.{minor}; this torch holds code for {', '.join(torch['arch'])}",
                    "install a torch whose notes name that capability",
                )
            )
        elif (major, minor) < (8, 0):
            found.append(
                Finding(
                    False,
                    f"{gpu['name']} has compute capability {major}.{minor}: no bfloat16 units and no varlen attention",
                    "model.compute=float32 model.attention=sdpa",
                )
            )
    if torch["gpus"] and os.environ.get("TRITON_INTERPRET") == "1":
        found.append(
            Finding(
                True,
                "TRITON_INTERPRET=1 makes Triton's kernels run on the CPU, a thousand times slower",
                "unset TRITON_INTERPRET",
            )
        )
    if len(torch["gpus"]) > 1 and not torch["nccl"]:
        found.append(
            Finding(
                True,
                f"{len(torch['gpus'])} GPUs, but this torch has no NCCL: more than one rank will not work",
                "install a torch with NCCL (Linux, CUDA)",
            )
        )
    if not torch["gpus"] and not torch["gloo"]:
        found.append(
            Finding(
                False,
                "this torch has no gloo: only one rank on the CPU",
                "install torch from its own index",
            )
        )
    if not torch["gpus"] and not torch["onednn"]:
        found.append(
            Finding(
                False,
                "this torch has no oneDNN: float32 products are slower on a CPU, and model.batch_invariant will not work",
                "install torch from its own index",
            )
        )
    return found


def check_machine(facts: dict) -> list[Finding]:
    """Cores, memory, disk, environment variables."""
    found = []
    cores = facts["cores"]
    disk = facts["disk"]
    if cores["usable"] < cores["count"]:
        found.append(
            Finding(
                False,
                f"the machine has {cores['count']} cores, this process may use {cores['usable']}: a run takes as many threads as cores",
                f"run.threads={cores['usable']} (divided by the ranks)",
            )
        )
    if facts["memory"]["available"] is not None and facts["memory"]["available"] < 2 * GIB:
        found.append(
            Finding(
                False,
                f"{_format_gib(facts['memory']['available'])} GiB of memory are free",
                "recr1 plan CONFIG says what a run needs",
            )
        )
    if disk["why"]:
        found.append(
            Finding(
                True,
                f"{disk['folder']}: a run could not write there: {disk['why']}",
                "set run.dir to a folder of yours",
            )
        )
    elif disk["free"] < GIB:
        found.append(
            Finding(
                False,
                f"{disk['folder']}: {_format_gib(disk['free'])} GiB are free; a checkpoint takes 16 bytes a weight, and two or three stand at once",
                "make room, set run.dir to another disk, or save.every=0",
            )
        )
    if os.environ.get("TOKENIZERS_PARALLELISM", "").lower() in ("1", "true", "yes", "on", "y"):
        found.append(
            Finding(
                False,
                "TOKENIZERS_PARALLELISM is on: a process that forks after it has tokenised can hang",
                "unset TOKENIZERS_PARALLELISM",
            )
        )
    return found


def count_cores() -> dict:
    """count: of the machine; usable: by this process, by its affinity and its control group."""
    count = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else count
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        usable = usable if quota == "max" else min(usable, max(1, -(-int(quota) // int(period))))
    except (OSError, ValueError):
        pass
    return dict(count=count, usable=usable)


def measure_memory() -> dict:
    """Bytes of the machine, and what this process may still have; None where the system does not
    say.
    """
    try:
        text = Path("/proc/meminfo").read_text()
        total, available = (
            int(re.search(rf"{name}:\s+(\d+) kB", text)[1]) * 1024
            for name in ("MemTotal", "MemAvailable")
        )
    except (OSError, TypeError):
        return dict(total=None, available=None)
    try:
        group = Path("/sys/fs/cgroup")
        available = min(
            available,
            int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()),
        )
    except (OSError, ValueError):  # no control group, or "max"
        pass
    return dict(total=total, available=available)


def measure_disk(run: str) -> dict:
    """The disk of the folder that a run would write to, which need not exist yet; why: it could
    not.
    """
    folder = Path(run).absolute()
    there = next(p for p in (folder, *folder.parents) if p.exists())
    usage = shutil.disk_usage(there)
    why = (
        ""
        if there.is_dir() and os.access(there, os.W_OK | os.X_OK)
        else f"{there} is {'not writable' if there.is_dir() else 'no folder'}"
    )
    return dict(folder=str(folder), free=usage.free, total=usage.total, why=why)


def locate_kernels() -> dict:
    """What `import kernels` finds from here, whether that is a package (a bare folder is none), and
    where Hugging Face's own lies.
    """
    try:
        spec = PathFinder.find_spec("kernels", [os.getcwd(), *(p for p in sys.path if p)])
        package = bool(spec and spec.origin)
        found = spec and (spec.origin or next(iter(spec.submodule_search_locations)))
        theirs = next(
            (
                f
                for f in importlib.metadata.files("kernels") or ()
                if f.as_posix() == "kernels/__init__.py"
            ),
            None,
        )
    except importlib.metadata.PackageNotFoundError:
        theirs = None
    return dict(
        found=str(Path(found).resolve()) if found else None,
        package=package,
        installed=str(Path(theirs.locate()).resolve()) if theirs else None,
    )


def _parse_numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version.partition("+")[0])[:3]))


def _format_gib(n: int | None) -> str:
    return "?" if n is None else f"{n / GIB:.1f}"


def format_report(facts: dict, findings: list[Finding]) -> str:
    """As text."""
    torch = facts["torch"]
    ours = facts["recr1"]
    lines = [
        ("python", f"{facts['python']}, {facts['system']}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in facts["versions"].items())),
    ]
    if not torch.get("error"):
        gpus = [
            f"{g['name']} ({g['capability'][0]}.{g['capability'][1]}), {_format_gib(g['free'])} of {_format_gib(g['total'])} GiB free"
            for g in torch["gpus"]
        ]
        lines.append(
            (
                "devices",
                "; ".join(gpus)
                or f"cpu ({torch['cpu']}{', oneDNN' * torch['onednn']}); torch is built {'for CUDA ' + torch['cuda'] if torch['cuda'] else 'without CUDA'}",
            )
        )
        lines.append(
            (
                "ranks",
                f"joined by {'nccl' if gpus else 'gloo' if torch['gloo'] else 'nothing: one rank only'}",
            )
        )
    if not ours.get("error"):
        lines += [
            (
                "compute",
                f"{ours['compute']} on {ours['device']} (model.compute=auto); batch_invariant: {ours['batch_invariant']}",
            ),
            ("attention", f"{ours['attention']['auto']} (model.attention=auto, heads of 128)"),
            *((f"  {name}", ours["attention"][name]) for name in ("varlen", "flash")),
            ("kernels", f"head {ours['head']} by {ours['kernels']} (the defaults)"),
            ("  triton", ours["triton"]),
            ("scorer", f"{ours['scorer']} (the default)"),
            *(
                (f"  {name}", why)
                for name, why in ours["scorers"].items()
                if name != ours["scorer"]
            ),
        ]
    faiss = facts["faiss"]
    lines += [
        (
            "dense",
            "faiss is not there or not usable: pip install faiss-cpu for retriever.kind=dense"
            if faiss.get("error")
            else f"faiss {faiss['version']}, {faiss['gpus']} GPUs",
        ),
        (
            "cores",
            f"{facts['cores']['usable']} of {facts['cores']['count']} usable"
            + (f", torch takes {torch['threads']} threads" if "threads" in torch else ""),
        ),
        (
            "memory",
            f"{_format_gib(facts['memory']['available'])} of {_format_gib(facts['memory']['total'])} GiB free",
        ),
        (
            "disk",
            f"{facts['disk']['folder']}: {_format_gib(facts['disk']['free'])} of {_format_gib(facts['disk']['total'])} GiB free; a checkpoint takes 16 bytes a weight",
        ),
    ]
    lines += [
        ("environment", " ".join(f"{k}={v}" for k, v in facts["environment"].items()))
    ] * bool(facts["environment"])
    text = [f"{name:<13}{value}" for name, value in lines] + [""]
    for f in sorted(findings, key=lambda f: not f.broken):
        text += [f"{'BROKEN ' if f.broken else 'warning'} {f.what}", f"        do: {f.do}"]
    broken = sum(f.broken for f in findings)
    return "\n".join(
        text
        + [
            f"will not work: {broken}, warnings: {len(findings) - broken}"
            if findings
            else "nothing is wrong"
        ]
    )


def main(run: str, as_json: bool) -> int:
    """Prints the report; 1 when something will not work."""
    facts, findings = examine_machine(run)
    print(format_report(facts, findings))
    ok = not any(f.broken for f in findings)
    if as_json:
        print(json.dumps(dict(ok=ok, facts=facts, findings=[asdict(f) for f in findings])))
    return 0 if ok else 1


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(prog="python -m recr1.doctor")
    parser.add_argument("--run", metavar="RUN", default="runs/run")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    sys.exit(main(arguments.run, arguments.json))
