"""Files that are not what was written: checkpoints that rot or lie, and a disk that is full. Each
function makes n faults.
"""

import json
import os
import pickle
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from alone import Bench, Case, each, expect, refused
from safetensors import safe_open
from world import RANKS, STEPS, Outcome, World

from recr1 import cli, train
from recr1.config import loader as configs
from recr1.retrieval.bm25.index import BM25Index
from recr1.tracking import run_log
from recr1.training import checkpoint, load_model, run

LAST = f"step_{STEPS:06d}"
BEFORE = f"step_{STEPS - 1:06d}"
KINDS = (
    "rank_00000-of-00002.safetensors",
    "rank_00001-of-00002.safetensors",
    "model/model.safetensors",
    "model/config.json",
    "model/tokenizer.json",
    "state.json",
    "manifest.json",
)


def corruptions(world: World, n: int) -> Iterator[Outcome]:
    """The newest checkpoint damaged in one file: it is refused with the file's name, and the one
    before used.
    """
    cases = [*_rot(world), *_lies(world)]
    for case in cases if n >= len(cases) else world.rng.sample(cases, n):
        yield _refused(world, *case)


def _refused(world: World, what: str, named: str, damage: Callable[[Path], None]) -> Outcome:
    """The run goes on from the checkpoint before the damaged one, and one line says which file was
    refused.
    """
    run = world.fresh()
    shutil.copytree(world.unfinished, run)
    damage(run / "checkpoints")
    job, verdict, note = world.finish(run)
    used = LAST if what.startswith("LATEST") else BEFORE
    if (world.folder / "executed").exists():
        verdict = "silent"
        note = "the payload was executed"
    elif verdict == "survived" and not any(
        named in line and "refused" in line for line in job.lines()
    ):
        verdict = "silent"
        note = f"{named!r} is not named: {job.lines()}"
    elif verdict == "survived" and not any(
        used in line and "goes on after step" in line for line in job.lines()
    ):
        verdict = "silent"
        note = f"it did not go on from {used}: {job.lines()}"
    return Outcome(what, verdict, note)


def _rot(world: World):
    """Every kind of file cut short, with one bit changed, gone."""

    def cut(path: Path):
        os.truncate(path, world.rng.randrange(path.stat().st_size))

    def flip(path: Path):
        raw = bytearray(path.read_bytes())
        raw[world.rng.randrange(len(raw))] ^= 1 << world.rng.randrange(8)
        path.write_bytes(raw)

    for kind in KINDS:
        for how, damage in (("cut short", cut), ("one bit", flip), ("gone", Path.unlink)):
            yield (
                f"{kind} {how}",
                LAST if (kind, how) == ("manifest.json", "one bit") else kind,
                lambda root, kind=kind, damage=damage: damage(root / LAST / kind),
            )


def _lies(world: World):
    """What somebody might have put there."""
    payload = _payload(world)
    executed = world.folder / "executed"

    def manifest(change):
        def damage(root: Path):
            path = root / LAST / "manifest.json"
            value = json.loads(path.read_text())
            change(value["files"])
            path.write_text(json.dumps(value))

        return damage

    def rename(to):
        def change(named):
            named[to] = named.pop("state.json")

        return manifest(change)

    def pickled_shard(root: Path):
        (root / LAST / KINDS[0]).write_bytes(payload)

    def linked(root: Path):
        path = root / LAST / KINDS[0]
        path.rename(root.parent / "elsewhere")
        path.symlink_to(root.parent / "elsewhere")

    def linked_folder(root: Path):
        (root / LAST).rename(root.parent / "elsewhere")
        (root / LAST).symlink_to(root.parent / "elsewhere")

    def swapped(root: Path):
        a, b = (root / LAST / kind for kind in KINDS[:2])
        kept = a.read_bytes()
        a.write_bytes(b.read_bytes())
        b.write_bytes(kept)

    def older(root: Path):
        shutil.rmtree(root / LAST)
        shutil.copytree(root / BEFORE, root / LAST)

    def deep(root: Path):
        (root / LAST / "manifest.json").write_text("[" * 100_000)

    yield "manifest: ../../secret", "manifest.json", rename("../../secret")
    yield "manifest: /etc/passwd", "manifest.json", rename("/etc/passwd")
    yield "manifest: nested 100,000 deep", "manifest.json", deep
    yield "a pickle in place of a shard", KINDS[0], pickled_shard
    yield "a shard is a link", KINDS[0], linked
    yield "the folder is a link", LAST, linked_folder
    yield "two shards in each other's place", "rank_0000", swapped
    if not executed.exists():
        yield "an older checkpoint under this name", "state.json", older


def _payload(world: World) -> bytes:
    """A pickle that leaves a file where it is loaded."""

    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {world.folder / 'executed'}",)

    return pickle.dumps(Payload())


def hostile(world: World, n: int) -> Iterator[Outcome]:
    """Checkpoints and model folders of somebody who wants code to run or files outside to be read:
    nothing is executed or followed.
    """
    payload = _payload(world)
    bench = Bench(world, "hostile")

    def pickled(root: Path):
        (
            root
            / LAST
            / world.rng.choice(
                ["optimizer.pt", "model/pytorch_model.bin", "state.pkl", "model/modeling.py"]
            )
        ).write_bytes(payload)

    def pointing(root: Path):
        (root / "LATEST").write_text(
            world.rng.choice(["../../x", "/etc", f"../{root.name}/{BEFORE}", f"{LAST}/../../x"])
            + "\n"
        )

    cases = [
        ("a pickle beside the shards", LAST, pickled),
        ("LATEST leads outside", "LATEST", pointing),
        _model(
            bench,
            "a model of pickles",
            partial(_only_pickles, payload=payload),
            "only safetensors is read",
        ),
        _model(
            bench,
            "an index that leads outside",
            partial(_leads_outside, rng=world.rng),
            "outside the folder",
        ),
    ]
    cases = cases if n >= len(cases) else world.rng.sample(cases, n)
    for case in cases:
        if len(case) == 3:
            yield _refused(world, *case)
    yield from each(world, [case for case in cases if len(case) == 2])


def _model(bench: Bench, where: str, spoil, why: str) -> Case:
    folder = bench.folder / where.replace(" ", "_")
    executed = bench.world.folder / "executed"
    shutil.copytree(bench.world.folder / "policy", folder)
    spoil(folder)

    def case():
        refused(train.main, bench.argv(None, f"model.path={folder}")[0], folder, why)
        refused(
            cli.main,
            ["generate", "--model", folder, "--config", bench.world.config, "red lamp"],
            folder,
            why,
        )
        expect(not executed.exists(), "the payload was executed")

    return where, case


def _only_pickles(folder: Path, payload: bytes) -> None:
    """And code that a loader which trusts the folder would import."""
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(payload)
    (folder / "modeling_own.py").write_text(
        f"import pickle\npickle.loads({payload!r})\nclass Own: pass\n"
    )
    for name, classes in (
        ("config.json", dict(AutoModelForCausalLM="modeling_own.Own")),
        ("tokenizer_config.json", dict(AutoTokenizer=["modeling_own.Own", None])),
    ):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(auto_map=classes)))


def _leads_outside(folder: Path, rng) -> None:
    weights = folder / "model.safetensors"
    elsewhere = weights.rename(folder.parent / "elsewhere.safetensors")
    with safe_open(elsewhere, "pt") as file:
        names = list(file.keys())
    outside = rng.choice(
        [str(elsewhere), "../elsewhere.safetensors", "x/../../elsewhere.safetensors"]
    )
    (folder / "model.safetensors.index.json").write_text(
        json.dumps(dict(weight_map=dict.fromkeys(names, outside)))
    )


def disks(world: World, n: int) -> Iterator[Outcome]:
    """No file may grow past a limit any more (RLIMIT_FSIZE) once a certain write comes: one clear
    line, and with room again the run goes on.
    """
    cases = (
        ("config.yaml", configs, "dump_config", 1, 0),
        ("the index", BM25Index, "save", 1, 100),
        ("eval_before.jsonl", run_log.RunLog, "write_rows", 1, 10),
        ("rollouts.jsonl.gz", run_log.RunLog, "write_rollouts", 3, 1),
        ("rollouts.jsonl.gz, torn", run_log.RunLog, "write_rollouts", 2, 1500),
        ("metrics.jsonl", run_log.RunLog, "write_metrics", 3, 1),
        ("metrics.jsonl, torn", run_log.RunLog, "write_metrics", 2, 700),
        ("a shard", checkpoint, "save_file", 2, 5000),
        ("HF export", load_model, "save_model", 3, 10_000),
        ("state.json", checkpoint, "_describe_setting", 3, 10),
        ("manifest.json", checkpoint, "write_manifest", 2, 10),
        ("LATEST", checkpoint, "write_text", 3, 0),
        ("final model", run, "save_policy", 1, 100),
        ("summary.json", run_log.RunLog, "write_json", 1, 10),
    )
    for case in cases if n >= len(cases) else world.rng.sample(cases, n):
        yield Outcome(case[0], *_filled(world, *case))


def _filled(world: World, what: str, owner, name: str, time: int, limit: int) -> tuple[str, str]:
    run = world.fresh()
    if what == "the index":
        shutil.rmtree(world.folder / "index")
    before = world.start(run, prepare=lambda rank: _full_from(owner, name, time, limit))
    codes = before.wait(world.limit)
    if codes == [0] * RANKS:
        return "lost", "the write never came"
    if (
        codes != [2] * RANKS
        or "Traceback" in before.said()
        or sum("File too large" in line for line in before.lines()) != 1
    ):
        return "lost", f"exit codes {codes}: {before.said()[-1500:]}"
    _, verdict, note = world.finish(run)
    return verdict, note and f"{before.lines()}: {note}"


def _full_from(owner, name: str, time: int, limit: int) -> None:
    """In this process, from the `time`-th call of owner.name on, no file may become longer than
    `limit` bytes.
    """
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    function = getattr(owner, name)
    calls = [0]

    def watched(*args, **kwargs):
        calls[0] += 1
        if calls[0] >= time:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return function(*args, **kwargs)

    setattr(owner, name, watched)
