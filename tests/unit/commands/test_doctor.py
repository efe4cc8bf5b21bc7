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

import pytest

from recr1 import cli, doctor
from recr1.training.launch import run_guarded

ROOT = Path(__file__).resolve().parents[3]


def packages(folder: Path, found: dict) -> Path:
    """{"name version": (requirements, {file: text})} as installed packages in a folder."""
    for key, (requires, files) in found.items():
        name, version = key.split()
        info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(
            "\n".join(
                [
                    "Metadata-Version: 2.1",
                    f"Name: {name}",
                    f"Version: {version}",
                    *(f"Requires-Dist: {r}" for r in requires),
                ]
            )
            + "\n"
        )
        (info / "RECORD").write_text(
            "".join(f"{path},,\n" for path in (*files, f"{info.name}/METADATA"))
        )
        for path, text in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text)
    return folder


def run(
    cwd: Path, stage: Path | None = None, code: str = "", *arguments: str, **env
) -> tuple[int, dict, str]:
    """(exit code, the JSON object, the text) of the doctor in a folder, with `stage` before all
    other packages.
    """
    path = os.pathsep.join(map(str, [*([stage] if stage else []), ROOT]))
    kept = {
        k: v
        for k, v in os.environ.items()
        if k not in ("TOKENIZERS_PARALLELISM", "TRITON_INTERPRET")
    }
    command = (
        [
            "-c",
            f"import sys\nfrom recr1 import doctor\n{code}\n"
            "sys.exit(doctor.main(sys.argv[1] if sys.argv[1:] else 'runs/run', True))",
        ]
        if code
        else ["-m", "recr1.doctor", "--json", *(["--run"] if arguments else [])]
    )
    done = subprocess.run(
        [sys.executable, *command, *arguments],
        cwd=cwd,
        env=kept | dict(PYTHONPATH=path) | env,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode in (0, 1) and not done.stderr, done.stderr
    *text, last = done.stdout.splitlines()
    return done.returncode, json.loads(last), "\n".join(text)


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> tuple[int, dict, str]:
    return run(tmp_path_factory.mktemp("clean"))


@pytest.fixture(scope="module")
def quick(clean) -> str:
    """Code that lets a clean run's imports stand in."""
    probes = {name: clean[1]["facts"][name] for name in doctor.PROBES}
    return f"import json\ndoctor.probe_packages = lambda: json.loads({json.dumps(probes)!r})"


def test_nothing_is_wrong_here(clean):
    code, found, text = clean
    assert code == 0 and found["ok"] and not any(f["broken"] for f in found["findings"]), found[
        "findings"
    ]
    facts = found["facts"]
    assert {"torch", "transformers", "numpy"} <= facts["versions"].keys()
    assert not any("error" in facts[name] for name in ("torch", "transformers", "recr1"))
    import torch

    if not torch.cuda.is_available():
        assert facts["recr1"]["attention"]["auto"].startswith("sdpa (auto: varlen needs a GPU")
        assert facts["recr1"]["compute"] == "float32"
        assert "needs a GPU" in facts["recr1"]["triton"]
        assert facts["torch"]["gpus"] == []
        assert "joined by gloo" in text
    assert facts["recr1"]["scorers"].keys() == {"torch", "numba"}
    assert facts["recr1"]["scorer"] == "torch"
    assert facts["recr1"]["head"] == "fused"
    assert facts["cores"]["count"] == os.cpu_count()
    assert 0 < facts["memory"]["available"] <= facts["memory"]["total"]
    assert facts["disk"]["free"] > 0
    for word in ("devices", "attention", "kernels", "scorer", "cores", "memory", "disk"):
        assert f"\n{word}" in text


# name: packages on the stage, files in the folder one stands in, environment; then: broken, words
# of the finding, words of what to do
TORCH = {
    "torch 2.13.0": (["triton==3.6.0; sys_platform != 'nowhere'"], {}),
    "triton 3.7.1": ([], {}),
}
STAGED = {
    "both faiss": (
        {"faiss-gpu 1.15.1": ([], {}), "faiss-cpu 1.15.1": ([], {})},
        {},
        {},
        True,
        "faiss-cpu and faiss-gpu are installed together",
        "pip uninstall -y faiss-cpu faiss-gpu",
    ),
    "faiss of two makers": (
        {"faiss-gpu-cu12 1.14.1": ([], {}), "faiss-cpu 1.15.1": ([], {})},
        {},
        {},
        True,
        "faiss-cpu and faiss-gpu-cu12",
        "pip uninstall -y",
    ),
    "numpy too new for numba": (
        {"numpy 9.0.0": ([], {}), "numba 0.68.1": (["numpy<2.6,>=1.22"], {})},
        {},
        {},
        True,
        "numba 0.68.1 needs numpy<2.6,>=1.22, 9.0.0 is installed",
        "pip install 'numpy<2.6",
    ),
    "numpy too new for the interpreter": (
        {"triton 3.6.0": ([], {}), "numpy 2.4.0": ([], {})},
        {},
        {},
        False,
        "triton 3.6.0 in its interpreter",
        "numpy<2.4",
    ),
    "torch with another triton": (
        TORCH,
        {},
        {},
        True,
        "torch 2.13.0 needs triton==3.6.0, 3.7.1 is installed",
        "pip install 'triton==3.6.0'",
    ),
    "torch out of range": (
        {"torch 2.9.1": ([], {})},
        {},
        {},
        True,
        "needs torch<2.16,>=2.11, 2.9.1 is installed",
        "pip install 'torch<2.16",
    ),
    "transformers out of range": (
        {"transformers 4.57.1": ([], {})},
        {},
        {},
        True,
        "needs transformers<6,>=5.12, 4.57.1 is installed",
        "pip install 'transformers<6",
    ),
    "tokenizers out of range": (
        {"tokenizers 0.22.0": ([], {})},
        {},
        {},
        True,
        "needs tokenizers",
        "pip install 'tokenizers",
    ),
    "a package is missing": (
        {"recr1 0.1.0": (["absent-package>=3"], {})},
        {},
        {},
        True,
        "absent-package is not installed; recr1 needs it",
        "pip install 'absent-package>=3'",
    ),
    "kernels shadowed": (
        {"kernels 0.18.2": ([], {"kernels/__init__.py": ""})},
        {"kernels/__init__.py": ""},
        {},
        True,
        "shadows Hugging Face's package kernels",
        "rename that one",
    ),
    "kernels, a stray one": (
        {},
        {"kernels/__init__.py": ""},
        {},
        False,
        "a top-level package named as Hugging Face's kernels",
        "rename it",
    ),
    "kernels, a stray file": (
        {},
        {"kernels.py": ""},
        {},
        False,
        "kernels.py is a top-level package",
        "rename it",
    ),
    "flash-attn without a GPU": (
        {"flash-attn 2.8.3": ([], {})},
        {},
        {},
        False,
        "flash-attn 2.8.3 is installed, but torch sees no GPU",
        "model.attention at auto",
    ),
    "tokenizers after a fork": (
        {},
        {},
        dict(TOKENIZERS_PARALLELISM="true"),
        False,
        "TOKENIZERS_PARALLELISM is on",
        "unset",
    ),
}


@pytest.mark.parametrize("name", STAGED)
def test_a_staged_clash_is_found(name, clean, quick, tmp_path):
    stage, files, env, broken, what, do = STAGED[name]
    if name.startswith("flash-attn"):
        quick += (
            "\nclean = doctor.probe_packages()\nclean['torch']['gpus'] = []"
            "\ndoctor.probe_packages = lambda: clean"
        )
    (tmp_path / "here").mkdir()
    for path, text in files.items():
        (tmp_path / "here" / path).parent.mkdir(exist_ok=True)
        (tmp_path / "here" / path).write_text(text)
    code, found, text = run(tmp_path / "here", packages(tmp_path / "stage", stage), quick, **env)
    [finding] = [f for f in found["findings"] if what in f["what"]]
    assert finding["broken"] == broken
    assert do in finding["do"]
    assert f"{'BROKEN ' if broken else 'warning'} {finding['what']}" in text
    assert f"do: {finding['do']}" in text
    assert code == (1 if any(f["broken"] for f in found["findings"]) else 0)
    assert code >= broken
    # this machine's own, as fewer cores than it has
    more = [f for f in found["findings"] if f not in clean[1]["findings"]]
    assert name == "a package is missing" or all(
        what in f["what"] or f["broken"] < broken or "tokenizers" in what for f in more
    ), "and nothing else of its weight"


def test_the_checkout_s_own_kernels_folder_shadows_nothing(quick, tmp_path):
    (tmp_path / "kernels").mkdir()
    for stage in ({}, {"kernels 0.18.2": ([], {"kernels/__init__.py": ""})}):
        code, found, _ = run(tmp_path, packages(tmp_path / f"stage{len(stage)}", stage), quick)
        assert code == 0
        assert not any("kernels" in f["what"] for f in found["findings"])


def test_packages_that_do_not_import(tmp_path):
    """One whole run: faiss' leftovers, a numba that dies without a word, a triton that refuses its
    numpy, and Hugging Face's kernels behind a stray one.
    """
    stage = packages(
        tmp_path / "stage",
        {
            "numba 0.60.0": (
                [],
                {"numba/__init__.py": "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)"},
            ),
            "triton 3.7.1": (
                [],
                {"triton/__init__.py": "raise ImportError('Triton needs NumPy 2.0 or less.')"},
            ),
            "kernels 0.18.2": ([], {"kernels/__init__.py": "__version__ = '0.18.2'"}),
        },
    )
    (stage / "faiss").mkdir()
    (stage / "faiss/__init__.py").write_text("")
    (tmp_path / "here/kernels").mkdir(parents=True)
    (tmp_path / "here/kernels/__init__.py").write_text("x = 1")
    code, found, text = run(tmp_path / "here", stage)
    broken = [f["what"] for f in found["findings"] if f["broken"]]
    assert code == 1
    assert not found["ok"]
    assert "Traceback" not in text
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
    (stage / "torch").mkdir(parents=True)
    (stage / "torch/__init__.py").write_text(
        "raise OSError('libcudart.so.13: cannot open shared object file')"
    )
    code, found, text = run(tmp_path, stage)
    [finding] = [f for f in found["findings"] if "libcudart" in f["what"]]
    assert code == 1
    assert finding["what"].startswith("torch cannot be imported")
    assert "--force-reinstall torch" in finding["do"]


def test_fewer_cores_than_the_machine_has(quick, tmp_path):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("this process may use one core only")
    core = min(os.sched_getaffinity(0))
    _, found, _ = run(tmp_path, None, f"import os\nos.sched_setaffinity(0, {{{core}}})\n{quick}")
    [finding] = [f for f in found["findings"] if "cores" in f["what"]]
    assert "this process may use 1" in finding["what"]
    assert finding["do"].startswith("run.threads=1")


def test_the_run_folder_s_disk(quick, tmp_path):
    (tmp_path / "file").write_text("")
    code, found, _ = run(tmp_path, None, quick, str(tmp_path / "file/run"))
    assert code == 1
    assert [f["what"] for f in found["findings"] if f["broken"]] == [
        f"{tmp_path}/file/run: a run could not write there: {tmp_path}/file is no folder"
    ]
    code, found, _ = run(tmp_path, None, quick, str(tmp_path / "new/deep/run"))
    assert code == 0
    assert found["facts"]["disk"]["folder"] == f"{tmp_path}/new/deep/run"
    _, found, _ = run(
        tmp_path,
        None,
        "import shutil\n"
        "shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10**12, 10**12, 10**8)\n"
        f"{quick}",
    )
    assert any(
        "0.1 GiB are free; a checkpoint takes 16 bytes a weight" in f["what"]
        for f in found["findings"]
    )


GPU = dict(
    cuda="13.0",
    hip=None,
    gpus=[dict(name="G", capability=[8, 0], free=10**9, total=10**9)],
    arch=["sm_80", "sm_90"],
    threads=1,
    onednn=True,
    cpu="AVX2",
    nccl=True,
    gloo=True,
)
ON_A_GPU = {
    "as it should be": ({}, {}, None),
    "too old for bfloat16": (
        dict(gpus=[GPU["gpus"][0] | dict(capability=[7, 5])], arch=["sm_75"]),
        {},
        (False, "compute capability 7.5: no bfloat16"),
    ),
    "too new for this torch": (
        dict(gpus=[GPU["gpus"][0] | dict(capability=[10, 0])]),
        {},
        (True, "compute capability 10.0; this torch holds code for sm_80, sm_90"),
    ),
    "a later minor of a known major": (
        dict(gpus=[GPU["gpus"][0] | dict(capability=[8, 9])]),
        {},
        None,
    ),
    "the interpreter left on": ({}, dict(TRITON_INTERPRET="1"), (True, "TRITON_INTERPRET=1 makes")),
    "no NCCL for two": (dict(gpus=GPU["gpus"] * 2, nccl=False), {}, (True, "no NCCL")),
}


@pytest.mark.parametrize("name", ON_A_GPU)
def test_on_a_gpu(name, monkeypatch):
    change, env, want = ON_A_GPU[name]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    found = list(doctor.check_devices(dict(torch=GPU | change, versions={"torch": "2.13.0"})))
    assert [f.broken for f in found] == ([want[0]] if want else [])
    assert not want or want[1] in found[0].what


def test_a_gpu_that_torch_does_not_see(monkeypatch):
    monkeypatch.setattr(doctor.Path, "exists", lambda path: str(path) == "/dev/nvidia0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for cuda, words in (
        (None, "a build without CUDA"),
        ("13.0", "built for CUDA 13.0, the driver may be too old"),
    ):
        [finding] = doctor.check_devices(
            dict(torch=GPU | dict(gpus=[], cuda=cuda), versions={"torch": "2.13.0"})
        )
        assert finding.broken
        assert words in finding.what
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not list(doctor.check_devices(dict(torch=GPU | dict(gpus=[]), versions={})))


def test_by_the_command(clean, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(
        doctor, "probe_packages", lambda: {name: clean[1]["facts"][name] for name in doctor.PROBES}
    )
    with pytest.raises(SystemExit) as exit:
        run_guarded(cli.main, ["doctor", "--run", str(tmp_path), "--json"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert exit.value.code == 0
    assert found["facts"]["disk"]["folder"] == str(tmp_path)
