"""recr1.kernels is found from a checkout, from a wheel, from any folder; and our kernels/ does not hide Hugging Face's `kernels`."""
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def python(code: str, cwd: Path, path: Path | None = None) -> str:
    """Standard output of `python -c code` started in cwd, with `path` alone on PYTHONPATH."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | ({"PYTHONPATH": str(path)} if path else {})
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


WHERE = "import recr1.kernels.logprob as module; print(module.__file__)"


def test_checkout_from_its_root():
    assert Path(python(WHERE, ROOT)) == ROOT / "kernels/logprob.py"


def test_checkout_from_elsewhere(tmp_path):
    assert Path(python(WHERE, tmp_path, ROOT)) == ROOT / "kernels/logprob.py"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")   # a build leaves build/ and egg-info where it runs
    for folder in ("recr1", "kernels"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    done = subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps",
                           "--no-build-isolation", "--wheel-dir", out, source], cwd=out, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [path] = out.glob("*.whl")
    return path


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
