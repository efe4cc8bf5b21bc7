"""The files that a run leaves behind: metrics.jsonl, rollouts.jsonl.gz, and JSON files."""

from __future__ import annotations

import gzip
import json
import os
import time
from collections.abc import Iterator
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
    """Appends to the files of one run folder; everything is on disk when a call returns.

    Rank 0's object writes, the others' only keep time.
    """

    def __init__(self, folder: Path, loop: str = "train"):
        self.folder = folder
        self.writes = dist.rank() == 0
        self.growing = ["metrics.jsonl"]  # files that are appended to
        if loop == "train":
            self.growing.append("rollouts.jsonl.gz")
        # of the step: seconds and peaks of memory, in use and reserved (on a GPU), by phase
        self.seconds: dict[str, float] = {}
        self.memory: dict[str, int] = {}
        self.memory_reserved: dict[str, int] = {}
        # of the run
        self.run_gaps = LogpDiffHistogram()
        self.peaks: dict[str, int] = {}
        self.reserved_peaks: dict[str, int] = {}
        self.peaks_of = ""  # what the peaks are measured on
        self.sampled = 0  # tokens
        self.sampling_s = 0.0

    # --- Time and memory -------------------------------------------------------------------------

    @contextmanager
    def time_phase(self, name: str) -> Iterator[None]:
        """Add the block's wall seconds to this step's, and keep its peak of memory.

        The rank's heartbeat names the phase.
        """
        heartbeat.enter_phase(name)
        start = time.perf_counter()
        try:
            with self.track_peak(name):
                yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    @contextmanager
    def track_peak(self, name: str) -> Iterator[None]:
        """Keep the block's peaks of memory on this rank: the largest of a name in step and run."""
        self.peaks_of = memory.restart_peak()
        yield
        peak = memory.measure_peak()
        for peaks in (self.memory, self.peaks):
            peaks[name] = max(peaks.get(name, 0), peak)
        reserved = memory.measure_reserved_peak()
        if reserved is not None:
            for peaks in (self.memory_reserved, self.reserved_peaks):
                peaks[name] = max(peaks.get(name, 0), reserved)

    def close_step(self, row: dict, gaps: LogpDiffHistogram) -> dict:
        """Complete the step's row: log-prob gap, tokens/s, seconds and memory by phase.

        The seconds and the memory then start anew.
        """
        num_tokens = row.pop("tokens")
        sampling_s = self.seconds.get("sample", 0.0)  # 0 in a replay
        self.sampled = self.sampled + num_tokens * (sampling_s > 0)
        self.sampling_s = self.sampling_s + sampling_s
        self.run_gaps.merge(gaps)
        speed = dict(
            rollout_tokens_per_s=num_tokens / sampling_s if sampling_s else None,
            reward_wait_frac=self.seconds.get("reward", 0.0) / self.seconds["step"],
        )
        return self.add_timings(row | gaps.figures() | speed)

    def add_timings(self, row: dict) -> dict:
        """Add the step's seconds and memory by phase to the row; they then start anew."""
        row |= dict(timing_s=self.seconds, memory=self.memory)
        if self.memory_reserved:
            row |= dict(memory_reserved=self.memory_reserved)
        self.seconds = {}
        self.memory = {}
        self.memory_reserved = {}
        return row

    def summarize_sampling(self) -> dict[str, float | None]:
        """Return the figures of the whole run's sampling, for summary.json."""
        tokens_per_s = self.sampled / self.sampling_s if self.sampling_s else None
        return dict(rollout_tokens_per_s=tokens_per_s, **self.run_gaps.figures())

    # --- Files -----------------------------------------------------------------------------------

    def write_metrics(self, row: dict) -> None:
        """Append a line to metrics.jsonl."""
        path = self.folder / "metrics.jsonl"
        with report_write_errors(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def write_rollouts(self, rows: list[dict]) -> None:
        """Append to rollouts.jsonl.gz, one gzip member per call: a torn tail costs one step."""
        text = _format_jsonl(rows).encode("utf-8", "surrogatepass")
        path = self.folder / "rollouts.jsonl.gz"
        with report_write_errors(path), open(path, "ab") as file:
            file.write(gzip.compress(text, compresslevel=6, mtime=0))

    def write_rows(self, name: str, rows: list[dict]) -> None:
        """Write a JSONL file, all rows or none, on rank 0."""
        if self.writes:
            write_text(self.folder / name, _format_jsonl(rows))

    def write_json(self, name: str, value: dict) -> None:
        """Write a JSON file."""
        write_text(self.folder / name, json.dumps(value, indent=2) + "\n")

    # --- Steps that are not finite ---------------------------------------------------------------

    def keep_nonfinite(
        self, step: int, batches: list[MicroBatch], losses: list[float], texts: list[dict]
    ) -> str:
        """Keep this rank's batches of a step that was not finite, with their losses and texts.

        A collective. Returns the part of a sentence that says where they are.
        """
        root = self.folder / "nonfinite"
        folder = root / f"step_{step:06d}"
        is_full = not folder.exists() and _count_entries(root) >= MAX_KEPT_NONFINITE_STEPS
        if dist.broadcast_from_rank0(is_full):
            return f"its batches are not kept, {root} has those of {MAX_KEPT_NONFINITE_STEPS} steps"

        name = f"rank_{dist.rank():05d}"
        description = dict(step=step, rank=dist.rank(), losses=losses, texts=texts)
        tensors = _collect_tensors(batches)
        has_failed = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, folder / f"{name}.safetensors")
            write_text(folder / f"{name}.json", json.dumps(description) + "\n")
        except (OSError, WriteError, SafetensorError):
            has_failed = 1
        outcome = "could not be written to" if dist.all_reduce_max(has_failed) else "are in"
        return f"its batches {outcome} {folder}"

    # --- Resuming --------------------------------------------------------------------------------

    def state(self) -> dict:
        """Return what a resumed run goes on from.

        The length in bytes of the files that grow, which are forced onto the disk, and the counters
        of the whole run.
        """
        ends = {}
        for name in self.growing:
            sync_to_disk(self.folder / name)
            ends[name] = (self.folder / name).stat().st_size
        return dict(
            ends=ends, gaps=self.run_gaps.state(), sampled=self.sampled, sampling_s=self.sampling_s
        )

    def check(self, state: dict) -> None:
        """Raise ValueError unless the files are at least as long as `state` says."""
        LogpDiffHistogram.restored(state["gaps"])
        for name in self.growing:
            path = self.folder / name
            size = path.stat().st_size if path.exists() else 0
            if not 0 <= state["ends"][name] <= size:
                raise ValueError(f"{name} is shorter than it was then; the log has lost rows")

    def restore(self, state: dict | None) -> None:
        """Cut the files back to the lengths of `state`; None: to nothing."""
        if state:
            self.run_gaps = LogpDiffHistogram.restored(state["gaps"])
            self.sampled = state["sampled"]
            self.sampling_s = state["sampling_s"]
        for name in self.growing:
            path = self.folder / name
            if self.writes and path.exists():
                os.truncate(path, state["ends"][name] if state else 0)


def _format_jsonl(rows: list[dict]) -> str:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    return "".join(lines)


def _count_entries(folder: Path) -> int:
    return len(list(folder.iterdir())) if folder.exists() else 0


def _collect_tensors(batches: list[MicroBatch]) -> dict[str, torch.Tensor]:
    """Return the tensors of all batches by the names NUMBER.FIELD, in host memory."""
    tensors = {}
    for number, batch in enumerate(batches):
        fields = vars(batch) | batch.layout._asdict()
        for name, value in fields.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{number}.{name}"] = value.detach().cpu().contiguous()
    return tensors
