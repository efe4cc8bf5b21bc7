"""recr1.kernels is found from a checkout, a wheel, an sdist and an editable install; our kernels/
does not hide Hugging Face's `kernels`.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


WHERE = "import recr1.kernels.logprob as module; print(module.__file__)"
KERNEL = ROOT / "kernels/logprob.py"
ESCI = ROOT / "experiments/data/esci_small"
EVAL_QUERIES = [
    "eval-queries",
    "--json",
    "--corpus",
    ESCI / "corpus.jsonl.gz",
    "--queries",
    ESCI / "test.queries.jsonl",
    "--qrels",
    ESCI / "test.qrels.tsv",
]


def run_command(command: list, cwd: Path, env: dict | None = None) -> str:
    """Run a command that must succeed; give its standard output."""
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def copy_environment() -> dict[str, str]:
    """Copy this process's environment, without PYTHONPATH."""
    env = dict(os.environ)
    env.pop("PYTHONPATH", None)
    return env


def run_python(code: str, cwd: Path, path: Path | None = None, executable=sys.executable) -> str:
    """Give the standard output of `python -c code` started in cwd, with `path` alone on
    PYTHONPATH.
    """
    env = copy_environment()
    if path:
        env["PYTHONPATH"] = str(path)
    return run_command([executable, "-c", code], cwd, env)


def locate_kernel(cwd: Path, path: Path | None = None, executable=sys.executable) -> Path:
    """Give the file that `import recr1.kernels.logprob` reads in cwd."""
    return Path(run_python(WHERE, cwd, path, executable))


def test_checkout_from_its_root():
    assert locate_kernel(ROOT) == KERNEL


def test_checkout_from_elsewhere(tmp_path):
    assert locate_kernel(tmp_path, ROOT) == KERNEL


def run_pip(*argv) -> None:
    """Run pip without the network."""
    env = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INDEX": "1"}
    run_command([sys.executable, "-m", "pip", *argv], Path.cwd(), env)


def make_wheel(source: Path, out: Path) -> Path:
    """Make the wheel of a source folder or an sdist, without network access."""
    run_pip("wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", out, source)
    [path] = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")  # a build leaves build/ and egg-info where it runs
    for name in ("recr1", "kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    return make_wheel(source, out)


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})"
    run_python(code, source)
    [path] = out.glob("*.tar.gz")
    return path


def install(packages: list, env: Path) -> Path:
    """Make an environment that sees this one's packages but not its recr1, with `packages`
    installed by pip; give its bin folder.
    """
    venv.create(env)
    # a folder named in a .pth file is searched, but its own .pth files, such as an editable
    # recr1's, are not read
    borrowed = ""
    for folder in sys.path:
        if Path(folder).name in ("site-packages", "dist-packages"):
            borrowed += f"{folder}\n"
    [site] = env.glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(borrowed)

    options = ["--quiet", "--no-deps", "--no-build-isolation", "--ignore-installed"]
    run_pip("--python", env / "bin/python", "install", *options, *packages)
    return env / "bin"


def list_sources(folder: str) -> set[str]:
    """List the Python files of a folder of the checkout, by their paths in it."""
    return {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.py")}


def test_wheel_holds_every_source(wheel):
    names = zipfile.ZipFile(wheel).namelist()

    expected = list_sources("recr1")
    for path in list_sources("kernels"):
        expected.add(f"recr1/{path}")
    sources = {name for name in names if name.endswith(".py")}
    assert sources == expected
    assert any(name.endswith("LICENSE") for name in names)


def test_wheel_from_elsewhere(wheel, tmp_path):
    site = tmp_path / "site"
    cwd = tmp_path / "cwd"
    zipfile.ZipFile(wheel).extractall(site)
    cwd.mkdir()
    assert locate_kernel(cwd, site) == site / "recr1/kernels/logprob.py"


def test_sdist_makes_the_same_wheel(sdist, wheel, tmp_path):
    names = set()
    for path in tarfile.open(sdist).getnames():
        _, _, name = path.partition("/")
        names.add(name)
    assert names >= list_sources("recr1")
    assert names >= list_sources("kernels")
    assert names >= {"setup.py", "README.md", "LICENSE"}

    wheel_of_sdist = make_wheel(sdist, tmp_path)
    ours = zipfile.ZipFile(wheel)
    theirs = zipfile.ZipFile(wheel_of_sdist)
    assert sorted(ours.namelist()) == sorted(theirs.namelist())
    for name in ours.namelist():
        if not name.endswith("/RECORD"):
            assert ours.read(name) == theirs.read(name), name


def test_installed_wheel_runs_from_elsewhere(wheel, tmp_path):
    """The light form of experiments/benchmarks/wheel.sh, without the download: console script,
    kernels, and the bundled data's figures.
    """
    bin = install([wheel], tmp_path / "env")
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    env = copy_environment()

    kernel = locate_kernel(cwd, executable=bin / "python")
    assert kernel.is_relative_to(tmp_path / "env")
    # from its root the checkout wins, whole
    kernel = locate_kernel(ROOT, executable=bin / "python")
    assert kernel.is_relative_to(ROOT)

    help_text = run_command([bin / "recr1", "--help"], cwd, env)
    assert "eval-queries" in help_text

    output = run_command([bin / "recr1", *EVAL_QUERIES], cwd, env)
    last_line = output.splitlines()[-1]
    metrics = json.loads(last_line)["metrics"]
    assert metrics["ndcg@100"] == pytest.approx(0.788, abs=0.005)
    assert not list(cwd.iterdir())


def test_editable_install(source, tmp_path):
    bin = install(["--editable", source], tmp_path / "env")

    for cwd in (source, tmp_path):
        kernel = locate_kernel(cwd, executable=bin / "python")
        assert kernel == source / "kernels/logprob.py"
    help_text = run_command([bin / "recr1", "--help"], tmp_path)
    assert "eval-queries" in help_text


BUILD_A_MODEL = (
    "from transformers import AutoModelForCausalLM, Qwen2Config\n"
    "config = Qwen2Config(vocab_size=32, hidden_size=16, intermediate_size=16, "
    "num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)\n"
    "print(type(AutoModelForCausalLM.from_config(config)).__name__)"
)


def test_kernels_folder_does_not_hide_hugging_faces():
    assert not (ROOT / "kernels/__init__.py").exists(), (
        "it would make kernels/ win over an installed Hugging Face `kernels`"
    )
    assert run_python(BUILD_A_MODEL, ROOT) == "Qwen2ForCausalLM"


def write_noting_python(folder: Path, notes: Path) -> None:
    """Write a python whose pip only notes what it is asked for."""
    python = folder / "bin/python"
    python.parent.mkdir()
    python.write_text(
        f'#!/bin/sh\nif [ "$2" = pip ]; then echo "$@" >>"{notes}"; '
        f'else exec "{sys.executable}" "$@"; fi\n'
    )
    python.chmod(0o755)


# What `set_up` is called with, in one shell, and the installations after it, of all shells.
SET_UPS = (
    (["docs", "docs"], 1),
    (["", ""], 1),
    (["dev", "dev", "docs", "fast"], 2),
    (["", ""], 2),
)


def test_set_up_installs_once_for_what_is_asked(tmp_path):
    """experiments/setup_env.sh with a pip that only notes what it is asked for."""
    notes = tmp_path / "asked"
    write_noting_python(tmp_path, notes)
    env = os.environ | {"VIRTUAL_ENV": str(tmp_path)}
    for extras, times in SET_UPS:
        script = f'source "{ROOT}/experiments/setup_env.sh"; '
        for extra in extras:
            script += f"set_up {extra}; "
        run_command(["bash", "-euc", script], Path.cwd(), env)

        lines = notes.read_text().splitlines()
        installs = [line for line in lines if " install " in line]
        assert len(installs) == times, installs

    assert installs[0].endswith(f"-e {ROOT}[docs]")
    assert installs[1].endswith(f"-e {ROOT}[dev]")
