"""recr1.kernels is found from a checkout, from a wheel, from any folder; and our kernels/ does not hide Hugging Face's `kernels`."""
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def python(code: str, cwd: Path, path: Path | None = None, executable=sys.executable) -> str:
    """Standard output of `python -c code` started in cwd, with `path` alone on PYTHONPATH."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | ({"PYTHONPATH": str(path)} if path else {})
    done = subprocess.run([executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


WHERE = "import recr1.kernels.logprob as module; print(module.__file__)"


def test_checkout_from_its_root():
    assert Path(python(WHERE, ROOT)) == ROOT / "kernels/logprob.py"


def test_checkout_from_elsewhere(tmp_path):
    assert Path(python(WHERE, tmp_path, ROOT)) == ROOT / "kernels/logprob.py"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of what is packaged: a build leaves build/ and egg-info where it runs."""
    source = tmp_path_factory.mktemp("source")
    for folder in ("recr1", "kernels"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    return source


def pip(*arguments, cwd: Path, executable=sys.executable) -> None:
    done = subprocess.run([executable, "-m", "pip", arguments[0], "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps",
                           "--no-build-isolation", *map(str, arguments[1:])], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--wheel-dir", out, source, cwd=out)
    [path] = out.glob("*.whl")
    return path


def test_sdist_makes_the_same_wheel(source, wheel, tmp_path):
    done = subprocess.run([sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", tmp_path], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [archive] = tmp_path.glob("*.tar.gz")
    pip("wheel", "--wheel-dir", tmp_path, archive, cwd=tmp_path)
    [again] = tmp_path.glob("*.whl")
    assert sorted(zipfile.ZipFile(again).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())


def test_an_environment_with_the_wheel_runs_the_command_and_the_kernels_from_anywhere(wheel, tmp_path):
    """The environment sees this one's libraries, not this checkout: the wheel is all it has of recr1."""
    venv.create(tmp_path / "env", with_pip=True)
    ours = tmp_path / "env/bin/python"
    site = Path(python("import sysconfig; print(sysconfig.get_path('purelib'))", tmp_path, executable=ours))
    libraries = sysconfig.get_path("purelib")
    # a path file, so that its packages come after ours and its own path files (an editable recr1) are not read
    (site / "libraries.pth").write_text(libraries + "\n")
    pip("install", wheel, cwd=tmp_path, executable=ours)
    assert Path(python(WHERE, tmp_path, executable=ours)) == site / "recr1/kernels/logprob.py"
    data = ROOT / "experiments/data/esci_small"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([tmp_path / "env/bin/recr1", "eval-queries", "--corpus", data / "corpus.jsonl.gz", "--queries", data / "test.queries.jsonl", "--qrels",
                           data / "test.qrels.tsv", "--json"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout.splitlines()[-1])["n"] == 150, done.stderr


def test_wheel_holds_every_source(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {str(p.relative_to(ROOT)) for p in (ROOT / "recr1").rglob("*.py")}
    expected |= {f"recr1/{p.relative_to(ROOT)}" for p in (ROOT / "kernels").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == expected
    assert any(name.endswith("LICENSE") for name in names)


def test_wheel_from_elsewhere(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "cwd").mkdir()
    assert Path(python(WHERE, tmp_path / "cwd", tmp_path / "site")) == tmp_path / "site/recr1/kernels/logprob.py"


def test_kernels_folder_does_not_hide_hugging_faces():
    assert not (ROOT / "kernels/__init__.py").exists(), "it would make kernels/ win over an installed Hugging Face `kernels`"
    code = ("from transformers import AutoModelForCausalLM, Qwen2Config\n"
            "config = Qwen2Config(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)\n"
            "print(type(AutoModelForCausalLM.from_config(config)).__name__)")
    assert python(code, ROOT) == "Qwen2ForCausalLM"
