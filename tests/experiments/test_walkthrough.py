"""experiments/walkthrough/walkthrough.ipynb: it runs from its first cell to its last, in small,
without Jupyter; the copy that is kept shows what it says.
"""

import ast
import base64
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.tiny_world import jsonl

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "experiments/walkthrough/walkthrough.ipynb"


SCRIPT = ROOT / "experiments/walkthrough/run_notebook.py"
# a path from the root, an address, a date, a time of day
OF_A_MACHINE = r"(?<![\w.<-])/\w|[A-Z]:\\|https?://|\b20\d\d-\d\d-\d\d|\d\d:\d\d:\d\d"
NDCG_LINE = r"^{name}: NDCG (\S+) -> (\S+), \S+ \[(\S+), \S+\]$"
COURSE_LINE = r"^(\w+) +first ten steps (\S+), last ten (\S+)$"
RISES = dict(reward=True, format_error_rate=False, entropy=False, frac_reward_zero_std=True)


def select_code(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def join_source(cell: dict) -> str:
    return "".join(cell["source"])


def join_printed(cell: dict) -> str:
    text = ""
    for output in cell["outputs"]:
        if output["output_type"] == "stream":
            text += "".join(output["text"])
    return text


def decode_pictures(notebook: dict) -> list[bytes]:
    pictures = []
    for cell in select_code(notebook):
        for output in cell["outputs"]:
            if output["output_type"] == "display_data":
                png = output["data"]["image/png"]
                pictures.append(base64.b64decode(png))
    return pictures


def read_figures(cell: dict) -> list[float]:
    numbers = re.findall(r"[-+]?\d+\.\d+(?!e)", join_printed(cell))
    return [float(number) for number in numbers]


def assert_executed_in_order(cells: list[dict]) -> None:
    places = [cell["execution_count"] for cell in cells]
    assert places == list(range(1, len(cells) + 1))


@pytest.fixture(scope="module")
def stored() -> dict:
    """Read the copy that is kept in the repository."""
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))


def run_notebook(*argv, cwd) -> subprocess.CompletedProcess:
    env = os.environ | dict(PYTHONPATH=str(ROOT), MPLCONFIGDIR=str(cwd / "mpl"))
    command = [sys.executable, SCRIPT, *argv]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


def test_every_cell_runs(stored, tmp_path):
    """Two steps on eight queries, started from elsewhere."""
    pytest.importorskip("matplotlib", reason="extra [docs]")
    out = tmp_path / "out.ipynb"
    folder = str(tmp_path / "walk")

    result = run_notebook(str(out), "steps=2", "size=8", f"folder={folder!r}", cwd=tmp_path)

    assert result.returncode == 0, result.stderr[-3000:]
    ours = json.loads(out.read_text(encoding="utf-8"))
    sources = [cell["source"] for cell in ours["cells"]]
    stored_sources = [cell["source"] for cell in stored["cells"]]
    assert sources == stored_sources
    assert_executed_in_order(select_code(ours))
    num_pictures = len(decode_pictures(ours))
    assert num_pictures == len(decode_pictures(stored))
    assert num_pictures >= 8
    metrics = jsonl(tmp_path / "walk/run/metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2]
    assert (tmp_path / "walk/run/summary.json").exists()

    # before the training nothing depends on its size: the kept copy shows what the code does now
    for cell, stored_cell in zip(select_code(ours), select_code(stored)):
        if "candidates" in join_source(cell):
            break
        figures = read_figures(cell)
        assert figures == pytest.approx(read_figures(stored_cell), abs=2e-3)
    else:
        pytest.fail("the walk-through trains nothing")


BAD_ARGUMENTS = [
    (
        ["out.ipynb", "step=2"],
        "the notebook has no parameter step; it has steps, size, folder",
    ),
    (["out.ipynb", "folder=here/there"], "the value as Python writes it"),
    (["out.ipynb", "steps="], "the value as Python writes it"),
    (["--help"], "python experiments/walkthrough/run_notebook.py [OUT.ipynb]"),
]


@pytest.mark.parametrize("argv, why", BAD_ARGUMENTS)
def test_what_it_cannot_do_is_said_and_nothing_is_written(argv, why, tmp_path):
    pytest.importorskip("matplotlib", reason="extra [docs]")

    result = run_notebook(*argv, cwd=tmp_path)

    assert result.returncode == 2
    assert why in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.glob("*.ipynb"))


def test_the_kept_copy_is_whole_small_and_of_no_machine(stored):
    cells = select_code(stored)

    assert NOTEBOOK.stat().st_size <= 400_000
    assert_executed_in_order(cells)
    text = ""
    for cell in cells:
        text += join_printed(cell)
        for output in cell["outputs"]:
            assert output["output_type"] in ("stream", "display_data")
    assert not re.search(OF_A_MACHINE, text)
    for png in decode_pictures(stored):
        width, height = struct.unpack(">II", png[16:24])
        assert png[:8] == b"\x89PNG\r\n\x1a\n"
        assert width > 60
        assert height > 60


def test_it_learns(stored):
    """The kept run: what its text says of it. Better on the queries it trained on, and on others by
    more than chance.
    """
    printed = [join_printed(cell) for cell in select_code(stored)]
    text = "\n".join(printed)

    for name in ("trained on", "never seen"):
        line = re.search(NDCG_LINE.format(name=name), text, re.MULTILINE)
        before = float(line[1])
        after = float(line[2])
        low = float(line[3])
        assert after > before, name
        assert low > 0, name

    rises = {}
    for name, begin, end in re.findall(COURSE_LINE, text, re.MULTILINE):
        rises[name] = float(end) > float(begin)
    assert rises == RISES


USED_MODULES = {
    "recr1.data.chat_template",
    "recr1.utils.hf_hub",
    "recr1.tasks.prompts",
    "recr1.training.load_model",
    "recr1.sampling.generate",
    "recr1.tasks.answer_parser",
    "recr1.retrieval.factory",
    "recr1.tasks.ranking_metrics",
    "recr1.rl.advantages",
    "recr1.rl.losses",
    "recr1.rl.policy_loss",
    "recr1.tasks.registry",
    "recr1.tasks.scorer",
    "recr1.rl.packing",
    "recr1.train",
    "recr1.training.launch",
    "recr1.commands.rewrite",
}


def test_cells_call_and_do_not_rebuild(stored):
    """What is used comes from recr1; nothing is defined in a cell but names for values."""
    imported = set()
    for cell in select_code(stored):
        tree = ast.parse(join_source(cell))
        for node in ast.walk(tree):
            assert not isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.While))
            if isinstance(node, ast.ImportFrom):
                imported.add(node.module)

    assert imported >= USED_MODULES


def test_its_titles_name_files_in_the_reading_order(stored):
    """recr1/README.md, "Ten stops": the files that it links, one after the other."""
    titles = ""
    for cell in stored["cells"]:
        if cell["cell_type"] == "markdown":
            titles += "".join(line for line in cell["source"] if line.startswith("## "))
    named = re.findall(r"`([^`]+)`", titles)

    readme = (ROOT / "recr1/README.md").read_text(encoding="utf-8")
    stops = readme.split("## Ten stops")[1].split("\n## ")[0]
    order = []
    for link in re.findall(r"\]\(([^)]+\.py)\)", stops):
        path = (ROOT / "recr1" / link).resolve()
        order.append(str(path.relative_to(ROOT)))

    places = [order.index(name) for name in named]
    assert len(named) > 10
    assert places == sorted(places), sorted(named, key=order.index)
