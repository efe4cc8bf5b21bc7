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


def read_glossary() -> dict[str, str]:
    """Read {name: its rows} of the README's table of metrics.

    Names are those in backticks in the first column.
    """
    text = (ROOT / "recr1/tracking/README.md").read_text(encoding="utf-8")
    pattern = r"^\| metric \| meaning \|\n\|[-|]+\|\n(.*?)\n\n"
    [table] = re.findall(pattern, text, re.MULTILINE | re.DOTALL)
    glossary = {}
    for row in table.splitlines():
        first_column, _, _ = row.partition(" | ")
        for name in re.findall(r"`([^`]+)`", first_column):
            glossary.setdefault(name, "")
            glossary[name] += row
    return glossary


def parse_line(line: str) -> dict[str, str]:
    """Read "step     1/2  reward 0.5  zero-std 0.00  728 tok/s" as {name: value}."""
    line = re.sub("^step +", "step ", line)
    values = {}
    for field in line.split("  "):
        name, _, value = field.rpartition(" ")
        if value in ("tok/s", "replay"):
            value = name or value
            name = "tok/s"
        assert name, line
        assert name not in values, line
        values[name] = value
    return values


EVERYTHING = [
    "loss.kl_coef=0.05",
    "reward.overlong_buffer=4",
    "sampling.dynamic_sampling=1",
    "sampling.top_p=0.9",
    "train.num_mini_batches=2",
    "train.eval_every=1",
]
FIGURE = r"[-+]?[\d.,]+(e[-+]\d+)?%?"


def check_line(line: str, glossary: dict[str, str], min_names: int) -> None:
    """Check that the glossary has every name of the line, and every value that is no figure."""
    values = parse_line(line)
    assert values.pop("step")
    assert len(values) >= min_names
    unknown = sorted(values.keys() - glossary.keys())
    assert not unknown, f"in the line per step and not in the glossary: {unknown}"
    for name, value in values.items():
        if not re.fullmatch(FIGURE, value):
            message = f"{name} {value}: the glossary does not say what that is"
            assert f"`{value}`" in glossary[name], message


@pytest.mark.parametrize(
    "loop, overrides",
    [(train, []), (train, EVERYTHING), (sft, ["train.eval_every=1"])],
    ids=["grpo", "grpo with everything", "sft"],
)
def test_every_metric_and_every_name_of_the_line_has_a_row_in_the_glossary(
    loop, overrides, world, tmp_path, capsys
):
    config = write_sft_yaml(tmp_path) if loop is sft else world
    min_names = 4 if loop is sft else 8
    run = tmp_path / "run"
    argv = [config, *overrides, "train.steps=2", f"run.dir={run}"]
    assert run_guarded(loop.main, argv) == 0
    output = capsys.readouterr().out.splitlines()

    glossary = read_glossary()
    rows = jsonl(run / "metrics.jsonl")
    names = set().union(*rows)
    unknown = sorted(names - glossary.keys() - {"step"})
    assert not unknown, f"in metrics.jsonl and not in the README's glossary: {unknown}"

    # what is looked at below is what was printed
    lines = [format_console_line(row, 2) for row in rows]
    printed = [line for line in output if line.startswith("step ")]
    assert printed == lines

    for line in lines:
        check_line(line, glossary, min_names)
    if loop is train:
        # as a replay and a run without reference have it
        row = rows[-1] | dict(rollout_tokens_per_s=None, kl=None)
        check_line(format_console_line(row, 2), glossary, min_names)
    first_values = parse_line(lines[0])
    assert ("val gain" in first_values) == ("val_gain" in rows[0])


class Terminal(io.StringIO):
    def isatty(self):
        return True


BAR = r"train: +\d+%\|[^|]*\| (\d)/3 \[\d+:\d\d<(\?|\d+:\d\d)"


def test_a_bar_on_a_terminal_says_how_much_time_is_left(world, tmp_path, monkeypatch, capsys):
    cases = (
        ("terminal", Terminal(), [("3", "00:00")]),
        ("file", io.StringIO(), []),
    )
    for name, stderr, last_bar in cases:
        monkeypatch.setattr(sys, "stderr", stderr)
        assert run_guarded(train.main, [world, f"run.dir={tmp_path / name}"]) == 0
        output = capsys.readouterr().out

        bars = re.findall(BAR, stderr.getvalue())
        assert bars[-1:] == last_bar
        steps = re.findall(r"^step +(\d)/3 ", output, re.MULTILINE)
        assert steps == ["1", "2", "3"]


def make_step(*texts: tuple[str, str | list[str] | None, float]) -> StepRecord:
    """Make a step of these (query, rewrite, advantage)."""
    rollouts = []
    rewards = []
    advantages = []
    for i, (query, answer, advantage) in enumerate(texts):
        text = f"text of {query}"
        prompt = Prompt(f"q{i}", i, query, (1,))
        rollout = Rollout(prompt, i, 0, (1, 2), (-0.5, -0.5), True)
        reward = Reward(0.25, {}, None, answer, text)
        if not answer:
            reward = Reward(-1.0, {}, "no_json", answer, text)
        rollouts.append(rollout)
        rewards.append(reward)
        advantages.append(advantage)
    indices = list(range(len(texts)))
    return StepRecord(rollouts, rewards, advantages, rollouts, indices)


def measure_width(line: str) -> int:
    """Count the columns of a terminal that a line takes."""
    columns = 0
    for character in line:
        if unicodedata.combining(character):
            continue
        is_wide = unicodedata.east_asian_width(character) in "WF"
        columns += 2 if is_wide else 1
    return columns


def test_a_table_shows_the_highest_the_middle_and_the_lowest_advantage():
    step = make_step(
        ("lamp", "red lamp", 0.0),
        ("chair", "a chair", -1.5),
        ("shirt", "blue shirt", 1.25),
        ("table", None, -2.0),
    )

    lines = format_rollout_table(step, 100).splitlines()

    heading, highest, middle, lowest = lines
    assert heading.split() == ["query", "answer", "reward", "advantage"]
    assert highest.split() == ["shirt", "blue", "shirt", "0.250", "+1.250"]
    assert middle.split() == ["chair", "a", "chair", "0.250", "-1.500"]
    assert lowest.split() == ["table", "(no_json)", "text", "of", "table", "-1.000", "-2.000"]
    lengths = {len(line) for line in lines}
    assert len(lengths) == 1

    step_of_a_list = make_step(("lamp", ["d1", "d2"], 0.0))
    [_, line] = format_rollout_table(step_of_a_list, 100).splitlines()
    assert line.split()[:3] == ["lamp", '["d1",', '"d2"]']


@pytest.mark.parametrize("columns", [46, 60, 80, 200])
def test_lines_keep_to_the_width_and_nothing_in_them_drives_the_terminal(columns):
    hostile = "\x1b[31mred\x1b]0;title\x07\r\n\x9b2J \u202egnp\u2066 <script>"
    wide = "ユーザー検索" * 20
    accents = "e\u0301" * 200
    step = make_step(
        (hostile, wide, 1.0),
        (wide, accents, 0.0),
        (accents, hostile * 9, -1.0),
    )

    lines = format_rollout_table(step, columns).split("\n")

    assert len(lines) == 4
    width = measure_width(lines[0])
    assert width <= columns
    for line in lines:
        assert measure_width(line) == width
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
    cases = (
        (["log.show_every=2"], 2, 1),
        (["log.show_every=0", "loss.kind=reinforce"], 0, 0),
    )
    for overrides, tables, notes in cases:
        run = tmp_path / str(tables)
        assert run_guarded(train.main, [world, *overrides, f"run.dir={run}"]) == 0
        output = capsys.readouterr().out
        lines = output.splitlines()

        headings = []
        for i, line in enumerate(lines):
            if re.match("  query +answer +reward +advantage$", line):
                headings.append(i)
        assert len(headings) == tables
        assert output.count("a GRPO loss near 0 is no fault") == notes
        for i in headings:
            assert re.match(r"step +[12]/3 ", lines[i - 1])
            for line in lines[i : i + 4]:
                assert len(line) < 70


def test_a_terminal_that_cannot_write_a_character_ends_no_run(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    print_rank0("naïve \ud800 ユ")
    sys.stdout.flush()
    assert raw.getvalue() == b"na?ve ? ?\n"
