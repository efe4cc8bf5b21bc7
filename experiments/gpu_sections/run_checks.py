"""Whole runs by the program itself: dry runs of the paper's configs, and a training that learns."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import torch
from gpu_sections.report import Report
from gpu_sections.setting import ROOT, Setting, load_benchmark, run_python

from recr1 import sft, train
from recr1.data.readers import is_validation
from recr1.training.launch import run_guarded

PAPER_CONFIG = str(ROOT / "experiments/configs/rec_r1/esci_bm25_3b.yaml")
SFT_CONFIG = str(ROOT / "experiments/configs/rec_r1/esci_sft_3b.yaml")
ON_HOST = ["optimizer.cpu_offload=true", "loss.reference_cpu_offload=true"]
MSRD = ROOT / "experiments/data/msrd"


def run_in_process(main: Callable[[list[str]], None], argv: list[str]) -> int:
    """Run a loop's command line here and return its exit code; torch keeps its threads."""
    threads = torch.get_num_threads()
    try:
        return run_guarded(main, argv)
    finally:
        torch.set_num_threads(threads)


def check_dry_runs(report: Report, setting: Setting) -> None:
    """Dry runs of the paper's configs: GRPO, SFT, state in host memory, stream sanitizer."""
    runs: dict[str, tuple[Callable[[list[str]], None], list[str]]] = {}
    for kernels in setting.kernels:
        runs[f"GRPO, {kernels}"] = (train.main, [PAPER_CONFIG, f"model.kernels={kernels}"])
    fastest = f"model.kernels={setting.fastest_kernels}"
    runs["GRPO, state in host memory"] = (train.main, [PAPER_CONFIG, fastest, *ON_HOST])
    runs["SFT"] = (sft.main, [SFT_CONFIG, fastest])
    for name, (main, argv) in runs.items():
        code = run_in_process(main, [*argv, "--dry-run"])
        report.equals(f"{name}: exit code", code, 0)

    name = "GRPO in host memory under TORCH_CUDA_SANITIZER=1"
    if not setting.has_real_gpu:
        report.skip(name, "it watches CUDA's streams, and there are none")
        return
    arguments = ["-m", "recr1.train", PAPER_CONFIG, *ON_HOST, "--dry-run"]
    result = run_python(arguments, timeout=150, TORCH_CUDA_SANITIZER="1")
    if result.returncode != 0:
        print(result.stdout[-4000:], result.stderr[-4000:])
    report.equals(f"{name}: exit code", result.returncode, 0)


# The settings of the walk-through's training (experiments/walkthrough), which learns on a CPU.
LEARNING = [
    "data.shuffle_words=0",
    "optimizer.lr=5e-4",
    "optimizer.warmup_steps=5",
    "train.eval_every=0",
    "save.every=0",
    "log.print_every=10",
]
GAIN_BAR = 0.05  # of the reward; the walk-through's goes from .458 to .667 in 40 steps on a CPU
WINDOW = 5  # steps over which a reward is averaged


def check_learning(report: Report, setting: Setting) -> None:
    """A short run of the quickstart on a few queries, all in each step: its reward grows."""
    steps = setting.pick(40, 30)
    num_queries = setting.pick(48, 12)
    folder = setting.folder / "learning"
    files = write_first_queries(setting.folder, num_queries)
    argv = [
        str(ROOT / "experiments/quickstart.yaml"),
        f"model.path={ROOT / 'experiments/policy'}",
        f"data.corpus={MSRD / 'corpus.jsonl.gz'}",
        f"run.dir={folder}",
        f"retriever.index_dir={setting.folder / 'index'}",
        f"train.steps={steps}",
        f"run.threads={torch.get_num_threads()}",
        f"train.prompts_per_step={num_queries}",
        f"model.kernels={setting.fastest_kernels}",
        *files,
        *LEARNING,
    ]
    code = run_in_process(train.main, argv)
    report.equals("exit code", code, 0)
    if code != 0:
        return
    rows = []
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        rows.append(json.loads(line))

    rewards = [row["reward"] for row in rows]
    first = mean(rewards[:WINDOW])
    last = mean(rewards[-WINDOW:])
    report.figure(f"reward, first {WINDOW} steps", first)
    report.figure(f"reward, last {WINDOW} steps", last)
    report.at_least(f"reward grows in {steps} steps by", last - first, GAIN_BAR)
    last_row = rows[-1]
    gap = last_row["sampling_logp_diff_mean"]
    report.figure("mean |sampler - trainer| of the last step", gap)
    for phase in ("step", "sample", "train"):
        report.figure(f"last step, {phase}: seconds", last_row["timing_s"][phase])


def write_first_queries(folder: Path, count: int) -> list[str]:
    """Write the quickstart's first train queries, its first test queries and their judgements.

    Those of the validation tenth, which are not trained, are left out. Returns the settings that
    name the files.
    """
    queries: list[str] = []
    ids: set[str] = set()
    for line in (MSRD / "train.queries.jsonl").read_text(encoding="utf-8").splitlines():
        query_id = json.loads(line)["id"]
        if len(queries) < count and not is_validation(query_id):
            queries.append(line)
            ids.add(query_id)
    with gzip.open(MSRD / "train.qrels.tsv.gz", "rt", encoding="utf-8") as file:
        qrels = [line for line in file if line.split("\t")[0] in ids]

    queries_path = folder / "train.queries.jsonl"
    queries_path.write_text("\n".join(queries) + "\n", encoding="utf-8")
    qrels_path = folder / "train.qrels.tsv"
    qrels_path.write_text("".join(qrels), encoding="utf-8")
    test_files = load_benchmark("few_queries").write_few_queries(folder)
    return [f"data.train_queries={queries_path}", f"data.train_qrels={qrels_path}", *test_files]
