"""The faults of run.sh: made by the number, counted, and judged against an undisturbed run."""

import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import answers
import busy
import damage
import injection
import inputs
import searches
import settings
import stops
import values
from jobs import none_left
from tqdm import tqdm
from world import Outcome, World

KINDS = {  # name: (what makes them, how many)
    "SIGKILL of a rank": (stops.kill_ranks, 47),
    "SIGKILL under torchrun": (stops.kill_under_torchrun, 3),
    "SIGKILL inside a save": (stops.kill_in_saves, 20),
    "corrupted checkpoint": (damage.damage_checkpoints, 28),
    "disk full": (damage.fill_disks, 14),
    "SIGTERM": (stops.stop_jobs, 20),
    "NaN or infinity on a rank": (values.spoil_values, 16),
    "user's function or task": (values.break_functions, 24),
    "malformed answer": (answers.write_malformed, 60),
    "bad data file": (inputs.spoil_data, 20),
    "prompt": (inputs.spoil_prompts, 12),
    "search finds nothing": (searches.search_in_vain, 14),
    "injection": (injection.inject_payloads, 20),
    "a rank hangs or leaves": (stops.spoil_ranks, 8),
    "wrong setting": (settings.spoil_settings, 10),
    "hostile checkpoint": (damage.write_hostile, 4),
    "a busy machine": (busy.end_jobs, 16),
}
HEADER = f"{'fault':<27}{'N':>5}{'survived':>10}{'lost':>7}{'silent':>8}{'seconds':>9}  where"


def main(argv: list[str]) -> int:
    """[--lora: to runs with LoRA] [N: so many of each] [name of a kind ...]; 0 if nothing was
    lost.
    """
    lora = "--lora" in argv
    argv = [argument for argument in argv if argument != "--lora"]
    numbers = [int(argument) for argument in argv if argument.isdigit()]
    at_most = numbers[0] if numbers else None
    chosen = [argument for argument in argv if not argument.isdigit()]
    reason = explain_refusal(at_most, chosen)
    if reason:
        kinds = ", ".join(KINDS)
        print(
            f"faults.py [--lora] [N] [kind ...]: {reason}; the kinds are {kinds}", file=sys.stderr
        )
        return 2
    start = time.monotonic()
    try:
        bars = make_faults(chosen or list(KINDS), at_most, lora)
    except KeyboardInterrupt:
        seconds = time.monotonic() - start
        print(f"stopped after {seconds:.0f} s; no process is left", file=sys.stderr)
        return 130
    seconds = time.monotonic() - start
    survived = sum(bar["value"] for bar in bars)
    count = sum(bar["bar"] for bar in bars)
    print(f"{count} faults made, {survived} survived, {seconds:.0f} s", flush=True)
    print(json.dumps(dict(bars=bars)))
    is_fine = all(bar["ok"] for bar in bars)
    return 0 if is_fine else 1


def explain_refusal(at_most: int | None, chosen: list[str]) -> str:
    """Say why these arguments are none; "" if they are."""
    if at_most == 0:
        return "none of each is none"
    for kind in chosen:
        if kind not in KINDS:
            return f"no kind {kind!r}"
    return ""


def make_faults(chosen: list[str], at_most: int | None, lora: bool = False) -> list[dict]:
    """Make the faults of these kinds, at most so many of each. Return a bar for each kind."""
    bars = []
    with tempfile.TemporaryDirectory() as folder, none_left():
        world = World(Path(folder), lora)
        print(HEADER, flush=True)
        for seed, (kind, (make, n)) in enumerate(KINDS.items()):
            if kind not in chosen:
                continue
            world.rng.seed(seed)
            count = min(n, at_most or n)
            bars.append(make_kind(kind, make, world, count))
    return bars


def make_kind(
    kind: str, make: Callable[[World, int], Iterator[Outcome]], world: World, n: int
) -> dict:
    """Make n faults of a kind. Print their row of the table, and each that was not survived."""
    start = time.monotonic()
    outcomes = []
    # its thread might hold a lock that a fork takes along
    tqdm.monitor_interval = 0
    with tqdm(make(world, n), kind, n, leave=False, disable=None) as progress:
        for outcome in progress:
            outcomes.append(outcome)
            progress.set_postfix_str(f"{outcome.verdict}: {outcome.where}")
    counts = Counter(outcome.verdict for outcome in outcomes)
    survived = counts["survived"]
    seconds = time.monotonic() - start
    print(
        f"{kind:<27}{len(outcomes):>5}{survived:>10}{counts['lost']:>7}"
        f"{counts['silent']:>8}{seconds:>9.0f}  {describe_places(outcomes)}",
        flush=True,
    )
    for outcome in outcomes:
        if outcome.note or outcome.verdict != "survived":
            print(f"    {outcome.verdict}: {outcome.where}: {outcome.note}", flush=True)
    return dict(
        name=f"{kind}: survived of {n}",
        value=survived,
        bar=n,
        ok=survived == n == len(outcomes),
    )


def describe_places(outcomes: list[Outcome]) -> str:
    """Say where faults came, and how soon all ranks had ended where that is the question."""
    counts = Counter(outcome.where for outcome in outcomes)
    text = "each another place"
    if len(counts) <= 10:
        text = ", ".join(f"{where} {count}" for where, count in counts.items())
    seconds = [outcome.seconds for outcome in outcomes if outcome.seconds is not None]
    if seconds:
        text += f"; all ended within {max(seconds):.1f} s"
    return text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
