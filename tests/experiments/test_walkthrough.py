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


def code(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def printed(cell: dict) -> str:
    return "".join("".join(o["text"]) for o in cell["outputs"] if o["output_type"] == "stream")


def pictures(notebook: dict) -> list[bytes]:
    return [
        base64.b64decode(o["data"]["image/png"])
        for cell in code(notebook)
        for o in cell["outputs"]
        if o["output_type"] == "display_data"
    ]


@pytest.fixture(scope="module")
def kept() -> dict:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))


def run(*argv, cwd) -> subprocess.CompletedProcess:
    env = os.environ | dict(PYTHONPATH=str(ROOT), MPLCONFIGDIR=str(cwd / "mpl"))
    return subprocess.run(
        [sys.executable, ROOT / "experiments/walkthrough/run_notebook.py", *map(str, argv)],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
    )


def test_every_cell_runs(kept, tmp_path):
    """Two steps on eight queries, started from elsewhere."""
    pytest.importorskip("matplotlib", reason="extra [docs]")
    done = run(
        tmp_path / "out.ipynb",
        "steps=2",
        "size=8",
        f"folder={str(tmp_path / 'walk')!r}",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ours = json.loads((tmp_path / "out.ipynb").read_text(encoding="utf-8"))
    assert [cell["source"] for cell in ours["cells"]] == [cell["source"] for cell in kept["cells"]]
    assert [cell["execution_count"] for cell in code(ours)] == list(range(1, len(code(ours)) + 1))
    assert len(pictures(ours)) == len(pictures(kept)) >= 8
    assert [row["step"] for row in jsonl(tmp_path / "walk/run/metrics.jsonl")] == [1, 2]
    assert (tmp_path / "walk/run/summary.json").exists()
    # before the training nothing depends on its size: the kept copy shows what the code does now
    for mine, theirs in zip(code(ours), code(kept)):
        if "candidates" in "".join(mine["source"]):
            break
        figures = [
            [float(x) for x in re.findall(r"[-+]?\d+\.\d+(?!e)", printed(cell))]
            for cell in (mine, theirs)
        ]
        assert figures[0] == pytest.approx(figures[1], abs=2e-3)
    else:
        pytest.fail("the walk-through trains nothing")


@pytest.mark.parametrize(
    "argument, said",
    [
        ("step=2", "the notebook has no parameter step; it has steps, size, folder"),
        ("folder=here/there", "the value as Python writes it"),
        ("steps=", "the value as Python writes it"),
        ("--help", "python experiments/walkthrough/run_notebook.py [OUT.ipynb]"),
    ],
)
def test_what_it_cannot_do_is_said_and_nothing_is_written(argument, said, tmp_path):
    pytest.importorskip("matplotlib", reason="extra [docs]")
    done = run(*([argument] if argument == "--help" else ["out.ipynb", argument]), cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("*.ipynb"))


def test_the_kept_copy_is_whole_small_and_of_no_machine(kept):
    assert NOTEBOOK.stat().st_size <= 400_000
    cells = code(kept)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert all(
        o["output_type"] in ("stream", "display_data") for cell in cells for o in cell["outputs"]
    )
    # paths from the root, addresses, clocks
    assert not re.search(
        r"(?<![\w.<-])/\w|[A-Z]:\\|https?://|\b20\d\d-\d\d-\d\d|\d\d:\d\d:\d\d",
        "".join(map(printed, cells)),
    )
    for png in pictures(kept):
        assert png[:8] == b"\x89PNG\r\n\x1a\n"
        assert min(struct.unpack(">II", png[16:24])) > 60


def test_it_learns(kept):
    """The kept run: what its text says of it. Better on the queries it trained on, and on others by
    more than chance.
    """
    told = "\n".join(printed(cell) for cell in code(kept))
    for name in ("trained on", "never seen"):
        before, after, low = map(
            float,
            re.search(
                rf"^{name}: NDCG (\S+) -> (\S+), \S+ \[(\S+), \S+\]$", told, re.MULTILINE
            ).groups(),
        )
        assert after > before and low > 0, name
    course = {
        name: (float(begin), float(end))
        for name, begin, end in re.findall(
            r"^(\w+) +first ten steps (\S+), last ten (\S+)$", told, re.MULTILINE
        )
    }
    assert {name: end > begin for name, (begin, end) in course.items()} == dict(
        reward=True, format_error_rate=False, entropy=False, frac_reward_zero_std=True
    )


def test_cells_call_and_do_not_rebuild(kept):
    """What is used comes from recr1; nothing is defined in a cell but names for values."""
    used = set()
    for cell in code(kept):
        tree = ast.parse("".join(cell["source"]))
        assert not [
            n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.While))
        ]
        used |= {
            n.module
            for n in ast.walk(tree)
            if isinstance(n, ast.ImportFrom) and n.module.startswith("recr1")
        }
    assert used >= {
        f"recr1.{name}"
        for name in (
            "data.chat_template",
            "utils.hf_hub",
            "tasks.prompts",
            "training.load_model",
            "sampling.generate",
            "tasks.answer_parser",
            "retrieval.factory",
            "tasks.ranking_metrics",
            "rl.advantages",
            "rl.losses",
            "rl.policy_loss",
            "tasks.registry",
            "tasks.scorer",
            "rl.packing",
            "train",
            "training.launch",
            "commands.rewrite",
        )
    }


def test_its_titles_name_files_in_the_reading_order(kept):
    """recr1/README.md, "Ten stops": the files that it links, one after the other."""
    titles = [
        line
        for cell in kept["cells"]
        if cell["cell_type"] == "markdown"
        for line in cell["source"]
        if line.startswith("## ")
    ]
    named = re.findall(r"`([^`]+)`", "".join(titles))
    text = (ROOT / "recr1/README.md").read_text(encoding="utf-8")
    stops = text.split("## Ten stops")[1].split("\n## ")[0]
    links = re.findall(r"\]\(([^)]+\.py)\)", stops)
    order = [str((ROOT / "recr1" / link).resolve().relative_to(ROOT)) for link in links]
    places = [order.index(name) for name in named]
    assert len(named) > 10 and places == sorted(places), sorted(named, key=order.index)
