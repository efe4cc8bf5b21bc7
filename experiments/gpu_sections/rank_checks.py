"""Several ranks: NCCL against gloo, how much of it is hidden, what a killed rank leaves.

`--tiny` runs the same jobs on two ranks of the CPU, joined by gloo: that shows that the checks work
and says nothing about NCCL.

Expected (from the documentation of NCCL and torch, and not measured): gradients as by gloo up to
the order of sums, and most of the communication hidden between GPUs that NVLink joins. A killed
rank leaves the other inside a collective, which NCCL's watchdog ends by SIGABRT (exit code -6)
after run.collective_timeout. gloo raises at once: the other rank names the one that is gone and
ends with 3.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as td
from gpu_sections.report import CannotRun, Report
from gpu_sections.run_checks import MSRD, write_first_queries
from gpu_sections.setting import (
    ROOT,
    Setting,
    Work,
    attribute_set,
    load_benchmark,
    make_random_policy,
    relative_error,
    run_python,
)

from recr1.config.schema import Config, SamplingConfig
from recr1.distributed import collectives as dist
from recr1.rl.losses import resolve_objective
from recr1.rl.policy_loss import compute_policy_loss
from recr1.train import make_updates

RANKS = 2
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
GRADIENT_JOB = "tests/helpers/rank_jobs.py"
OVERLAP_JOB = "experiments/gpu_sections/overlap_job.py"
ON_CPUS = dict(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")

# Relative, by what a case computes in; the cases are those of tests/runs/test_ranks.py.
GRADIENT_BARS = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 5e-2}

TIMEOUT = 20  # run.collective_timeout of the run whose rank is killed


def choose_ranks_place(setting: Setting) -> dict[str, str]:
    """Return the environment of the ranks; raise CannotRun without a second GPU."""
    if setting.tiny:
        return ON_CPUS
    if not setting.has_gpu or torch.cuda.device_count() < RANKS:
        raise CannotRun(f"needs {RANKS} GPUs, {torch.cuda.device_count()} here")
    return {}


# --- one GPU --------------------------------------------------------------------------------------


def check_one_rank(report: Report, setting: Setting) -> None:
    """Gradients through NCCL's all-gather and reduce-scatter of one rank: as without them."""
    if not setting.has_real_gpu:
        raise CannotRun("NCCL needs a GPU")
    work = Work(prompts=2, group=12, prompt=64, completion=128)
    want = compute_gradients(setting, work)
    td.init_process_group("cpu:gloo,cuda:nccl", store=td.HashStore(), rank=0, world_size=1)
    try:
        with (
            attribute_set(dist, "start_all_gather", make_starter(td.all_gather_into_tensor)),
            attribute_set(dist, "start_reduce_scatter", make_starter(td.reduce_scatter_tensor)),
        ):
            actual = compute_gradients(setting, work)
    finally:
        td.destroy_process_group()
    largest = max(relative_error(a, b) for a, b in zip(actual, want, strict=True))
    # Only atomic sums, in attention's backward and in index_select's, may be of another order.
    report.at_most("0.5B: gradients differ by", largest, 1e-2)


def make_starter(collective: Callable) -> Callable:
    """Return a start of the collective among one rank: what it reads and writes is as long."""

    def start(source: torch.Tensor) -> Callable[[], torch.Tensor]:
        out = torch.full_like(source, float("nan"))
        work = collective(out, source, async_op=True)

        def wait() -> torch.Tensor:
            work.wait()
            return out

        return wait

    return start


def compute_gradients(setting: Setting, work: Work) -> list[torch.Tensor]:
    """Compute the gradient of each shard in one optimizer step of 0.5B."""
    torch.manual_seed(0)
    policy = make_random_policy(setting, "0.5B")
    cfg = Config(sampling=SamplingConfig(group_size=work.group, max_new_tokens=work.completion))
    objective = resolve_objective(cfg.loss, cfg.model)
    rollouts = load_benchmark("mfu").make_rollouts(setting.reachable, work)
    advantages = torch.tensor([1.0, -1.0]).repeat(len(rollouts))[: len(rollouts)]
    [update] = make_updates(policy, None, rollouts, advantages, cfg, objective.agg_mode)
    for batch in update.micro_batches:
        loss = compute_policy_loss(policy, batch, update.denominator, 1.0, objective)
        loss.value.backward()
    return [group.shard.grad.clone() for group in policy.units]


# --- two GPUs -------------------------------------------------------------------------------------


def check_gradients_of_two_ranks(report: Report, setting: Setting) -> None:
    """Gradients of every case of the tests on two ranks: NCCL on GPUs against gloo on CPUs."""
    place = choose_ranks_place(setting)
    by_gloo = compute_cases(setting, "gloo", ON_CPUS, LAUNCH)
    if setting.tiny:  # no GPUs: against a process alone
        by_nccl = compute_cases(setting, "alone", ON_CPUS, [*LAUNCH[:-1], "1"])
    else:
        by_nccl = compute_cases(setting, "nccl", place, LAUNCH)

    errors = dict.fromkeys(GRADIENT_BARS, 0.0)
    num_cases = dict.fromkeys(GRADIENT_BARS, 0)
    for case, want in by_gloo.items():
        kind = case.split(",")[0].split(" ")[0]
        if kind not in GRADIENT_BARS or not isinstance(want, dict):
            continue
        num_cases[kind] += 1
        for name, tensor in want.items():
            if name.startswith("grad "):
                errors[kind] = max(errors[kind], relative_error(by_nccl[case][name], tensor))
    for kind, bar in GRADIENT_BARS.items():
        report.figure(f"{kind}: cases", num_cases[kind])
        report.at_most(f"{kind}: gradients differ by at most", errors[kind], bar)


def compute_cases(
    setting: Setting, name: str, env: dict[str, str], launch: list[str]
) -> dict[str, dict[str, torch.Tensor]]:
    """Run the tests' job on these ranks and return {case: {name: tensor}}."""
    path = setting.folder / f"{name}.pt"
    result = run_python([*launch, GRADIENT_JOB, str(path)], timeout=300, **env)
    if result.returncode != 0:
        raise RuntimeError(f"{GRADIENT_JOB}, {name}: {result.stderr[-2000:]}")
    return torch.load(path, weights_only=True, map_location="cpu")


def measure_overlap(report: Report, setting: Setting) -> None:
    """How much of the all-gathers and reduce-scatters of two ranks is hidden behind computation."""
    place = choose_ranks_place(setting)
    path = setting.folder / "overlap.json"
    arguments = [*LAUNCH, OVERLAP_JOB, str(path), *["--tiny"] * setting.tiny]
    result = run_python(arguments, timeout=200, **place)
    if result.returncode != 0:
        raise RuntimeError(f"{OVERLAP_JOB}: {result.stderr[-2000:]}")
    seconds = json.loads(path.read_text(encoding="utf-8"))
    for name, value in seconds.items():
        report.figure(f"{name}: s", value)
    exposed = max(0.0, seconds["together"] - seconds["computation alone"])
    hidden = 1 - exposed / seconds["communication alone"]
    report.figure("share of the communication that is hidden", hidden)


# --- a rank that is gone --------------------------------------------------------------------------


def check_killed_rank(report: Report, setting: Setting) -> None:
    """One of two ranks is killed in training: the other ends, by which exit code, after how long.

    The ranks are started one by one, not by torchrun, which would end the second one itself.
    """
    place = choose_ranks_place(setting)
    folder = setting.folder / "killed"
    ranks = start_ranks(folder, setting, place)
    try:
        wait_for_training(folder, ranks)
        ranks[1].send_signal(signal.SIGKILL)
        began = time.perf_counter()
        _, error = ranks[0].communicate(timeout=TIMEOUT + 60)
        seconds = time.perf_counter() - began
    finally:
        for rank in ranks:
            rank.kill()
    lines = [line for line in error.splitlines() if line.strip()]
    report.figure("the last line of the rank that is left", lines[-1][:200] if lines else "")
    report.figure("exit code of the rank that is left", ranks[0].returncode)
    report.at_most("s until it has ended", seconds, TIMEOUT + 30.0)
    report.at_least("it ends with an error (1: yes)", int(ranks[0].returncode != 0), 1)


def start_ranks(folder: Path, setting: Setting, env: dict[str, str]) -> list[subprocess.Popen]:
    """Start a run of the quickstart on two ranks."""
    argv = [
        "-m",
        "recr1.train",
        str(ROOT / "experiments/quickstart.yaml"),
        f"model.path={ROOT / 'experiments/policy'}",
        f"data.corpus={MSRD / 'corpus.jsonl.gz'}",
        f"run.dir={folder}",
        "run.threads=1",
        f"run.collective_timeout={TIMEOUT}",
        f"retriever.index_dir={setting.folder / 'index'}",
        "train.steps=100000",
        "train.prompts_per_step=8",
        "train.eval_every=0",
        *write_first_queries(setting.folder, 16),
    ]
    port = find_free_port()
    ranks = []
    for rank in range(RANKS):
        of_torchrun = dict(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(RANKS),
            LOCAL_WORLD_SIZE=str(RANKS),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        process = subprocess.Popen(
            [sys.executable, *argv],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | env | of_torchrun,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        ranks.append(process)
    return ranks


def find_free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for_training(folder: Path, ranks: list[subprocess.Popen], limit: float = 120) -> None:
    """Wait until the run has done its third step."""
    deadline = time.monotonic() + limit
    metrics = folder / "metrics.jsonl"
    while True:
        if metrics.exists() and metrics.read_text(encoding="utf-8").count("\n") >= 3:
            return
        for number, rank in enumerate(ranks):
            if rank.poll() is not None:
                assert rank.stderr is not None
                raise RuntimeError(f"rank {number} ended: {rank.stderr.read()[-1000:]}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"no third step after {limit:g} s")
        time.sleep(0.2)
