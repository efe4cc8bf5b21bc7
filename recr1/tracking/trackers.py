"""log.track: the rows of metrics.jsonl sent to TensorBoard, Weights & Biases or Trackio too, under
the same names; rank 0 only.

A tracker that is not installed or does not start is an error before training. One that fails later
is said once and left alone: the run's own files have everything. A step is sent once: tracked.json
in run.dir names the last one, so a resumed run does not send again what it does again.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
from pathlib import Path
from typing import Callable

from recr1.config.schema import Config, ConfigError
from recr1.distributed import collectives as dist
from recr1.distributed.printing import print_rank0
from recr1.utils.files import Damaged, read_json, write_text
from recr1.utils.terminal import describe_exception

# what pip installs
PACKAGES = {"tensorboard": "'recr1[track]'", "wandb": "wandb", "trackio": "trackio"}

# what an opener returns: send(values, step) and close()
SendAndClose = tuple[Callable[[dict[str, float], int], None], Callable[[], None]]


def open_tensorboard(folder: Path, id: str, config: dict) -> SendAndClose:
    """Write event files into run.dir/tensorboard: tensorboard --logdir runs."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def send(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return send, writer.close


def open_wandb(folder: Path, id: str, config: dict) -> SendAndClose:
    """Start or resume a run of the project recr1, with its files in run.dir/wandb.

    WANDB_MODE, WANDB_PROJECT and the like are wandb's own.
    """
    import wandb

    run = wandb.init(
        project="recr1", id=id, name=folder.name, dir=str(folder), config=config, resume="allow"
    )

    def send(values: dict[str, float], step: int) -> None:
        run.log(values, step=step, commit=True)

    return send, run.finish


def open_trackio(folder: Path, id: str, config: dict) -> SendAndClose:
    """Start or resume a run of the project recr1 in Trackio's own folder.

    Trackio resumes by name, so the name holds the id.
    """
    import trackio

    run = trackio.init(
        project="recr1", name=f"{folder.name}-{id}", config=config, resume="allow", embed=False
    )

    def send(values: dict[str, float], step: int) -> None:
        run.log(values, step=step)

    return send, run.finish


# The names are those of the config: log.track.
OPENERS = {"tensorboard": open_tensorboard, "wandb": open_wandb, "trackio": open_trackio}


class Tracker:
    """Sends the rows of metrics.jsonl to log.track; with none all its methods do nothing.

    Raises ConfigError where the tracker cannot start.
    """

    def __init__(self, cfg: Config, folder: Path):
        self.kind = cfg.log.track
        self.note = folder / "tracked.json"  # under which id, and the last step that was sent
        self.open = False
        if self.kind == "none" or dist.rank() > 0:
            return
        self.id, self.last = self._read_note()
        try:
            self._send, self._close = OPENERS[self.kind](folder, self.id, dataclasses.asdict(cfg))
        except ImportError as e:
            raise ConfigError(
                f"log.track: {self.kind} cannot be imported ({describe_exception(e)}); "
                f"pip install {PACKAGES[self.kind]}, or set log.track=none"
            ) from None
        except Exception as e:  # whatever it raises: no login, no network, no disk
            raise ConfigError(
                f"log.track: {self.kind} did not start: {describe_exception(e)}; "
                "mend that, or set log.track=none"
            ) from None
        self.open = True

    def _read_note(self) -> tuple[str, int]:
        """Read the id that an earlier start has sent under, and its last step; else a new id, 0."""
        try:
            note = read_json(self.note) if self.note.exists() else {}
            if note.get("tracker") == self.kind:
                return str(note["id"]), int(note["step"])
        except (OSError, Damaged, AttributeError, KeyError, TypeError, ValueError):
            raise ConfigError(
                f"log.track: {self.note} is damaged; remove it, "
                f"and {self.kind} begins a new run with the next step"
            ) from None
        return secrets.token_hex(4), 0

    def send(self, row: dict) -> None:
        """Send a row of metrics.jsonl, unless its step was sent before. Never raises."""
        step = row["step"]
        if self.open and step > self.last:
            self._run_guarded(f"at step {step}", lambda: self._note_and_send(row))

    def _note_and_send(self, row: dict) -> None:
        step = row["step"]
        # The note comes first: a kill in between costs the tracker one step, the other way round it
        # would have the step twice.
        note = dict(tracker=self.kind, id=self.id, step=step)
        write_text(self.note, json.dumps(note) + "\n")
        self.last = step
        values = {name: value for name, value in row.items() if name != "step"}
        self._send(flatten_row(values), step)

    def close(self) -> None:
        """Wait until all is sent, as the packages do at the end of a process. Never raises."""
        if self.open:
            self._run_guarded("at the end", self._close)
        self.open = False

    def _run_guarded(self, when: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as e:  # somebody else's code, network and disk: no reason to lose a run
            self.open = False
            print_rank0(
                f"recr1: log.track: {self.kind} failed {when}: {describe_exception(e)}; "
                "the run goes on without it, metrics.jsonl has every step"
            )


def flatten_row(row: dict | list, prefix: str = "") -> dict[str, float]:
    """Flatten nested values to names with slashes.

    {"timing_s": {"step": 1}, "ci": [0, 2]} -> {"timing_s/step": 1, "ci/0": 0, "ci/1": 2}; a null
    has no value to send and is left out.
    """
    items = row.items() if isinstance(row, dict) else enumerate(row)
    flat: dict[str, float] = {}
    for name, value in items:
        if isinstance(value, (dict, list)):
            flat |= flatten_row(value, f"{prefix}{name}/")
        elif value is not None:
            flat[f"{prefix}{name}"] = value
    return flat
