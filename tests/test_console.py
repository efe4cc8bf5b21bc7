"""What a run says while it goes on: its line per step and the README's glossary of it, tables of rollouts, and the word about the loss."""
import io
import re
import sys
import unicodedata
from pathlib import Path

import pytest

from recr1 import train
from recr1.console import rollout_table
from recr1.log import Step, console_line, say
from recr1.records import Prompt, Reward, Rollout
from recr1.run import guarded
from recr1.terminal import fit, plain
from tiny import jsonl, write_yaml

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_yaml(tmp_path_factory.mktemp("world"))


def glossary() -> set[str]:
    """Names in backticks in the first column of the README's table of metrics."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    [table] = re.findall(r"^\| metric \| meaning \|\n(.*?)\n\n", text, re.MULTILINE | re.DOTALL)
    return {name for row in table.splitlines() for name in re.findall(r"`([^`]+)`", row.split(" | ")[0])}


def test_every_metric_and_every_name_of_the_line_has_a_row_in_the_glossary(world, tmp_path):
    everything = ["loss.kl=0.05", "reward.overlong=4", "sampling.resample=1", "sampling.top_p=0.9", "train.inner_steps=2", "train.eval_every=1"]
    known = glossary()
    for name, overrides in (("plain", []), ("everything", everything)):
        assert guarded(train.main, [world, *overrides, "train.steps=2", f"run.dir={tmp_path / name}"]) == 0
        rows = jsonl(tmp_path / name / "metrics.jsonl")
        keys = {key for row in rows for key in row} - {"step"}
        assert keys <= known, f"in metrics.jsonl and not in the README's glossary: {sorted(keys - known)}"
        line = console_line(rows[-1], 2).partition("/2")[2]
        names = {words.strip() for words in re.findall(r"  ([a-z]+(?:[ -][a-z]+)?) (?=[-+\d]|off)", line)} | {"tok/s"}
        assert len(names) >= 8 and names <= known, f"in the line per step and not in the glossary: {sorted(names - known)}"


def step(*texts: tuple[str, str | list[str] | None, float]) -> Step:
    """A step of these (query, rewrite, advantage)."""
    rollouts = [Rollout(Prompt(f"q{i}", i, query, (1,)), i, 0, (1, 2), (-0.5, -0.5), True) for i, (query, _, _) in enumerate(texts)]
    rewards = [Reward(0.25 if answer else -1.0, {}, None if answer else "no_json", answer, f"text of {query}") for query, answer, _ in texts]
    return Step(rollouts, rewards, [adv for _, _, adv in texts], rollouts, list(range(len(texts))))


def width(line: str) -> int:
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in line)


def test_a_table_shows_the_highest_the_middle_and_the_lowest_advantage():
    lines = rollout_table(step(("lamp", "red lamp", 0.0), ("chair", "a chair", -1.5), ("shirt", "blue shirt", 1.25), ("table", None, -2.0)), 100).splitlines()
    assert [line.split() for line in lines] == [["query", "answer", "reward", "advantage"], ["shirt", "blue", "shirt", "0.250", "+1.250"],
                                                ["chair", "a", "chair", "0.250", "-1.500"], ["table", "(no_json)", "text", "of", "table", "-1.000", "-2.000"]]
    assert len({len(line) for line in lines}) == 1
    [_, line] = rollout_table(step(("lamp", ["d1", "d2"], 0.0)), 100).splitlines()           # a recommended list
    assert line.split()[:3] == ["lamp", '["d1",', '"d2"]']


@pytest.mark.parametrize("columns", [46, 60, 80, 200])
def test_lines_keep_to_the_width_and_nothing_in_them_drives_the_terminal(columns):
    hostile = "\x1b[31mred\x1b]0;title\x07\r\n\x9b2J \u202egnp\u2066 <script>"
    wide, accents = "ユーザー検索" * 20, "e\u0301" * 200
    lines = rollout_table(step((hostile, wide, 1.0), (wide, accents, 0.0), (accents, hostile * 9, -1.0)), columns).split("\n")
    assert len(lines) == 4 and {width(line) for line in lines} <= set(range(columns + 1)) and len({width(line) for line in lines}) == 1
    for line in lines:
        assert line.isprintable() and plain(line) == line
    assert "red" in lines[1] and ".." in lines[1] and re.search(r" +0\.250 +\+1\.000$", lines[1])


def test_fit():
    assert fit("lamp", 6) == "lamp  " and fit("lampshade", 6) == "lamp.." and fit("ユーザー", 6) == "ユー.." and fit("ユーザー", 5) == "ユ.. "
    assert fit("ユーザー", 8) == "ユーザー" and fit("", 3) == "   " and fit("ab", 2) == "ab" and fit("abc", 2) == ".."
    assert fit("a\tb\x1b", 4) == "a b "


def test_tables_come_every_few_steps_and_the_word_about_the_loss_once(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "70")
    for overrides, tables, words in ((["log.show_every=2"], 2, 1), (["log.show_every=0", "loss.kind=reinforce"], 0, 0)):
        assert guarded(train.main, [world, *overrides, f"run.dir={tmp_path / str(tables)}"]) == 0
        out = capsys.readouterr().out
        heads = [i for i, line in enumerate(out.splitlines()) if re.match("  query +answer +reward +advantage$", line)]
        assert len(heads) == tables and out.count("a GRPO loss near 0 is no fault") == words
        for i in heads:
            assert re.match(r"step +[12]/3 ", out.splitlines()[i - 1]) and all(len(line) < 70 for line in out.splitlines()[i:i + 4])


def test_a_terminal_that_cannot_write_a_character_ends_no_run(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    say("naïve \ud800 ユ")
    sys.stdout.flush()
    assert raw.getvalue() == b"na?ve ? ?\n"
