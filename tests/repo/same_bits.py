"""Run short jobs in an old and a new tree and compare what they leave, bit by bit.

This guards a refactor; `bash tests/repo/same_bits.sh BASE` starts it. A renaming is entered in the
tables below, old name first. The old names stay in this file: leave it out of search and replace.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import yaml

# ---- What the new tree names otherwise -----------------------------------------------------------

# Config: old dotted key -> new dotted key, of one setting or of a whole section.
# None: the new tree has no such key any more, it is left out.
CONFIG_KEYS: dict[str, str | None] = {
    "run.patience": "run.collective_timeout",
    "retriever.upstream_wrapping": "retriever.reproduce_upstream_query_bug",
    "reward.overlong": "reward.overlong_buffer",
    "sampling.cache_gib": "sampling.kv_cache_gib",
    "sampling.resample": "sampling.dynamic_sampling",
    "loss.average": "loss.agg_mode",
    "loss.clip": "loss.clip_ratio_low",
    "loss.clip_high": "loss.clip_ratio_high",
    "loss.kl": "loss.kl_coef",
    "loss.entropy": "loss.entropy_coef",
    "loss.reference_on_host": "loss.reference_cpu_offload",
    "loss.importance_cap": "loss.tis_cap",
    "loss.std_floor": "loss.advantage_eps",
    "sft.keep": "sft.filter",
    "sft.least": "sft.min_score",
    "optimizer.final_lr": "optimizer.min_lr_ratio",
    "optimizer.clip_norm": "optimizer.max_grad_norm",
    "optimizer.on_host": "optimizer.cpu_offload",
    "train.inner_steps": "train.num_mini_batches",
    "train.checkpointing": "train.gradient_checkpointing",
    "train.reduce": "train.gradient_sync",
    "save.keep": "save.keep_last",
}

# Config: old dotted key -> {old value: new value}.
CONFIG_VALUES: dict[str, dict] = {
    "model.head": {"one_shot": "fused"},
    "loss.average": {
        "token": "token-mean",
        "sequence": "seq-mean-token-mean",
        "constant": "seq-mean-token-sum-norm",
    },
    "train.reduce": {"micro_batch": "every_micro_batch", "step": "last_micro_batch"},
}

# Rows of metrics, rollouts, evaluations and summary: old key -> new key, at any depth.
# None: the new tree does not log it any more.
LOG_KEYS: dict[str, str | None] = {
    "reward_spread": "reward_std",
    "zero_variance": "frac_reward_zero_std",
    "adv_std": "advantage_std",
    "clip_share": "clip_ratio",
    "ratio_off": "ratio_abs_deviation",
    "trust": "importance_sampling_ratio",
    "dlogp_norm": "grad_logp_norm",
    "trained_share": "trained_token_frac",
    "resampled": "resampled_groups",
    "distinct": "unique_completion_frac",
    "completion_tokens": "completion_length",
    "unfinished": "truncated_ratio",
    "unparsable": "format_error_rate",
    "errors": "format_errors",
    "val_errors": "val_format_errors",
    "skipped": "skipped_steps",
    "logprob_gap_mean": "sampling_logp_diff_mean",
    "logprob_gap_p999": "sampling_logp_diff_p999",
    "max_logprob_gap": "sampling_logp_diff_max",
    "adv": "advantage",
    "parts": "reward_terms",
}

# The same rows: old key -> {old text: new text}.
LOG_VALUES: dict[str, dict[str, str]] = {
    # "error": {"no_think_end": "thought_not_closed"},
}

# Files that a job starts or reads in a tree: old path -> new path.
FILES: dict[str, str] = {
    "tests/stopped.py": "tests/helpers/interrupted.py",
    "experiments/quickstart.yaml": "experiments/quickstart.yaml",
}

# Files that a job leaves: old path -> new path, below the job's folder.
LEFT: dict[str, str] = {
    # "run/rollouts.jsonl.gz": "run/samples.jsonl.gz",
}

# Any other word of a command line: old word -> new word.
ARGUMENTS: dict[str, str] = {
    # "sigterm-sample@2": "terminate-sample@2",
}

# Keys whose values no two runs share: times and memory.
NOT_COMPARED = {
    "seconds",
    "timing_s",
    "memory",
    "rollout_tokens_per_s",
    "tokens_per_s",
    "reward_wait",
    "reward_wait_frac",
    "wall_s",
}

# ---- The jobs, in the old tree's names -----------------------------------------------------------

LONGEST = 900  # seconds that one command may take
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
EVERY_RUN = [
    "run/model/model.safetensors",
    "run/eval_before.jsonl",
    "run/eval_after.jsonl",
    "run/summary.json",
    "run/metrics.jsonl",
]
GRPO_RUN = [*EVERY_RUN, "run/rollouts.jsonl.gz"]
SFT_RUN = [*EVERY_RUN, "run/teacher.jsonl"]

PLACE = ["run.dir={job}/run", "retriever.index_dir={job}/index", "run.threads=1"]
SEARCH = ["{world}/search/{config}", *PLACE]
SFT = ["{world}/sft/{config}", *PLACE]
LIST = [
    "{world}/list/{config}",
    *PLACE,
    "train.steps=2",
    "train.eval_every=2",
    "log.tokens_every=1",
]
QUICKSTART = [
    "experiments/quickstart.yaml",
    *PLACE,
    "data.test_queries={world}/quickstart/test.queries.jsonl",
    "data.test_qrels={world}/quickstart/test.qrels.tsv",
    "train.steps=30",
    "train.prompts_per_step=8",
    "train.eval_every=10",
    "train.eval_queries=32",
    "log.tokens_every=10",
]
DENSE = [
    "retriever.kind=dense",
    "retriever.encoder={world}/encoder",
    "retriever.max_length=64",
    "retriever.index=exact",
]
DAPO = ["loss.kind=dapo", "model.head=recompute", "sampling.resample=1", "reward.overlong=4"]
JUDGED = [
    *["--corpus", "{world}/search/data/corpus.jsonl"],
    *["--queries", "{world}/search/data/test.queries.jsonl"],
    *["--qrels", "{world}/search/data/test.qrels.tsv"],
]
TRAIN = ["-m", "recr1.train"]


@dataclass(frozen=True)
class Job:
    """Hold the commands of a job, words behind `python`, and the files that they leave."""

    name: str
    commands: list[list[str]]
    leaves: list[str]
    stops_first: bool = False  # the first command is interrupted before its run is done


def name_grpo_job(name: str, *overrides: str) -> Job:
    """Make a job of one GRPO run on the small search world."""
    return Job(name, [[*TRAIN, *SEARCH, *overrides]], GRPO_RUN)


JOBS = [
    Job("quickstart, 1 rank", [[*TRAIN, *QUICKSTART]], GRPO_RUN),
    Job("quickstart, 2 ranks", [[*TORCHRUN, "2", *TRAIN, *QUICKSTART]], GRPO_RUN),
    Job("sft", [["-m", "recr1.sft", *SFT]], SFT_RUN),
    name_grpo_job("dense retriever", *DENSE),
    Job("list, composite reward", [[*TRAIN, *LIST]], GRPO_RUN),
    name_grpo_job("kl in the loss", "loss.kl=0.01"),
    name_grpo_job("kl in the reward", "loss.kl=0.01", "loss.kl_in=reward"),
    name_grpo_job("gspo", "loss.kind=gspo", "model.head=recompute"),
    name_grpo_job("dapo", *DAPO),
    name_grpo_job("checkpointing", "train.checkpointing=true"),
    name_grpo_job("inner steps", "train.inner_steps=2"),
    Job(
        "stopped and resumed",
        [["tests/stopped.py", "sigterm-sample@2", *SEARCH], [*TRAIN, *SEARCH]],
        GRPO_RUN,
        stops_first=True,
    ),
    Job(
        "eval-queries",
        [["-m", "recr1.cli", "eval-queries", *JUDGED, "--json"]],
        ["stdout_1.txt"],
    ),
]

# ---- The world, written by the old tree ----------------------------------------------------------

TEST_QUERIES = 60  # of the quickstart's


def write_world(folder: Path) -> None:
    """Write the policies, data and configs of the jobs. Runs in the old tree, with its names."""
    from encoders import write_encoder
    from tiny import write_sft_yaml, write_yaml

    for name in ("search", "sft", "list", "quickstart"):
        (folder / name).mkdir(parents=True)
    write_yaml(folder / "search")
    write_sft_yaml(folder / "sft")
    write_encoder(folder / "encoder")
    write_list_world(folder / "list")
    write_quickstart_test(folder / "quickstart")


def write_list_world(folder: Path) -> None:
    """Write what a dry run makes of the list experiment, to stay."""
    from recr1 import config_file
    from recr1.dryrun import shrunk

    path = "experiments/movielens_list.yaml"
    with shrunk(config_file.load(path, []), path) as config:
        made = Path(config.run.dir).parent
        shutil.copytree(made, folder, dirs_exist_ok=True)
        text = config_file.dump(config).replace(str(made), str(folder))
    (folder / "config.yaml").write_text(text, encoding="utf-8")


def write_quickstart_test(folder: Path) -> None:
    """Write the first queries of the quickstart's test split, and their judgements."""
    data = Path("experiments/data/msrd")
    queries = data.joinpath("test.queries.jsonl").read_text(encoding="utf-8").splitlines()
    queries = queries[:TEST_QUERIES]
    kept = {json.loads(line)["id"] for line in queries}
    judged = gzip.decompress(data.joinpath("test.qrels.tsv.gz").read_bytes()).decode().splitlines()
    judged = [line for line in judged if line.split("\t")[0] in kept]
    write_lines(folder / "test.queries.jsonl", queries)
    write_lines(folder / "test.qrels.tsv", judged)


def write_lines(path: Path, lines: list[str]) -> None:
    """Write a text file of these lines."""
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


# ---- Old names to new ----------------------------------------------------------------------------


def translate_key(key: str) -> str | None:
    """Give a config key's new name, by its own entry or that of the section it is in."""
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        known = ".".join(parts[:length])
        if known not in CONFIG_KEYS:
            continue
        new = CONFIG_KEYS[known]
        if new is None:
            return None
        return ".".join([new, *parts[length:]])
    return key


def translate_value(key: str, value):
    """Give a setting's new value; key: the old one."""
    renamed = CONFIG_VALUES.get(key, {})
    if isinstance(value, (dict, list)):
        return value
    return renamed.get(value, value)


def translate_config(tree: dict) -> dict:
    """Give a config's tree in the new names; sections that are empty are left out."""
    new_tree: dict = {}
    for key, value in list_settings(tree, ""):
        new_key = translate_key(key)
        if new_key is None:
            continue
        *sections, last = new_key.split(".")
        node = new_tree
        for name in sections:
            node = node.setdefault(name, {})
        if last in node:
            sys.exit(f"same_bits: CONFIG_KEYS gives two settings the name {new_key}")
        node[last] = translate_value(key, value)
    return new_tree


def list_settings(tree: dict, above: str) -> list[tuple[str, object]]:
    """List (dotted key, value) of a config's tree."""
    found = []
    for name, value in tree.items():
        if isinstance(value, dict):
            found += list_settings(value, f"{above}{name}.")
        else:
            found.append((f"{above}{name}", value))
    return found


def translate_override(word: str) -> list[str]:
    """Give a.b=value in the new names: one word, or none when the key is gone."""
    key, _, text = word.partition("=")
    new_key = translate_key(key)
    if new_key is None:
        return []
    value = yaml.safe_load(text)
    new_value = translate_value(key, value)
    if new_value != value:
        text = json.dumps(new_value)  # YAML too
    return [f"{new_key}={text}"]


def translate_command(words: list[str]) -> list[str]:
    """Give a command line in the new names."""
    found = []
    for word in words:
        if re.match(r"[a-z0-9_]+(\.[a-z0-9_]+)+=", word):
            found += translate_override(word)
        else:
            found.append(FILES.get(word, ARGUMENTS.get(word, word)))
    return found


def translate_row(value, key: str = ""):
    """Give a logged value in the new names; key: the old one that it stands at."""
    if isinstance(value, list):
        return [translate_row(item, key) for item in value]
    if isinstance(value, str):
        return LOG_VALUES.get(key, {}).get(value, value)
    if not isinstance(value, dict):
        return value
    row = {}
    for name, inner in value.items():
        new_name = LOG_KEYS.get(name, name)
        if new_name is not None:
            row[new_name] = translate_row(inner, name)
    return row


# ---- Running -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tree:
    """Hold a checkout and how it names things."""

    name: str  # old | new
    root: Path

    def name_command(self, words: list[str], world: Path, job: Path) -> list[str]:
        """Give a command's words in this tree's names, with its folders."""
        config = f"{self.name}.yaml"
        words = [word.format(world=world, job=job, config=config) for word in words]
        if self.name == "new":
            words = translate_command(words)
        return words

    def name_left(self, path: str) -> str:
        """Give the path below the job's folder of a file that the job leaves."""
        if self.name == "new":
            return LEFT.get(path, path)
        return path

    def run_python(self, words: list[str], output: Path) -> int:
        """Run python in this tree on one CPU thread; give its exit code. Its output is kept."""
        own = {
            "PYTHONPATH": f"{self.root}{os.pathsep}{self.root / 'tests'}",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
        }
        errors = output.with_name(output.name.replace("stdout", "stderr"))
        with open(output, "wb") as out, open(errors, "wb") as err:
            try:
                done = subprocess.run(
                    [sys.executable, *words],
                    cwd=self.root,
                    env=os.environ | own,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    timeout=LONGEST,
                )
            except subprocess.TimeoutExpired:
                err.write(f"it ran past {LONGEST} s\n".encode())
                return 124
        return done.returncode


@dataclass(frozen=True)
class Done:
    """Hold what a tree made of a job. fault: why it failed, or empty."""

    folder: Path
    seconds: float
    fault: str = ""


def run_job(job: Job, tree: Tree, root: Path) -> Done:
    """Run a job's commands in a tree, one after the other."""
    name = re.sub(r"\W+", "_", job.name)
    folder = root / tree.name / name
    folder.mkdir(parents=True)
    started = time.perf_counter()
    fault = ""
    for number, words in enumerate(job.commands, 1):
        output = folder / f"stdout_{number}.txt"
        code = tree.run_python(tree.name_command(words, root / "world", folder), output)
        fault = find_fault(job, tree, folder, number, code)
        if fault:
            break
    return Done(folder, time.perf_counter() - started, fault)


def find_fault(job: Job, tree: Tree, folder: Path, number: int, code: int) -> str:
    """Say what is wrong after a command has ended; empty: nothing."""
    summary = folder / tree.name_left("run/summary.json")
    if code == 0 and job.stops_first and number == 1 and summary.exists():
        return f"{tree.name}: the run was not stopped, it went to its end"
    if code == 0:
        return ""
    # commits before recr1/exits.py abort at times when all is done and written
    left = [folder / tree.name_left(path) for path in job.leaves]
    if tree.name == "old" and number == len(job.commands) and all(path.exists() for path in left):
        return ""
    said = (
        (folder / f"stderr_{number}.txt").read_text(encoding="utf-8", errors="replace").split("\n")
    )
    own = [line for line in said if line.startswith("recr1: ") or re.match(r"\w*Error\b", line)]
    last = [line for line in said if line.strip()][-1:]
    return f"{tree.name}: command {number} ended with {code}: {(own or last or ['no word'])[-1]}"


# ---- Comparing -----------------------------------------------------------------------------------


def read_left(path: Path) -> list:
    """Read a file that a job has left, as rows."""
    if path.suffix == ".safetensors":
        return [read_tensors(path)]
    raw = path.read_bytes()
    if path.suffix == ".gz":
        raw = gzip.decompress(raw)
    if path.suffix == ".json":
        return [json.loads(raw)]
    lines = [line for line in raw.split(b"\n") if line]
    if path.suffix == ".txt":
        lines = lines[-1:]  # --json: one object on the last line
    return [json.loads(line) for line in lines]


def read_tensors(path: Path) -> dict[str, str]:
    """Read {name: type, shape and sha256 of the bytes} of a safetensors file."""
    raw = path.read_bytes()
    data = 8 + int.from_bytes(raw[:8], "little")
    tensors = {}
    for name, about in json.loads(raw[8:data]).items():
        if name == "__metadata__":
            continue
        start, end = about["data_offsets"]
        digest = hashlib.sha256(raw[data + start : data + end]).hexdigest()
        tensors[name] = f"{about['dtype']} {about['shape']} sha256 {digest[:16]}"
    return tensors


def compare_file(path: str, old: Path, new: Path) -> str:
    """Say where a file of the new tree differs from the old tree's; empty: nowhere."""
    new_path = LEFT.get(path, path)
    if not (old / path).exists():
        return f"{path}: old has none"
    if not (new / new_path).exists():
        return f"{new_path}: new has none"
    old_rows = read_left(old / path)
    new_rows = read_left(new / new_path)
    if not old_rows:
        return f"{path}: old has no rows"
    if not path.endswith(".safetensors"):
        old_rows = translate_row(old_rows)
    if len(old_rows) != len(new_rows):
        return f"{path}: {len(old_rows)} rows -> {len(new_rows)}"
    found = []
    for number, (old_row, new_row) in enumerate(zip(old_rows, new_rows, strict=True), 1):
        where = find_difference(old_row, new_row, "")
        if where:
            found.append(f"{path} row {number}{where}")
    if len(found) > 1:
        return f"{found[0]} ({len(found)} of {len(old_rows)} rows differ)"
    return "".join(found)


def find_difference(old, new, where: str) -> str:
    """Say where two values differ first; empty: nowhere. Floats are compared bit by bit."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            if key in NOT_COMPARED:
                continue
            if key not in old or key not in new:
                return f"{where} {key}: only in {'new' if key in new else 'old'}"
            difference = find_difference(old[key], new[key], f"{where} {key}")
            if difference:
                return difference
        return ""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for place, (old_item, new_item) in enumerate(zip(old, new, strict=True)):
            difference = find_difference(old_item, new_item, f"{where}[{place}]")
            if difference:
                return difference
        return ""
    old_text = json.dumps(old, ensure_ascii=False)
    new_text = json.dumps(new, ensure_ascii=False)
    if old_text == new_text:
        return ""
    return f"{where}: {old_text[:80]} -> {new_text[:80]}"


# ---- The command ---------------------------------------------------------------------------------

IMPORTS = """
import sys
import recr1.cli, recr1.sft, recr1.train
for name, module in list(sys.modules.items()):
    if name.split(".")[0] == "recr1" and getattr(module, "__file__", None):
        print(module.__file__)
"""


def check_tree(tree: Tree, root: Path) -> None:
    """End the program unless the tree's processes import the tree's own code."""
    output = root / f"stdout_imports_{tree.name}.txt"
    if tree.run_python(["-c", IMPORTS], output):
        errors = root / f"stderr_imports_{tree.name}.txt"
        sys.exit(f"same_bits: {tree.root}: {errors.read_text().strip().splitlines()[-1]}")
    for path in output.read_text().splitlines():
        if not Path(path).is_relative_to(tree.root):
            sys.exit(f"same_bits: {tree.root} imports {path}, which is another tree's")


def make_world(old: Tree, root: Path) -> None:
    """Make the jobs' world by the old tree's code, and the configs in both trees' names."""
    words = ["-P", str(Path(__file__).resolve()), "world", str(root / "world")]
    if old.run_python(words, root / "stdout_world.txt"):
        errors = (root / "stderr_world.txt").read_text().strip().splitlines()
        sys.exit(f"same_bits: {old.root} could not write the jobs' world: {errors[-1]}")
    for name in ("search", "sft", "list"):
        written = root / "world" / name / "config.yaml"
        tree = yaml.safe_load(written.read_text(encoding="utf-8"))
        text = yaml.safe_dump(translate_config(tree), allow_unicode=True)
        written.with_name("new.yaml").write_text(text, encoding="utf-8")
        written.rename(written.with_name("old.yaml"))


def compare_trees(old: Tree, new: Tree, root: Path, words: list[str]) -> int:
    """Run the jobs in both trees at once, print the table, give the exit code."""
    jobs = [job for job in JOBS if not words or any(word in job.name for word in words)]
    if not jobs:
        sys.exit(f"same_bits: no job's name holds {' or '.join(words)}")
    started = time.perf_counter()
    root.mkdir(parents=True)
    for tree in (old, new):
        check_tree(tree, root)
    make_world(old, root)
    print(f"{'job':<24}{'files':>6}  {'result':<10}{'seconds old':>12}{'new':>7}", flush=True)
    different = 0
    for job in jobs:
        with ThreadPoolExecutor(2) as pool:
            pending = [pool.submit(run_job, job, tree, root) for tree in (old, new)]
        one, two = (done.result() for done in pending)
        found = [fault for fault in (one.fault, two.fault) if fault]
        if not found:
            found = [compare_file(path, one.folder, two.folder) for path in job.leaves]
            found = [where for where in found if where]
        result = "different" if found else "equal"
        times = f"{one.seconds:>12.1f}{two.seconds:>7.1f}"
        print(f"{job.name:<24}{len(job.leaves):>6}  {result:<10}{times}", flush=True)
        for where in found:
            print(f"    {where}", flush=True)
        different += bool(found)
    seconds = time.perf_counter() - started
    print(f"{len(jobs) - different} of {len(jobs)} jobs equal, {seconds:.0f} s")
    return 1 if different else 0


def main(arguments: list[str]) -> int:
    """Do what the arguments ask: compare OLD NEW FOLDER [WORD ...], or world FOLDER."""
    if arguments[0] == "world":
        write_world(Path(arguments[1]))
        return 0
    old, new, root = (Path(argument).resolve() for argument in arguments[1:4])
    return compare_trees(Tree("old", old), Tree("new", new), root, arguments[4:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
