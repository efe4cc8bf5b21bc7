"""Check on a GPU what only a GPU can show, and measure it: one run of seven minutes.

python experiments/gpu_day.py [--minutes 7] [--only NAME ...] [--list] [--tiny] [--out FILE]

Run it from the checkout, in the environment that trains (PYTHONPATH=. where recr1 is not
installed). Nothing of it was ever run on a GPU: it was tried on a CPU and on a stand-in for one.
The expected figures stand in the files of experiments/gpu_sections; they are arithmetic from
published peaks, not measurements.

The sections come in order of value: what must be right, then what should be fast, then what takes
two GPUs. Each prints one line of JSON. What a section raises is its result and the next one runs;
none begins after --minutes. A crash of CUDA ends it for the process: what is left then runs in a
new one.

Ends with a summary and one line of JSON, {"bars": [...]}. Exit code 0: every correctness section
that ran holds (a speed that is missed does not count); 1: one does not; 2: there is no GPU, or the
command line is wrong. On a GPU the figures are added to experiments/benchmarks/GPU_RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from gpu_sections.attention_checks import check_decode_attention, check_packed_attention
from gpu_sections.decode_speed import measure_decoding, measure_parts
from gpu_sections.head_speed import measure_head
from gpu_sections.kernel_checks import check_head, check_sampling
from gpu_sections.layer_checks import check_layer
from gpu_sections.machine import check_machine
from gpu_sections.rank_checks import (
    check_gradients_of_two_ranks,
    check_killed_rank,
    check_one_rank,
    measure_overlap,
)
from gpu_sections.report import (
    CORRECTNESS,
    KINDS,
    NOT_OK,
    RAISED,
    SPEED,
    TWO_GPUS,
    Section,
    SectionResult,
    leave_out,
    run_section,
)
from gpu_sections.results_file import RESULTS, append_results, describe_run
from gpu_sections.run_checks import check_dry_runs, check_learning
from gpu_sections.sampling_checks import check_gap, check_graphs
from gpu_sections.setting import Setting
from gpu_sections.training_speed import measure_step, measure_training

from recr1.utils.exits import end_process

SECTIONS = (
    Section("machine", CORRECTNESS, check_machine),
    Section("head", CORRECTNESS, check_head),
    Section("sampling", CORRECTNESS, check_sampling),
    Section("layer", CORRECTNESS, check_layer),
    Section("attention", CORRECTNESS, check_packed_attention),
    Section("decode_attention", CORRECTNESS, check_decode_attention),
    Section("graphs", CORRECTNESS, check_graphs),
    Section("gap", CORRECTNESS, check_gap),
    Section("dry_runs", CORRECTNESS, check_dry_runs),
    Section("learning", CORRECTNESS, check_learning),
    Section("one_rank", CORRECTNESS, check_one_rank),
    Section("decode_speed", SPEED, measure_decoding),
    Section("head_speed", SPEED, measure_head),
    Section("training_speed", SPEED, measure_training),
    Section("step_speed", SPEED, measure_step),
    Section("decode_parts", SPEED, measure_parts),
    Section("two_ranks", TWO_GPUS, check_gradients_of_two_ranks),
    Section("overlap", TWO_GPUS, measure_overlap),
    Section("killed_rank", TWO_GPUS, check_killed_rank),
)

NO_GPU_EXIT_CODE = 2


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; args.sections are those that were asked for."""
    names = [section.name for section in SECTIONS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=7.0, help="none begins later; default: 7")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[*KINDS, *names],
        metavar="NAME",
        help=f"sections, or all of a kind: {', '.join(KINDS)}",
    )
    parser.add_argument("--list", action="store_true", help="list the sections and run none")
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="sizes for a CPU or a stand-in GPU: it shows that the sections work",
    )
    parser.add_argument("--out", metavar="FILE", help="for the lines of JSON, beside stdout")
    parser.add_argument(
        "--no-record", action="store_true", help="add nothing to the file of measured figures"
    )
    args = parser.parse_args(argv)
    wanted = args.only or names
    args.sections = [s for s in SECTIONS if s.name in wanted or s.kind in wanted]
    return args


def main() -> int:
    """Run the sections and return the exit code."""
    args = parse_arguments()
    if args.list:
        for section in SECTIONS:
            print(f"{section.name:<18}{section.kind:<13}{section.summary}")
        return 0
    if not args.tiny and not torch.cuda.is_available():
        print(
            "gpu_day.py: torch sees no GPU here; --tiny shows on a CPU that the sections work, "
            "and recr1 doctor says why a GPU is not seen",
            file=sys.stderr,
        )
        return NO_GPU_EXIT_CODE

    run = describe_run()
    if args.out:
        Path(args.out).write_text(json.dumps(run) + "\n", encoding="utf-8")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    with tempfile.TemporaryDirectory(prefix="gpu-day-") as folder:
        setting = Setting(device, args.tiny, Path(folder))
        results = run_sections(args.sections, setting, args)

    bars = collect_bars(results)
    print(format_summary(results))
    if setting.has_real_gpu and not args.tiny and not args.no_record:
        append_results(RESULTS, run, results)
        print(f"added to {RESULTS}")
    print(json.dumps({"bars": bars}))
    return 0 if is_correct(results) else 1


def run_sections(
    sections: list[Section], setting: Setting, args: argparse.Namespace
) -> list[SectionResult]:
    """Run the sections in their order, and print each one's line as soon as it is there."""
    deadline = time.perf_counter() + 60 * args.minutes
    results: list[SectionResult] = []
    for number, section in enumerate(sections):
        if time.perf_counter() >= deadline:
            result = leave_out(section, args.minutes)
        else:
            print(f"gpu_day: {section.name}: {section.summary}", file=sys.stderr, flush=True)
            result = run_section(section, setting)
        publish(result, args.out)
        results.append(result)
        if result.status == RAISED and is_cuda_dead(setting):
            minutes_left = max(0.0, (deadline - time.perf_counter()) / 60)
            rest = sections[number + 1 :]
            return results + run_in_new_process(rest, args, minutes_left)
    return results


def publish(result: SectionResult, out: str | None) -> None:
    """Print a section's line, and add it to the file of --out."""
    line = result.to_json()
    print(line, flush=True)
    if out:
        with open(out, "a", encoding="utf-8") as file:
            file.write(line + "\n")


def is_cuda_dead(setting: Setting) -> bool:
    """Return whether an error has ended CUDA in this process, as an illegal address does."""
    try:
        setting.synchronize()
    except RuntimeError:
        return True
    return False


def run_in_new_process(
    sections: list[Section], args: argparse.Namespace, minutes: float
) -> list[SectionResult]:
    """Run these sections in a process of its own and return their results.

    What this process has taken of the GPU's memory stays taken until it ends.
    """
    if not sections:
        return []
    print("gpu_day: CUDA has ended in this process; the rest runs in a new one", file=sys.stderr)
    names = [section.name for section in sections]
    arguments = ["--only", *names, "--minutes", f"{minutes:.2f}", *["--tiny"] * args.tiny]
    command = [sys.executable, __file__, *arguments, "--no-record"]  # this process records all
    results = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith('{"section"'):
                result = SectionResult(**json.loads(line))
                publish(result, args.out)
                results[result.section] = result

    for section in sections:
        if section.name not in results:
            why = f"its process ended with exit code {process.returncode}"
            result = SectionResult(section.name, section.kind, RAISED, why)
            publish(result, args.out)
            results[section.name] = result
    return list(results.values())


def collect_bars(results: list[SectionResult]) -> list[dict]:
    """Return all bars by the name of their section; a section that raised has one that fails."""
    bars = []
    for result in results:
        for bar in result.bars:
            bars.append(bar | {"name": f"{result.section}: {bar['name']}"})
        if result.status == RAISED:
            name = f"{result.section}: runs to its end"
            bars.append(dict(name=name, value=0, bar=1, ok=False))
    return bars


def is_correct(results: list[SectionResult]) -> bool:
    """Return whether every correctness section that ran holds, those of two GPUs included."""
    for result in results:
        if result.kind != SPEED and result.status in (NOT_OK, RAISED):
            return False
    return True


def format_summary(results: list[SectionResult]) -> str:
    """Return a line for each section: its status and why."""
    lines = []
    for result in results:
        held = sum(bar["ok"] for bar in result.bars)
        count = f"{held} of {len(result.bars)} bars" if result.has_run else ""
        line = f"{result.section:<18}{result.status:<12}{count:<16}{result.why}"
        lines.append(line.rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    end_process(main)
