"""What a section of gpu_day.py is, how it is run, and what it leaves: bars, figures, a status."""

from __future__ import annotations

import json
import math
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field

import torch
from gpu_sections.setting import Setting, free_memory

CORRECTNESS = "correctness"
SPEED = "speed"
TWO_GPUS = "two_gpus"
KINDS = (CORRECTNESS, SPEED, TWO_GPUS)

OK = "ok"
NOT_OK = "not ok"  # it ran to its end, and a bar does not hold
RAISED = "raised"
CANNOT_RUN = "cannot run"
LEFT_OUT = "left out"  # the time was over before it could begin


class CannotRun(Exception):
    """A section has nothing to work on here. The message says what is missing."""


class Report:
    """Collect what one section finds. What it has when the section raises is kept."""

    def __init__(self) -> None:
        self.bars: list[dict] = []
        self.figures: dict[str, float | int | str] = {}
        self.skipped: dict[str, str] = {}

    def at_most(self, name: str, value: float, bar: float) -> None:
        """Add a bar that holds when the value is not above it. NaN never holds."""
        self._add_bar(name, value, bar, value <= bar)

    def at_least(self, name: str, value: float, bar: float) -> None:
        """Add a bar that holds when the value is not below it. NaN never holds."""
        self._add_bar(name, value, bar, value >= bar)

    def equals(self, name: str, value: float, bar: float) -> None:
        """Add a bar that holds when the value is exactly this."""
        self._add_bar(name, value, bar, value == bar)

    def figure(self, name: str, value: float | int | str) -> None:
        """Add what was measured and has no bar."""
        self.figures[name] = round_figure(value)

    def skip(self, what: str, why: str) -> None:
        """Add a part of the section that cannot run here."""
        self.skipped[what] = why.splitlines()[0][:200] if why else "no reason given"

    def _add_bar(self, name: str, value: float, bar: float, ok: bool) -> None:
        rounded = round_figure(float(value))
        self.bars.append(dict(name=name, value=rounded, bar=round_figure(bar), ok=bool(ok)))


def round_figure(value: float | int | str) -> float | int | str:
    """Return four significant digits; a number that JSON cannot hold as its name."""
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        return str(value)
    return float(f"{value:.4g}")


@dataclass(frozen=True)
class Section:
    """A part of the day. `run` does the work; its docstring's first line says what it shows."""

    name: str
    kind: str  # one of KINDS
    run: Callable[[Report, Setting], None]

    @property
    def summary(self) -> str:
        text = self.run.__doc__ or ""
        return text.strip().splitlines()[0]


@dataclass(frozen=True)
class SectionResult:
    """What came of a section: one line of JSON."""

    section: str
    kind: str
    status: str
    why: str = ""  # the error, what is missing, or the bars that do not hold
    seconds: float = 0.0
    bars: list[dict] = field(default_factory=list)
    figures: dict[str, float | int | str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def has_run(self) -> bool:
        return self.status not in (CANNOT_RUN, LEFT_OUT)

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def leave_out(section: Section, minutes: float) -> SectionResult:
    """Return the result of a section for which there was no time."""
    why = f"the {minutes:g} minutes were over; --only {section.name} runs it alone"
    return SectionResult(section.name, section.kind, LEFT_OUT, why)


def run_section(section: Section, setting: Setting) -> SectionResult:
    """Run a section. Whatever it raises is its result, and the next one can run.

    What it prints goes to stderr: stdout holds one line of JSON for each section.
    """
    report = Report()
    torch.manual_seed(0)
    began = time.perf_counter()
    status = OK
    why = ""
    try:
        with redirect_stdout(sys.stderr):
            section.run(report, setting)
    except CannotRun as e:
        status = CANNOT_RUN
        why = str(e)
    except Exception as e:
        # The text only: the traceback's frames would hold the section's tensors.
        status = RAISED
        why = describe_error(e)
        traceback.print_exc(limit=-8)
    if status == OK:
        missed = [bar["name"] for bar in report.bars if not bar["ok"]]
        if missed:
            status = NOT_OK
            why = "; ".join(missed)
    seconds = round(time.perf_counter() - began, 1)
    free_memory(setting)
    return SectionResult(
        section.name,
        section.kind,
        status,
        why,
        seconds,
        report.bars,
        report.figures,
        report.skipped,
    )


def describe_error(error: BaseException) -> str:
    """Return the type and the first line of an error."""
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"
