"""Print what the product asks of a GPU: PYTHONPATH=.:tests python -m gpu.standin.report WHAT
[MODEL]

waits: where the host waits, as the table MAX_WAITS of check_waits.py.
counts: launches and waits of a decode step and of a micro-batch.
graphs: the share of decode steps that run as CUDA graphs; a sampling at three temperatures.
gap: what bfloat16 makes of a token's log-prob: sampler, trainer and float32 against each other.
Of these two, MODEL is a model folder (default: the bundled policy).
"""

import os
import sys
from collections.abc import Mapping

from gpu.standin.activity import Activity
from gpu.standin.install import install

BUNDLED_POLICY = "experiments/policy"


def print_activity(activity: Activity, title: str) -> None:
    """Print the activity of a run."""
    lines = [f"{title}: {activity.count_launches()} launches, {activity.num_bytes >> 20} MiB"]
    lines.append(f"graphs: {len(activity.captured)} captured, {activity.num_replays} replays")
    for name in ("waits", "async_copies", "host_numbers"):
        counts = getattr(activity, name)
        lines.append(f"{name.replace('_', ' ')}: {counts.total()}")
        for (place, kind), count in counts.most_common():
            lines.append(f"  {count:6} {kind:22} {place}")
    lines.append(f"races: {activity.races.total()}")
    for race, count in activity.races.most_common():
        lines.append(f"  {count:6} {race}")
    print("\n".join(lines), flush=True)


def print_waits() -> None:
    from gpu.standin.workloads import WORKLOADS, count_waits

    tables = {name: count_waits(name) for name in WORKLOADS}
    print("MAX_WAITS = {")
    for name, waits in tables.items():
        print(f'    "{name}": {{')
        for place in sorted(waits):
            print(f'        "{place}": {waits[place]},')
        print("    },")
    print("}")


def print_counts() -> None:
    from gpu.standin.workloads import count_decode_step, count_micro_batch, count_sampling

    one = count_decode_step(1)
    two = count_decode_step(2)
    print(f"decode step: {format_by_layer(one.total(), two.total())}, no wait")
    print(f"  a layer's: {format_difference(one, two)}")

    for sampling in (dict(group_size=4), dict(group_size=1, greedy=True)):
        counts, num_looks = count_sampling(**sampling)
        per_look = counts.waits.total() / num_looks
        print(f"sampling {sampling}: {num_looks} looks at tokens, {per_look:.1f} waits each")

    for loss in ({}, dict(kl_coef=0.001, entropy_coef=0.001)):
        for recompute in (False, True):
            one = count_micro_batch(1, recompute=recompute, **loss)
            two = count_micro_batch(2, recompute=recompute, **loss)
            print(f"micro-batch, loss {loss}, gradient checkpointing {recompute}:")
            for part, first, second in zip(one._fields, one, two):
                by_layer = format_by_layer(first.launches, second.launches)
                print(f"  {part}: {by_layer}, {first.waits.total()} waits")


def format_by_layer(one: int, two: int) -> str:
    """Format the launches of L layers, from those of one and of two."""
    return f"{two - one} launches a layer + {2 * one - two}"


def format_difference(one: Mapping[str, int], two: Mapping[str, int]) -> str:
    differences = {name: two[name] - one.get(name, 0) for name in two}
    by_count = sorted(differences.items(), key=lambda item: -item[1])
    return ", ".join(f"{count} {name}" for name, count in by_count if count)


def print_graph_share(folder: str) -> None:
    from gpu.standin.workloads import count_graph_steps, load_real_policy

    real = load_real_policy(folder, num_prompts=64)
    for temperature in (1.2, 1.0, 0.6):
        steps = count_graph_steps(real, temperature)
        total = sum(steps)
        print(
            f"64 x 8, temperature {temperature}: {total} decode steps, "
            f"{steps.replayed / total:.0%} replayed, {steps.warm_up / total:.0%} warm-ups of "
            f"graphs, {steps.eager / total:.0%} eager",
            flush=True,
        )


def print_gaps(folder: str) -> None:
    import numpy as np
    from gpu.standin.workloads import measure_gaps

    gaps = measure_gaps(folder, num_prompts=16, length=28)
    for name, gap in gaps._asdict().items():
        print(
            f"{name.replace('_', ' - ')}: mean {gap.mean():.5f}, p99 {np.quantile(gap, 0.99):.4f}, "
            f"largest {gap.max():.4f} nats, {len(gap)} tokens"
        )


REPORTS = dict(waits=print_waits, counts=print_counts)
REPORTS_OF_A_MODEL = dict(graphs=print_graph_share, gap=print_gaps)


def main() -> None:
    what, *folders = sys.argv[1:] or [""]
    if what in REPORTS and not folders:
        prepare()
        REPORTS[what]()
    elif what in REPORTS_OF_A_MODEL and len(folders) <= 1:
        prepare()
        REPORTS_OF_A_MODEL[what](*folders or [BUNDLED_POLICY])
    else:
        sys.exit(__doc__)


def prepare() -> None:
    """Give this process the stand-in, before anything imports torch."""
    install()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


if __name__ == "__main__":
    main()
