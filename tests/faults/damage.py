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

from alone import Bench, Case, expect, expect_refusal, run_cases
from safetensors import safe_open
from stops import find_lines
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


def damage_checkpoints(world: World, n: int) -> Iterator[Outcome]:
    """Damage the newest checkpoint in one file: it is refused with the file's name, and the one
    before used.
    """
    cases = [*rot_files(world), *tell_lies(world)]
    if n < len(cases):
        cases = world.rng.sample(cases, n)
    for case in cases:
        yield resume_damaged(world, *case)


def resume_damaged(world: World, what: str, named: str, damage: Callable[[Path], None]) -> Outcome:
    """Check that the run goes on from the checkpoint before the damaged one, and that one line says
    which file was refused.
    """
    run = world.choose_folder()
    shutil.copytree(world.unfinished, run)
    damage(run / "checkpoints")
    job, verdict, note = world.finish(run)
    if (world.folder / "executed").exists():
        return Outcome(what, "silent", "the payload was executed")
    if verdict != "survived":
        return Outcome(what, verdict, note)
    used = LAST if what.startswith("LATEST") else BEFORE
    if not find_lines(job, named, "refused"):
        return Outcome(what, "silent", f"{named!r} is not named: {job.read_lines()}")
    if not find_lines(job, used, "goes on after step"):
        return Outcome(what, "silent", f"it did not go on from {used}: {job.read_lines()}")
    return Outcome(what, verdict, note)


# --- files that rot ---


def cut_file(rng, path: Path) -> None:
    length = rng.randrange(path.stat().st_size)
    os.truncate(path, length)


def flip_bit(rng, path: Path) -> None:
    raw = bytearray(path.read_bytes())
    position = rng.randrange(len(raw))
    bit = rng.randrange(8)
    raw[position] ^= 1 << bit
    path.write_bytes(raw)


def remove_file(rng, path: Path) -> None:
    path.unlink()


ROTS = (("cut short", cut_file), ("one bit", flip_bit), ("gone", remove_file))


def rot_files(world: World) -> Iterator[tuple]:
    """Yield every kind of file cut short, with one bit changed, gone."""
    for kind in KINDS:
        for how, damage in ROTS:
            named = kind
            if (kind, how) == ("manifest.json", "one bit"):
                named = LAST
            yield f"{kind} {how}", named, partial(damage_last, world.rng, kind, damage)


def damage_last(rng, kind: str, damage: Callable, root: Path) -> None:
    damage(rng, root / LAST / kind)


# --- what somebody might have put there ---


def tell_lies(world: World) -> Iterator[tuple]:
    payload = pickle_payload(world)
    shard, *_ = KINDS
    yield "manifest: ../../secret", "manifest.json", partial(rename_listed, "../../secret")
    yield "manifest: /etc/passwd", "manifest.json", partial(rename_listed, "/etc/passwd")
    yield "manifest: nested 100,000 deep", "manifest.json", nest_manifest
    yield "a pickle in place of a shard", shard, partial(replace_shard, payload)
    yield "a shard is a link", shard, link_shard
    yield "the folder is a link", LAST, link_folder
    yield "two shards in each other's place", "rank_0000", swap_shards
    if not (world.folder / "executed").exists():
        yield "an older checkpoint under this name", "state.json", copy_older


def pickle_payload(world: World) -> bytes:
    """Return a pickle that leaves a file where it is loaded."""

    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {world.folder / 'executed'}",)

    return pickle.dumps(Payload())


def rename_listed(name: str, root: Path) -> None:
    """Give a file another name in the manifest."""
    path = root / LAST / "manifest.json"
    manifest = json.loads(path.read_text())
    files = manifest["files"]
    files[name] = files.pop("state.json")
    path.write_text(json.dumps(manifest))


def nest_manifest(root: Path) -> None:
    (root / LAST / "manifest.json").write_text("[" * 100_000)


def replace_shard(payload: bytes, root: Path) -> None:
    (root / LAST / KINDS[0]).write_bytes(payload)


def link_shard(root: Path) -> None:
    move_elsewhere(root / LAST / KINDS[0], root.parent / "elsewhere")


def link_folder(root: Path) -> None:
    move_elsewhere(root / LAST, root.parent / "elsewhere")


def move_elsewhere(path: Path, elsewhere: Path) -> None:
    """Move it, and leave a link."""
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def swap_shards(root: Path) -> None:
    first = root / LAST / KINDS[0]
    second = root / LAST / KINDS[1]
    raw = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(raw)


def copy_older(root: Path) -> None:
    shutil.rmtree(root / LAST)
    shutil.copytree(root / BEFORE, root / LAST)


# --- what wants to be executed or followed ---

PICKLES = ["optimizer.pt", "model/pytorch_model.bin", "state.pkl", "model/modeling.py"]


def write_hostile(world: World, n: int) -> Iterator[Outcome]:
    """Make checkpoints and model folders of somebody who wants code to run or files outside to be
    read: nothing is executed or followed.
    """
    rng = world.rng
    payload = pickle_payload(world)
    bench = Bench(world, "hostile")
    leave_pickles = partial(keep_only_pickles, payload)
    lead_outside = partial(index_outside, rng)
    cases = [
        ("a pickle beside the shards", LAST, partial(add_pickle, rng, payload)),
        ("LATEST leads outside", "LATEST", partial(point_outside, rng)),
        spoil_model(bench, "a model of pickles", leave_pickles, "only safetensors is read"),
        spoil_model(bench, "an index that leads outside", lead_outside, "outside the folder"),
    ]
    if n < len(cases):
        cases = rng.sample(cases, n)
    of_models = []
    for case in cases:
        if len(case) == 3:
            yield resume_damaged(world, *case)
        else:
            of_models.append(case)
    yield from run_cases(world, of_models)


def add_pickle(rng, payload: bytes, root: Path) -> None:
    name = rng.choice(PICKLES)
    (root / LAST / name).write_bytes(payload)


def point_outside(rng, root: Path) -> None:
    targets = ["../../x", "/etc", f"../{root.name}/{BEFORE}", f"{LAST}/../../x"]
    target = rng.choice(targets)
    (root / "LATEST").write_text(f"{target}\n")


def spoil_model(bench: Bench, where: str, spoil: Callable[[Path], None], why: str) -> Case:
    """why: what the line that refuses the model says."""
    world = bench.world
    folder = bench.folder / where.replace(" ", "_")
    shutil.copytree(world.folder / "policy", folder)
    spoil(folder)

    def check():
        argv, _ = bench.make_argv(None, f"model.path={folder}")
        expect_refusal(train.main, argv, folder, why)
        generate = ["generate", "--model", folder, "--config", world.config, "red lamp"]
        expect_refusal(cli.main, generate, folder, why)
        expect(not (world.folder / "executed").exists(), "the payload was executed")

    return where, check


def keep_only_pickles(payload: bytes, folder: Path) -> None:
    """And code that a loader which trusts the folder would import."""
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(payload)
    code = f"import pickle\npickle.loads({payload!r})\nclass Own: pass\n"
    (folder / "modeling_own.py").write_text(code)
    map_classes(folder / "config.json", AutoModelForCausalLM="modeling_own.Own")
    map_classes(folder / "tokenizer_config.json", AutoTokenizer=["modeling_own.Own", None])


def map_classes(path: Path, **classes) -> None:
    config = json.loads(path.read_text())
    config["auto_map"] = classes
    path.write_text(json.dumps(config))


def index_outside(rng, folder: Path) -> None:
    weights = folder / "model.safetensors"
    elsewhere = weights.rename(folder.parent / "elsewhere.safetensors")
    with safe_open(elsewhere, "pt") as file:
        names = list(file.keys())
    name = elsewhere.name
    outside = rng.choice([str(elsewhere), f"../{name}", f"x/../../{name}"])
    index = dict(weight_map=dict.fromkeys(names, outside))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


# --- a full disk ---

FULL = (  # what is written, the function that writes it, the call from which on a file may have
    # no more bytes, and how many
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


def fill_disks(world: World, n: int) -> Iterator[Outcome]:
    """Let no file grow past a limit any more (RLIMIT_FSIZE) once a certain write comes: one clear
    line, and with room again the run goes on.
    """
    cases = FULL
    if n < len(FULL):
        cases = world.rng.sample(FULL, n)
    for what, *write in cases:
        verdict, note = fill_disk(world, what, *write)
        yield Outcome(what, verdict, note)


def fill_disk(world: World, what: str, owner, name: str, call: int, limit: int) -> tuple[str, str]:
    """Return (verdict, note)."""
    run = world.choose_folder()
    if what == "the index":
        shutil.rmtree(world.folder / "index")
    before = world.start(run, prepare=lambda rank: limit_files_from(owner, name, call, limit))
    codes = before.wait(world.limit)
    if codes == [0] * RANKS:
        return "lost", "the write never came"
    full = [line for line in before.read_lines() if "File too large" in line]
    if codes != [2] * RANKS or len(full) != 1 or "Traceback" in before.read_output():
        return "lost", f"exit codes {codes}: {before.read_output()[-1500:]}"
    _, verdict, note = world.finish(run)
    return verdict, note and f"{before.read_lines()}: {note}"


def limit_files_from(owner, name: str, first: int, limit: int) -> None:
    """In this process, from the `first`-th call of owner.name on, no file may become longer than
    `limit` bytes.
    """
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    function = getattr(owner, name)
    calls = 0

    def watched(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls >= first:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return function(*args, **kwargs)

    setattr(owner, name, watched)
