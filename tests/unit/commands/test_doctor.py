"""recr1 doctor: each clash staged (package folders on a path of its own, a stray folder, one core,
a run folder that cannot be) and found, with what to do.

Whole runs of the doctor are few: each imports every package. Where a clash shows in names and
versions the imports of a clean run stand in.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from recr1 import cli, doctor
from recr1.training.launch import run_guarded

ROOT = Path(__file__).resolve().parents[3]


class Package(NamedTuple):
    """An installed package."""

    name: str
    version: str
    requires: list[str] = []
    files: dict[str, str] = {}  # path: text


def install_packages(folder: Path, packages: list[Package]) -> Path:
    """Write the packages into the folder as pip would; return the folder."""
    for package in packages:
        info = folder / f"{package.name.replace('-', '_')}-{package.version}.dist-info"
        info.mkdir(parents=True)

        metadata = ["Metadata-Version: 2.1", f"Name: {package.name}", f"Version: {package.version}"]
        metadata += [f"Requires-Dist: {requirement}" for requirement in package.requires]
        (info / "METADATA").write_text("\n".join(metadata) + "\n")

        record = [f"{path},,\n" for path in (*package.files, f"{info.name}/METADATA")]
        (info / "RECORD").write_text("".join(record))

        for path, text in package.files.items():
            write_file(folder / path, text)
    return folder


def write_file(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def run_doctor(
    cwd: Path, stage: Path | None = None, code: str = "", run_folder: str = "runs/run", **env
) -> tuple[int, dict, str]:
    """Run the doctor in a folder, with `stage` before all other packages; return (exit code, the
    JSON object, the text). `code`: to run before it in its process.
    """
    command = ["-m", "recr1.doctor", "--json"]
    if code:
        program = ["import sys", "from recr1 import doctor", code]
        program.append(f"sys.exit(doctor.main({run_folder!r}, True))")
        command = ["-c", "\n".join(program)]
    environment = dict(os.environ)
    environment.pop("TOKENIZERS_PARALLELISM", None)
    environment.pop("TRITON_INTERPRET", None)
    environment["PYTHONPATH"] = f"{stage}{os.pathsep}{ROOT}" if stage else str(ROOT)

    process = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=environment | env,
        capture_output=True,
        text=True,
        timeout=900,
    )

    assert process.returncode in (0, 1), process.stderr
    assert not process.stderr, process.stderr
    *text, last = process.stdout.splitlines()
    return process.returncode, json.loads(last), "\n".join(text)


def list_broken(report: dict) -> list[str]:
    """Return what is broken, by the doctor's JSON object."""
    return [finding["what"] for finding in report["findings"] if finding["broken"]]


def find_finding(report: dict, words: str) -> dict:
    """Return the one finding that has these words."""
    [finding] = [finding for finding in report["findings"] if words in finding["what"]]
    return finding


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> tuple[int, dict, str]:
    """Return what a run of the doctor in an empty folder gives."""
    return run_doctor(tmp_path_factory.mktemp("clean"))


@pytest.fixture(scope="module")
def clean_probes(clean) -> dict[str, dict]:
    """Return what a clean run's imports of the packages gave."""
    _, report, _ = clean
    return {name: report["facts"][name] for name in doctor.PROBES}


@pytest.fixture(scope="module")
def quick(clean_probes) -> str:
    """Return code that lets a clean run's imports stand in."""
    return write_probes(clean_probes)


def write_probes(probes: dict[str, dict]) -> str:
    """Return code that lets these stand in for what the imports of the packages give."""
    text = json.dumps(probes)
    return f"import json\ndoctor.probe_packages = lambda: json.loads({text!r})"


def test_nothing_is_wrong_here(clean):
    code, report, text = clean
    assert list_broken(report) == []
    assert report["ok"]
    assert code == 0

    facts = report["facts"]
    recr1 = facts["recr1"]
    assert {"torch", "transformers", "numpy"} <= facts["versions"].keys()
    for name in ("torch", "transformers", "recr1"):
        assert "error" not in facts[name]
    assert recr1["scorers"].keys() == {"torch", "numba"}
    assert recr1["scorer"] == "torch"
    assert recr1["head"] == "fused"
    assert facts["cores"]["count"] == os.cpu_count()
    assert 0 < facts["memory"]["available"] <= facts["memory"]["total"]
    assert facts["disk"]["free"] > 0
    for word in ("devices", "attention", "kernels", "scorer", "cores", "memory", "disk"):
        assert f"\n{word}" in text

    import torch

    if not torch.cuda.is_available():
        assert recr1["attention"]["auto"].startswith("sdpa (auto: varlen needs a GPU")
        assert recr1["compute"] == "float32"
        assert "needs a GPU" in recr1["triton"]
        assert facts["torch"]["gpus"] == []
        assert "joined by gloo" in text


class Clash(NamedTuple):
    """What is staged, and what the doctor must find."""

    what: str  # words of the finding
    do: str  # words of what to do about it
    packages: list[Package] = []
    files: list[str] = []  # empty files in the folder that the doctor stands in
    env: dict[str, str] = {}
    is_broken: bool = True


KERNELS = Package("kernels", "0.18.2", files={"kernels/__init__.py": ""})
TORCH = Package("torch", "2.13.0", requires=["triton==3.6.0; sys_platform != 'nowhere'"])
NUMBA = Package("numba", "0.68.1", requires=["numpy<2.6,>=1.22"])
STAGED = {
    "both faiss": Clash(
        "faiss-cpu and faiss-gpu are installed together",
        "pip uninstall -y faiss-cpu faiss-gpu",
        [Package("faiss-gpu", "1.15.1"), Package("faiss-cpu", "1.15.1")],
    ),
    "faiss of two makers": Clash(
        "faiss-cpu and faiss-gpu-cu12",
        "pip uninstall -y",
        [Package("faiss-gpu-cu12", "1.14.1"), Package("faiss-cpu", "1.15.1")],
    ),
    "numpy too new for numba": Clash(
        "numba 0.68.1 needs numpy<2.6,>=1.22, 9.0.0 is installed",
        "pip install 'numpy<2.6",
        [Package("numpy", "9.0.0"), NUMBA],
    ),
    "numpy too new for the interpreter": Clash(
        "triton 3.6.0 in its interpreter",
        "numpy<2.4",
        [Package("triton", "3.6.0"), Package("numpy", "2.4.0")],
        is_broken=False,
    ),
    "torch with another triton": Clash(
        "torch 2.13.0 needs triton==3.6.0, 3.7.1 is installed",
        "pip install 'triton==3.6.0'",
        [TORCH, Package("triton", "3.7.1")],
    ),
    "torch out of range": Clash(
        "needs torch<2.16,>=2.11, 2.9.1 is installed",
        "pip install 'torch<2.16",
        [Package("torch", "2.9.1")],
    ),
    "transformers out of range": Clash(
        "needs transformers<6,>=5.12, 4.57.1 is installed",
        "pip install 'transformers<6",
        [Package("transformers", "4.57.1")],
    ),
    "tokenizers out of range": Clash(
        "needs tokenizers",
        "pip install 'tokenizers",
        [Package("tokenizers", "0.22.0")],
    ),
    "a package is missing": Clash(
        "absent-package is not installed; recr1 needs it",
        "pip install 'absent-package>=3'",
        [Package("recr1", "0.1.0", requires=["absent-package>=3"])],
    ),
    "kernels shadowed": Clash(
        "shadows Hugging Face's package kernels",
        "rename that one",
        [KERNELS],
        files=["kernels/__init__.py"],
    ),
    "kernels, a stray one": Clash(
        "a top-level package named as Hugging Face's kernels",
        "rename it",
        files=["kernels/__init__.py"],
        is_broken=False,
    ),
    "kernels, a stray file": Clash(
        "kernels.py is a top-level package",
        "rename it",
        files=["kernels.py"],
        is_broken=False,
    ),
    "flash-attn without a GPU": Clash(
        "flash-attn 2.8.3 is installed, but torch sees no GPU",
        "model.attention at auto",
        [Package("flash-attn", "2.8.3")],
        is_broken=False,
    ),
    "tokenizers after a fork": Clash(
        "TOKENIZERS_PARALLELISM is on",
        "unset",
        env={"TOKENIZERS_PARALLELISM": "true"},
        is_broken=False,
    ),
}


@pytest.mark.parametrize("name", STAGED)
def test_a_staged_clash_is_found(name, clean, clean_probes, tmp_path):
    clash = STAGED[name]
    probes = dict(clean_probes)
    if name == "flash-attn without a GPU":
        probes["torch"] = probes["torch"] | dict(gpus=[])
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    for path in clash.files:
        write_file(cwd / path, "")
    stage = install_packages(tmp_path / "stage", clash.packages)

    code, report, text = run_doctor(cwd, stage, write_probes(probes), **clash.env)

    finding = find_finding(report, clash.what)
    label = "BROKEN " if clash.is_broken else "warning"
    assert finding["broken"] == clash.is_broken
    assert clash.do in finding["do"]
    assert f"{label} {finding['what']}" in text
    assert f"do: {finding['do']}" in text
    assert code == bool(list_broken(report))
    assert code >= clash.is_broken

    if name == "a package is missing" or "tokenizers" in clash.what:
        return
    _, clean_report, _ = clean
    for other in report["findings"]:
        # this machine's own, as fewer cores than it has
        is_of_the_machine = other in clean_report["findings"]
        if not is_of_the_machine and clash.what not in other["what"]:
            assert other["broken"] < clash.is_broken, "another finding of its weight"


def test_the_checkout_s_own_kernels_folder_shadows_nothing(quick, tmp_path):
    (tmp_path / "kernels").mkdir()
    empty_stage = install_packages(tmp_path / "empty", [])
    stage = install_packages(tmp_path / "stage", [KERNELS])

    for folder in (empty_stage, stage):
        code, report, _ = run_doctor(tmp_path, folder, quick)
        assert code == 0
        for finding in report["findings"]:
            assert "kernels" not in finding["what"]


CRASH = "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)"
REFUSE_NUMPY = "raise ImportError('Triton needs NumPy 2.0 or less.')"
THAT_DO_NOT_IMPORT = [
    Package("numba", "0.60.0", files={"numba/__init__.py": CRASH}),
    Package("triton", "3.7.1", files={"triton/__init__.py": REFUSE_NUMPY}),
    Package("kernels", "0.18.2", files={"kernels/__init__.py": "__version__ = '0.18.2'"}),
]


def test_packages_that_do_not_import(tmp_path):
    """One whole run: faiss' leftovers, a numba that dies without a word, a triton that refuses its
    numpy, and Hugging Face's kernels behind a stray one.
    """
    stage = install_packages(tmp_path / "stage", THAT_DO_NOT_IMPORT)
    write_file(stage / "faiss/__init__.py", "")
    cwd = tmp_path / "cwd"
    write_file(cwd / "kernels/__init__.py", "x = 1")

    code, report, text = run_doctor(cwd, stage)

    assert code == 1
    assert not report["ok"]
    assert "Traceback" not in text
    broken = list_broken(report)
    for words in (
        "numba cannot be imported (died with exit code -11): retriever.scorer=numba",
        "triton cannot be imported (ImportError: Triton needs NumPy 2.0 or less",
        "faiss",
        "shadows Hugging Face's package kernels",
        "transformers cannot be imported (ImportError: cannot import name",
    ):
        assert any(words in what for what in broken), (words, broken)


def test_without_a_working_torch(tmp_path):
    """The doctor itself needs only Python: `recr1` would not start."""
    stage = tmp_path / "stage"
    fail = "raise OSError('libcudart.so.13: cannot open shared object file')"
    write_file(stage / "torch/__init__.py", fail)

    code, report, _ = run_doctor(tmp_path, stage)

    finding = find_finding(report, "libcudart")
    assert code == 1
    assert finding["what"].startswith("torch cannot be imported")
    assert "--force-reinstall torch" in finding["do"]


def test_fewer_cores_than_the_machine_has(quick, tmp_path):
    cores = os.sched_getaffinity(0)
    if len(cores) < 2:
        pytest.skip("this process may use one core only")
    take_one_core = f"import os\nos.sched_setaffinity(0, {{{min(cores)}}})"

    _, report, _ = run_doctor(tmp_path, None, f"{take_one_core}\n{quick}")

    finding = find_finding(report, "cores")
    assert "this process may use 1" in finding["what"]
    assert finding["do"].startswith("run.threads=1")


FILL_DISK = """import shutil
shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10**12, 10**12, 10**8)
"""


def test_the_run_folder_s_disk(quick, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    code, report, _ = run_doctor(tmp_path, None, quick, f"{file}/run")
    assert code == 1
    assert list_broken(report) == [
        f"{file}/run: a run could not write there: {file} is no folder",
    ]

    new_folder = f"{tmp_path}/new/deep/run"
    code, report, _ = run_doctor(tmp_path, None, quick, new_folder)
    assert code == 0
    assert report["facts"]["disk"]["folder"] == new_folder

    _, report, _ = run_doctor(tmp_path, None, FILL_DISK + quick)
    words = "0.1 GiB are free; a checkpoint takes 16 bytes a weight"
    assert any(words in finding["what"] for finding in report["findings"])


A100 = dict(name="G", capability=[8, 0], free=10**9, total=10**9)
# what torch tells on a machine with one
TORCH_FACTS = dict(
    cuda="13.0",
    hip=None,
    gpus=[A100],
    arch=["sm_80", "sm_90"],
    threads=1,
    onednn=True,
    cpu="AVX2",
    nccl=True,
    gloo=True,
)
T4 = A100 | dict(capability=[7, 5])
L4 = A100 | dict(capability=[8, 9])
B200 = A100 | dict(capability=[10, 0])
# what else torch tells; variables; whether the finding is broken, and words of it (None: there is
# none)
ON_A_GPU = {
    "as it should be": ({}, {}, None, None),
    "too old for bfloat16": (
        dict(gpus=[T4], arch=["sm_75"]),
        {},
        False,
        "compute capability 7.5: no bfloat16",
    ),
    "too new for this torch": (
        dict(gpus=[B200]),
        {},
        True,
        "compute capability 10.0; this torch holds code for sm_80, sm_90",
    ),
    "a later minor of a known major": (dict(gpus=[L4]), {}, None, None),
    "the interpreter left on": ({}, dict(TRITON_INTERPRET="1"), True, "TRITON_INTERPRET=1 makes"),
    "no NCCL for two": (dict(gpus=[A100, A100], nccl=False), {}, True, "no NCCL"),
}


@pytest.mark.parametrize("name", ON_A_GPU)
def test_on_a_gpu(name, monkeypatch):
    change, env, is_broken, words = ON_A_GPU[name]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    facts = dict(torch=TORCH_FACTS | change, versions={"torch": "2.13.0"})

    findings = list(doctor.check_devices(facts))

    if words is None:
        assert findings == []
        return
    [finding] = findings
    assert finding.broken == is_broken
    assert words in finding.what


def test_a_gpu_that_torch_does_not_see(monkeypatch):
    def is_gpu(path):
        return str(path) == "/dev/nvidia0"

    monkeypatch.setattr(doctor.Path, "exists", is_gpu)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    no_gpu = TORCH_FACTS | dict(gpus=[])
    versions = {"torch": "2.13.0"}

    [finding] = doctor.check_devices(dict(torch=no_gpu | dict(cuda=None), versions=versions))
    assert finding.broken
    assert "a build without CUDA" in finding.what

    [finding] = doctor.check_devices(dict(torch=no_gpu, versions=versions))
    assert finding.broken
    assert "built for CUDA 13.0, the driver may be too old" in finding.what

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    findings = list(doctor.check_devices(dict(torch=no_gpu, versions={})))
    assert not findings


def test_by_the_command(clean_probes, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "probe_packages", lambda: clean_probes)

    with pytest.raises(SystemExit) as exit:
        run_guarded(cli.main, ["doctor", "--run", str(tmp_path), "--json"])

    out = capsys.readouterr().out
    report = json.loads(out.splitlines()[-1])
    assert exit.value.code == 0
    assert report["facts"]["disk"]["folder"] == str(tmp_path)
