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


def python(code: str, cwd: Path, path: Path | None = None, executable=sys.executable) -> str:
    """Standard output of `python -c code` started in cwd, with `path` alone on PYTHONPATH."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | (
        {"PYTHONPATH": str(path)} if path else {}
    )
    done = subprocess.run(
        [executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


WHERE = "import recr1.kernels.logprob as module; print(module.__file__)"


def test_checkout_from_its_root():
    assert Path(python(WHERE, ROOT)) == ROOT / "kernels/logprob.py"


def test_checkout_from_elsewhere(tmp_path):
    assert Path(python(WHERE, tmp_path, ROOT)) == ROOT / "kernels/logprob.py"


def pip(*argv) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", *map(str, argv)],
        capture_output=True,
        text=True,
        env=os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INDEX": "1"},
    )
    assert done.returncode == 0, done.stderr


def make_wheel(source: Path, out: Path) -> Path:
    """The wheel of a source folder or an sdist, made without network access."""
    pip("wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", out, source)
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
    return make_wheel(source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    python(f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})", source)
    [path] = out.glob("*.tar.gz")
    return path


def install(what: list, env: Path) -> Path:
    """A new environment that sees this one's packages but not its recr1, with `what` installed by
    pip; returns its bin folder.
    """
    venv.create(env)
    [site] = env.glob("lib/python*/site-packages")
    # a folder named in a .pth file is searched, but its own .pth files, such as an editable
    # recr1's, are not read
    (site / "borrowed.pth").write_text(
        "".join(f"{p}\n" for p in sys.path if Path(p).name in ("site-packages", "dist-packages"))
    )
    pip(
        "--python",
        env / "bin/python",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--ignore-installed",
        *what,
    )
    return env / "bin"


def test_wheel_holds_every_source(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {str(p.relative_to(ROOT)) for p in (ROOT / "recr1").rglob("*.py")}
    expected |= {f"recr1/{p.relative_to(ROOT)}" for p in (ROOT / "kernels").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == expected
    assert any(name.endswith("LICENSE") for name in names)


def test_wheel_from_elsewhere(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "cwd").mkdir()
    assert (
        Path(python(WHERE, tmp_path / "cwd", tmp_path / "site"))
        == tmp_path / "site/recr1/kernels/logprob.py"
    )


def test_sdist_makes_the_same_wheel(sdist, wheel, tmp_path):
    names = {name.partition("/")[2] for name in tarfile.open(sdist).getnames()}
    sources = {
        str(p.relative_to(ROOT)) for top in ("recr1", "kernels") for p in (ROOT / top).rglob("*.py")
    }
    assert names >= sources | {"setup.py", "README.md", "LICENSE"}
    ours, theirs = (zipfile.ZipFile(path) for path in (wheel, make_wheel(sdist, tmp_path)))
    assert sorted(ours.namelist()) == sorted(theirs.namelist())
    assert all(
        ours.read(name) == theirs.read(name)
        for name in ours.namelist()
        if not name.endswith("/RECORD")
    )


def test_installed_wheel_runs_from_elsewhere(wheel, tmp_path):
    """The light form of experiments/benchmarks/wheel.sh, without the download: console script,
    kernels, and the bundled data's figures.
    """
    bin = install([wheel], tmp_path / "env")
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    # from its root the checkout wins, whole
    for interpreter_cwd, where in ((cwd, tmp_path / "env"), (ROOT, ROOT)):
        assert Path(python(WHERE, interpreter_cwd, executable=bin / "python")).is_relative_to(where)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    help = subprocess.run(
        [bin / "recr1", "--help"], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert help.returncode == 0 and "eval-queries" in help.stdout, help.stderr
    esci = ROOT / "experiments/data/esci_small"
    done = subprocess.run(
        [
            bin / "recr1",
            "eval-queries",
            "--json",
            "--corpus",
            esci / "corpus.jsonl.gz",
            "--queries",
            esci / "test.queries.jsonl",
            "--qrels",
            esci / "test.qrels.tsv",
        ],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["metrics"]["ndcg@100"] == pytest.approx(
        0.788, abs=0.005
    )
    assert not list(cwd.iterdir())


def test_editable_install(source, tmp_path):
    bin = install(["--editable", source], tmp_path / "env")
    for cwd in (source, tmp_path):
        assert Path(python(WHERE, cwd, executable=bin / "python")) == source / "kernels/logprob.py"
    assert (
        "eval-queries"
        in subprocess.run(
            [bin / "recr1", "--help"], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout
    )


def test_kernels_folder_does_not_hide_hugging_faces():
    assert not (ROOT / "kernels/__init__.py").exists(), (
        "it would make kernels/ win over an installed Hugging Face `kernels`"
    )
    code = (
        "from transformers import AutoModelForCausalLM, Qwen2Config\n"
        "config = Qwen2Config(vocab_size=32, hidden_size=16, intermediate_size=16, "
        "num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)\n"
        "print(type(AutoModelForCausalLM.from_config(config)).__name__)"
    )
    assert python(code, ROOT) == "Qwen2ForCausalLM"


def test_set_up_installs_once_for_what_is_asked(tmp_path):
    """experiments/setup_env.sh with a pip that only notes what it is asked for."""
    python = tmp_path / "bin/python"
    python.parent.mkdir()
    python.write_text(
        f'#!/bin/sh\nif [ "$2" = pip ]; then echo "$@" >>"{tmp_path}/asked"; '
        f'else exec "{sys.executable}" "$@"; fi\n'
    )
    python.chmod(0o755)
    for extras, times in (("docs docs", 1), (" ", 1), ("dev dev docs fast", 2), (" ", 2)):
        script = f'source "{ROOT}/experiments/setup_env.sh"; ' + "".join(
            f"set_up {extra}; " for extra in extras.split(" ")
        )
        subprocess.run(
            ["bash", "-euc", script],
            env=os.environ | dict(VIRTUAL_ENV=str(tmp_path)),
            check=True,
            capture_output=True,
        )
        asked = [
            line for line in (tmp_path / "asked").read_text().splitlines() if " install " in line
        ]
        assert len(asked) == times, asked
    assert asked[0].endswith(f"-e {ROOT}[docs]")
    assert asked[1].endswith(f"-e {ROOT}[dev]")
