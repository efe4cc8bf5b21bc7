"""GPU_RESULTS.md: what was measured on which GPU, with which versions, at which commit."""

from __future__ import annotations

from pathlib import Path

from gpu_sections.report import RAISED, SectionResult
from gpu_sections.setting import BENCHMARKS

from recr1.tracking.versions import collect_versions

RESULTS = BENCHMARKS / "GPU_RESULTS.md"

VERSIONED = ("torch", "triton", "flash-attn")

HEADER = """# Measured on GPUs

Written by `python experiments/gpu_day.py`, which adds rows and changes none. A commit with a plus
had changes that were not committed.

| when | device | versions | commit | section | what | value | bar | holds |
|---|---|---|---|---|---|---|---|---|
"""


def describe_run() -> dict[str, str]:
    """Return when and with what this run is made."""
    versions = collect_versions()
    packages = versions["packages"]
    named = [f"{name} {packages[name]}" for name in VERSIONED if name in packages]
    commit = (versions["commit"] or "no checkout")[:12]
    return dict(
        when=versions["started"],
        device=", ".join(versions["devices"]) or "no GPU",
        versions=", ".join(named),
        commit=commit + "+" * bool(versions["changed"]),
    )


def append_results(path: Path, run: dict[str, str], results: list[SectionResult]) -> None:
    """Add a row for each bar and figure, and for each section that raised.

    `run`: what `describe_run` has said before the sections.
    """
    of_run = list(run.values())
    rows = []
    for result in results:
        if not result.has_run:
            continue
        for bar in result.bars:
            holds = "yes" if bar["ok"] else "no"
            rows.append([*of_run, result.section, bar["name"], bar["value"], bar["bar"], holds])
        for name, value in result.figures.items():
            rows.append([*of_run, result.section, name, value, "", ""])
        if result.status == RAISED:
            rows.append([*of_run, result.section, RAISED, result.why, "", "no"])

    text = "" if path.exists() else HEADER
    for row in rows:
        text += "| " + " | ".join(format_cell(value) for value in row) + " |\n"
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)


def format_cell(value: object) -> str:
    """Return a table cell: no bar, no line break."""
    return str(value).replace("|", "\\|").replace("\n", " ")
