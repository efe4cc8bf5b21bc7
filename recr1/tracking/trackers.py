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

# send(values, step), close()
Opened = tuple[Callable[[dict[str, float], int], None], Callable[[], None]]


def open_tensorboard(folder: Path, id: str, config: dict) -> Opened:
    """Event files in run.dir/tensorboard: tensorboard --logdir runs."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def send(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return send, writer.close


def open_wandb(folder: Path, id: str, config: dict) -> Opened:
    """A run of the project recr1, files in run.dir/wandb; WANDB_MODE, WANDB_PROJECT and the like
    are wandb's own.
    """
    import wandb

    run = wandb.init(
        project="recr1", id=id, name=folder.name, dir=str(folder), config=config, resume="allow"
    )
    return lambda values, step: run.log(values, step=step, commit=True), run.write_results


def open_trackio(folder: Path, id: str, config: dict) -> Opened:
    """A run of the project recr1 in Trackio's own folder. It resumes by name, so the name holds the
    id.
    """
    import trackio

    run = trackio.init(
        project="recr1", name=f"{folder.name}-{id}", config=config, resume="allow", embed=False
    )
    return lambda values, step: run.log(values, step=step), run.write_results


# The names are those of the config: log.track.
OPENERS = {"tensorboard": open_tensorboard, "wandb": open_wandb, "trackio": open_trackio}


class Tracker:
    """`send` a row of metrics.jsonl, `close` at the end; with log.track: none both do nothing.
    Raises ConfigError where it cannot start.
    """

    def __init__(self, cfg: Config, folder: Path):
        self.kind = cfg.log.track
        self.note = folder / "tracked.json"
        self.open = False
        if self.kind == "none" or dist.rank() > 0:
            return
        self.id, self.last = self._begun()
        try:
            self._send, self._close = OPENERS[self.kind](folder, self.id, dataclasses.asdict(cfg))
        except ImportError as e:
            raise ConfigError(
                f"log.track: {self.kind} cannot be imported ({describe_exception(e)}); pip install {PACKAGES[self.kind]}, or set log.track=none"
            ) from None
        except Exception as e:  # whatever it raises: no login, no network, no disk
            raise ConfigError(
                f"log.track: {self.kind} did not start: {describe_exception(e)}; mend that, or set log.track=none"
            ) from None
        self.open = True

    def _begun(self) -> tuple[str, int]:
        """The id that an earlier start of this run has sent under and its last step, or a new one
        and 0.
        """
        try:
            note = read_json(self.note) if self.note.exists() else {}
            if note.get("tracker") == self.kind:
                return str(note["id"]), int(note["step"])
        except (OSError, Damaged, AttributeError, KeyError, TypeError, ValueError):
            raise ConfigError(
                f"log.track: {self.note} is damaged; remove it, and {self.kind} begins a new run with the next step"
            ) from None
        return secrets.token_hex(4), 0

    def send(self, row: dict) -> None:
        """A row of metrics.jsonl, unless its step was sent before. Never raises."""
        if not self.open or row["step"] <= self.last:
            return
        self._guarded(f"at step {row['step']}", lambda: self._once(row))

    def _once(self, row: dict) -> None:
        # noted first: a kill in between costs the tracker one step, the other way round it would
        # have it twice
        write_text(
            self.note, json.dumps(dict(tracker=self.kind, id=self.id, step=row["step"])) + "\n"
        )
        self.last = row["step"]
        self._send(
            flatten_row({name: value for name, value in row.items() if name != "step"}), row["step"]
        )

    def close(self) -> None:
        """Waits until what is under way is sent, as the packages do themselves when a process ends
        without this. Never raises.
        """
        if self.open:
            self._guarded("at the end", self._close)
        self.open = False

    def _guarded(self, when: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as e:  # somebody else's code, network and disk: no reason to lose a run
            self.open = False
            print_rank0(
                f"recr1: log.track: {self.kind} failed {when}: {describe_exception(e)}; the run goes on without it, metrics.jsonl has every step"
            )


def flatten_row(row: dict | list, where: str = "") -> dict[str, float]:
    """{"seconds": {"step": 1}, "ci": [0, 2]} -> {"seconds/step": 1, "ci/0": 0, "ci/1": 2}; a null
    has no value to send and is left out.
    """
    found = {}
    for name, value in row.items() if isinstance(row, dict) else enumerate(row):
        if isinstance(value, (dict, list)):
            found |= flatten_row(value, f"{where}{name}/")
        elif value is not None:
            found[f"{where}{name}"] = value
    return found
