"""What a run says while it goes on: its line per step and the README's glossary of it, tables of
rollouts, and the word about the loss.
"""

import io
import re
import sys
import unicodedata
from pathlib import Path

import pytest
from helpers.tiny_world import jsonl, write_sft_yaml, write_yaml

from recr1 import sft, train
from recr1.data_types import Prompt, Reward, Rollout
from recr1.distributed.printing import print_rank0
from recr1.tracking.console import format_console_line, format_rollout_table
from recr1.tracking.step_metrics import StepRecord
from recr1.training.launch import run_guarded
from recr1.utils.terminal import fit_to_width, make_printable

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_yaml(tmp_path_factory.mktemp("world"))


def glossary() -> dict[str, str]:
    """{name: its rows} of the README's table of metrics: the names in backticks in the first
    column.
    """
    text = (ROOT / "recr1/tracking/README.md").read_text(encoding="utf-8")
    [table] = re.findall(
        r"^\| metric \| meaning \|\n\|[-|]+\|\n(.*?)\n\n", text, re.MULTILINE | re.DOTALL
    )
    known = {}
    for row in table.splitlines():
        for name in re.findall(r"`([^`]+)`", row.split(" | ")[0]):
            known[name] = known.get(name, "") + row
    return known


def fields(line: str) -> dict[str, str]:
    """A line per step, "step     1/2  reward 0.5  zero-std 0.00  728 tok/s" -> {name: value}."""
    pairs = []
    for field in re.sub("^step +", "step ", line).split("  "):
        name, _, value = field.rpartition(" ")
        pairs.append(("tok/s", name or value) if value in ("tok/s", "replay") else (name, value))
    assert len(dict(pairs)) == len(pairs) and all(name for name, _ in pairs), line
    return dict(pairs)


EVERYTHING = [
    "loss.kl_coef=0.05",
    "reward.overlong_buffer=4",
    "sampling.dynamic_sampling=1",
    "sampling.top_p=0.9",
    "train.num_mini_batches=2",
    "train.eval_every=1",
]


@pytest.mark.parametrize(
    "loop, overrides",
    [(train, []), (train, EVERYTHING), (sft, ["train.eval_every=1"])],
    ids=["grpo", "grpo with everything", "sft"],
)
def test_every_metric_and_every_name_of_the_line_has_a_row_in_the_glossary(
    loop, overrides, world, tmp_path, capsys
):
    config = world if loop is train else write_sft_yaml(tmp_path)
    assert (
        run_guarded(loop.main, [config, *overrides, "train.steps=2", f"run.dir={tmp_path / 'run'}"])
        == 0
    )
    known = glossary()
    rows = jsonl(tmp_path / "run/metrics.jsonl")
    keys = {key for row in rows for key in row} - {"step"}
    assert keys <= known.keys(), (
        f"in metrics.jsonl and not in the README's glossary: {sorted(keys - known.keys())}"
    )
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    # what is looked at below is what was printed
    assert lines == [format_console_line(row, 2) for row in rows]
    if loop is train:
        # as a replay and a run without reference have it
        lines.append(format_console_line(rows[-1] | dict(rollout_tokens_per_s=None, kl=None), 2))
    for line in lines:
        said = fields(line)
        assert said.pop("step")
        assert len(said) >= (4 if loop is sft else 8)
        assert said.keys() <= known.keys(), (
            f"in the line per step and not in the glossary: {sorted(said.keys() - known.keys())}"
        )
        for name, value in said.items():
            assert (
                re.fullmatch(r"[-+]?[\d.,]+(e[-+]\d+)?%?", value) or f"`{value}`" in known[name]
            ), f"{name} {value}: the glossary does not say what that is"
    assert ("val gain" in fields(lines[0])) == ("val_gain" in rows[0])


def test_a_bar_on_a_terminal_says_how_much_time_is_left(world, tmp_path, monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for name, stderr in (("terminal", Terminal()), ("file", io.StringIO())):
        monkeypatch.setattr(sys, "stderr", stderr)
        assert run_guarded(train.main, [world, f"run.dir={tmp_path / name}"]) == 0
        bars = re.findall(
            r"train: +\d+%\|[^|]*\| (\d)/3 \[\d+:\d\d<(\?|\d+:\d\d)", stderr.getvalue()
        )
        assert bars[-1:] == ([("3", "00:00")] if name == "terminal" else [])
        assert re.findall(r"^step +(\d)/3 ", capsys.readouterr().out, re.MULTILINE) == [
            "1",
            "2",
            "3",
        ]


def step(*texts: tuple[str, str | list[str] | None, float]) -> StepRecord:
    """A step of these (query, rewrite, advantage)."""
    rollouts = [
        Rollout(Prompt(f"q{i}", i, query, (1,)), i, 0, (1, 2), (-0.5, -0.5), True)
        for i, (query, _, _) in enumerate(texts)
    ]
    rewards = [
        Reward(
            0.25 if answer else -1.0, {}, None if answer else "no_json", answer, f"text of {query}"
        )
        for query, answer, _ in texts
    ]
    return StepRecord(
        rollouts, rewards, [adv for _, _, adv in texts], rollouts, list(range(len(texts)))
    )


def width(line: str) -> int:
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in line
    )


def test_a_table_shows_the_highest_the_middle_and_the_lowest_advantage():
    lines = format_rollout_table(
        step(
            ("lamp", "red lamp", 0.0),
            ("chair", "a chair", -1.5),
            ("shirt", "blue shirt", 1.25),
            ("table", None, -2.0),
        ),
        100,
    ).splitlines()
    assert [line.split() for line in lines] == [
        ["query", "answer", "reward", "advantage"],
        ["shirt", "blue", "shirt", "0.250", "+1.250"],
        ["chair", "a", "chair", "0.250", "-1.500"],
        ["table", "(no_json)", "text", "of", "table", "-1.000", "-2.000"],
    ]
    assert len({len(line) for line in lines}) == 1
    # a recommended list
    [_, line] = format_rollout_table(step(("lamp", ["d1", "d2"], 0.0)), 100).splitlines()
    assert line.split()[:3] == ["lamp", '["d1",', '"d2"]']


@pytest.mark.parametrize("columns", [46, 60, 80, 200])
def test_lines_keep_to_the_width_and_nothing_in_them_drives_the_terminal(columns):
    hostile = "\x1b[31mred\x1b]0;title\x07\r\n\x9b2J \u202egnp\u2066 <script>"
    wide = "ユーザー検索" * 20
    accents = "e\u0301" * 200
    lines = format_rollout_table(
        step((hostile, wide, 1.0), (wide, accents, 0.0), (accents, hostile * 9, -1.0)), columns
    ).split("\n")
    assert len(lines) == 4
    assert {width(line) for line in lines} <= set(range(columns + 1))
    assert len({width(line) for line in lines}) == 1
    for line in lines:
        assert line.isprintable()
        assert make_printable(line) == line
    assert "red" in lines[1]
    assert ".." in lines[1]
    assert re.search(r" +0\.250 +\+1\.000$", lines[1])


def test_fit():
    assert fit_to_width("lamp", 6) == "lamp  "
    assert fit_to_width("lampshade", 6) == "lamp.."
    assert fit_to_width("ユーザー", 6) == "ユー.."
    assert fit_to_width("ユーザー", 5) == "ユ.. "
    assert fit_to_width("ユーザー", 8) == "ユーザー"
    assert fit_to_width("", 3) == "   "
    assert fit_to_width("ab", 2) == "ab"
    assert fit_to_width("abc", 2) == ".."
    assert fit_to_width("a\tb\x1b", 4) == "a b "


def test_tables_come_every_few_steps_and_the_word_about_the_loss_once(
    world, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("COLUMNS", "70")
    for overrides, tables, words in (
        (["log.show_every=2"], 2, 1),
        (["log.show_every=0", "loss.kind=reinforce"], 0, 0),
    ):
        assert (
            run_guarded(train.main, [world, *overrides, f"run.dir={tmp_path / str(tables)}"]) == 0
        )
        out = capsys.readouterr().out
        heads = [
            i
            for i, line in enumerate(out.splitlines())
            if re.match("  query +answer +reward +advantage$", line)
        ]
        assert len(heads) == tables
        assert out.count("a GRPO loss near 0 is no fault") == words
        for i in heads:
            assert re.match(r"step +[12]/3 ", out.splitlines()[i - 1])
            assert all(len(line) < 70 for line in out.splitlines()[i : i + 4])


def test_a_terminal_that_cannot_write_a_character_ends_no_run(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    print_rank0("naïve \ud800 ユ")
    sys.stdout.flush()
    assert raw.getvalue() == b"na?ve ? ?\n"
