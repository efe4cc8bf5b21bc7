"""What a run leaves behind: metrics.jsonl, rollouts.jsonl.gz, JSON files, and one readable console
line per step.
"""

from __future__ import annotations

import gzip
import json
import os
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from recr1.data_types import MicroBatch
from recr1.distributed import collectives as dist, heartbeat
from recr1.memory import measure as memory
from recr1.tracking.logprob_gap import LogpDiffHistogram
from recr1.utils.files import WriteError, report_write_errors, sync_to_disk, write_text

MAX_KEPT_NONFINITE_STEPS = 5  # steps whose batches are kept


class RunLog:
    """Appends to the files of one run folder; everything is on disk when a call returns. Rank 0's
    object writes, the others' only keep time.
    """

    def __init__(self, folder: Path, loop: str = "train"):
        self.folder = folder
        self.writes = dist.rank() == 0
        self.growing = (
            ("metrics.jsonl", "rollouts.jsonl.gz") if loop == "train" else ("metrics.jsonl",)
        )
        self.run_gaps = LogpDiffHistogram()
        self.seconds: dict[str, float] = {}
        self.memory: dict[str, int] = {}
        self.peaks = {}
        self.peaks_of = ""
        self.sampled = 0
        self.sampling_s = 0.0

    @contextmanager
    def time_phase(self, name: str):
        """Adds the block's wall seconds to this step's `seconds` and keeps its peak of memory; the
        rank's heartbeat names it.
        """
        heartbeat.enter_phase(name)
        start = time.perf_counter()
        try:
            with self.track_peak(name):
                yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    @contextmanager
    def track_peak(self, name: str):
        """Keeps the block's peak of this rank's memory: the step's and the run's largest of that
        name.
        """
        self.peaks_of = memory.restart_peak()
        yield
        most = memory.measure_peak()
        for kept in (self.memory, self.peaks):
            kept[name] = max(kept.get(name, 0), most)

    def close_step(self, row: dict, gaps: LogpDiffHistogram) -> dict:
        """The step's row with its log-prob gap, tokens/s, and seconds and memory by phase, which
        then start anew.
        """
        # no seconds in a replay
        tokens = row.pop("tokens")
        sampling_s = self.seconds.get("sample", 0.0)
        self.sampled = self.sampled + tokens * (sampling_s > 0)
        self.sampling_s = self.sampling_s + sampling_s
        self.run_gaps.merge(gaps)
        return self.add_timings(
            row
            | gaps.figures()
            | dict(
                rollout_tokens_per_s=tokens / sampling_s if sampling_s else None,
                reward_wait=self.seconds.get("reward", 0.0) / self.seconds["step"],
            )
        )

    def add_timings(self, row: dict) -> dict:
        """The row with the step's seconds and memory by phase, which then start anew."""
        row |= dict(seconds=self.seconds, memory=self.memory)
        self.seconds = {}
        self.memory = {}
        return row

    def write_metrics(self, row: dict) -> None:
        path = self.folder / "metrics.jsonl"
        with report_write_errors(path), open(path, "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")

    def write_rollouts(self, rows: list[dict]) -> None:
        """One gzip member per call: a torn tail costs one step."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path = self.folder / "rollouts.jsonl.gz"
        with report_write_errors(path), open(path, "ab") as f:
            f.write(gzip.compress(text.encode("utf-8", "surrogatepass"), compresslevel=6, mtime=0))

    def write_rows(self, name: str, rows: list[dict]) -> None:
        """All of them or none, on rank 0."""
        if self.writes:
            write_text(
                self.folder / name,
                "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
            )

    def write_json(self, name: str, value: dict) -> None:
        write_text(self.folder / name, json.dumps(value, indent=2) + "\n")

    def keep_nonfinite(
        self, step: int, batches: list[MicroBatch], losses: list[float], texts: list[dict]
    ) -> str:
        """Keeps this rank's batches of a step that was not finite, with their losses and texts; all
        ranks. Says where.
        """
        root = self.folder / "nonfinite"
        own = f"rank_{dist.rank():05d}"
        folder = root / f"step_{step:06d}"
        if dist.broadcast_from_rank0(
            not folder.exists()
            and root.exists()
            and len(list(root.iterdir())) >= MAX_KEPT_NONFINITE_STEPS
        ):
            return f"its batches are not kept, {root} has those of {MAX_KEPT_NONFINITE_STEPS} steps"
        tensors = {
            f"{i}.{name}": t.detach().cpu().contiguous()
            for i, b in enumerate(batches)
            for name, t in (vars(b) | b.layout._asdict()).items()
            if isinstance(t, torch.Tensor)
        }
        failed = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, folder / f"{own}.safetensors")
            write_text(
                folder / f"{own}.json",
                json.dumps(dict(step=step, rank=dist.rank(), losses=losses, texts=texts)) + "\n",
            )
        except (OSError, WriteError, SafetensorError):
            failed = 1
        return f"its batches {'could not be written to' if dist.all_reduce_max(failed) else 'are in'} {folder}"

    def state(self) -> dict:
        """What a resumed run goes on from: the length in bytes of the files that grow, forced onto
        the disk, and the counters of the whole run.
        """
        ends = {}
        for name in self.growing:
            sync_to_disk(self.folder / name)
            ends[name] = (self.folder / name).stat().st_size
        return dict(
            ends=ends, gaps=self.run_gaps.state(), sampled=self.sampled, sampling_s=self.sampling_s
        )

    def check(self, state: dict) -> None:
        """Raises ValueError unless the files here are at least as long as `state` says."""
        LogpDiffHistogram.restored(state["gaps"])
        for name in self.growing:
            path = self.folder / name
            end = state["ends"][name]
            if not 0 <= end <= (path.stat().st_size if path.exists() else 0):
                raise ValueError(f"{name} is shorter than it was then; the log has lost rows")

    def restore(self, state: dict | None) -> None:
        """Cuts the files back to where they stood; None: to nothing."""
        if state:
            self.run_gaps = LogpDiffHistogram.restored(state["gaps"])
            self.sampled = state["sampled"]
            self.sampling_s = state["sampling_s"]
        for name in self.growing:
            if self.writes and (self.folder / name).exists():
                os.truncate(self.folder / name, state["ends"][name] if state else 0)
