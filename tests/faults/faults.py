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
    "SIGKILL of a rank": (stops.kills, 47),
    "SIGKILL under torchrun": (stops.torchruns, 3),
    "SIGKILL inside a save": (stops.saves, 20),
    "corrupted checkpoint": (damage.corruptions, 28),
    "disk full": (damage.disks, 14),
    "SIGTERM": (stops.terms, 20),
    "NaN or infinity on a rank": (values.nonfinite, 16),
    "user's function or task": (values.functions, 24),
    "malformed answer": (answers.malformed, 60),
    "bad data file": (inputs.lines, 20),
    "prompt": (inputs.prompts, 12),
    "search finds nothing": (searches.empty, 14),
    "injection": (injection.injections, 20),
    "a rank hangs or leaves": (stops.between_ranks, 8),
    "wrong setting": (settings.settings, 10),
    "hostile checkpoint": (damage.hostile, 4),
    "a busy machine": (busy.endings, 16),
}


def main(argv: list[str]) -> int:
    """[N: so many of each] [name of a kind ...]; 0 if nothing was lost."""
    each = next((int(a) for a in argv if a.isdigit()), None)
    chosen = [a for a in argv if not a.isdigit()] or list(KINDS)
    if each == 0 or (unknown := [name for name in chosen if name not in KINDS]):
        reason = f"no kind {unknown[0]!r}" if each != 0 else "none of each is none"
        print(
            f"faults.py [N] [kind ...]: {reason}; the kinds are {', '.join(KINDS)}",
            file=sys.stderr,
        )
        return 2
    bars = []
    started = time.monotonic()
    try:
        with tempfile.TemporaryDirectory() as folder, none_left():
            world = World(Path(folder))
            print(
                f"{'fault':<27}{'N':>5}{'survived':>10}{'lost':>7}{'silent':>8}{'seconds':>9}"
                "  where",
                flush=True,
            )
            for seed, (kind, (make, n)) in enumerate(KINDS.items()):
                if kind in chosen:
                    world.rng.seed(seed)
                    bars.append(row(kind, make, world, min(n, each or n)))
    except KeyboardInterrupt:
        print(
            f"stopped after {time.monotonic() - started:.0f} s; no process is left", file=sys.stderr
        )
        return 130
    survived, made = (sum(bar[key] for bar in bars) for key in ("value", "bar"))
    print(
        f"{made} faults made, {survived} survived, {time.monotonic() - started:.0f} s", flush=True
    )
    print(json.dumps(dict(bars=bars)))
    return 0 if all(bar["ok"] for bar in bars) else 1


def row(kind: str, make: Callable[[World, int], Iterator[Outcome]], world: World, n: int) -> dict:
    """Make n faults of a kind. Print their row of the table, and each that was not survived."""
    # its thread might hold a lock that a fork takes along
    start = time.monotonic()
    outcomes = []
    tqdm.monitor_interval = 0
    with tqdm(make(world, n), kind, n, leave=False, disable=None) as bar:
        for outcome in bar:
            outcomes.append(outcome)
            bar.set_postfix_str(f"{outcome.verdict}: {outcome.where}")
    counts = {
        verdict: sum(o.verdict == verdict for o in outcomes)
        for verdict in ("survived", "lost", "silent")
    }
    where = Counter(o.where for o in outcomes)
    told = (
        ", ".join(f"{name} {count}" for name, count in where.items())
        if len(where) <= 10
        else "each another place"
    )
    slowest = max((o.seconds for o in outcomes if o.seconds is not None), default=None)
    told += f"; all ended within {slowest:.1f} s" if slowest is not None else ""
    print(
        f"{kind:<27}{len(outcomes):>5}{counts['survived']:>10}{counts['lost']:>7}"
        f"{counts['silent']:>8}{time.monotonic() - start:>9.0f}  {told}",
        flush=True,
    )
    for o in outcomes:
        if o.note or o.verdict != "survived":
            print(f"    {o.verdict}: {o.where}: {o.note}", flush=True)
    return dict(
        name=f"{kind}: survived of {n}",
        value=counts["survived"],
        bar=n,
        ok=counts["survived"] == n == len(outcomes),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
