"""Run short jobs in an old and a new tree and compare what they leave, bit by bit.

This guards a refactor; `bash tests/repo/same_bits.sh BASE` starts it. A renaming of a setting or of
a logged value is entered in recr1/utils/renamed.py, any other in the tables below, old name first.
The old names stay in both files: leave them out of search and replace.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import yaml

# ---- What the new tree names otherwise -----------------------------------------------------------


# What the new tree's table says. Run by its path: what is imported may be the old tree's.
RENAMED = runpy.run_path(str(Path(__file__).resolve().parents[2] / "recr1/utils/renamed.py"))

# Config: old dotted key -> new dotted key, of one setting or of a whole section.
# None: the new tree has no such key any more, it is left out.
CONFIG_KEYS: dict[str, str | None] = {**RENAMED["RENAMED_SETTINGS"]}

# Config: old dotted key -> {old value: new value}.
CONFIG_VALUES: dict[str, dict] = {**RENAMED["RENAMED_VALUES"]}
for old_key, new_key in RENAMED["RENAMED_SETTINGS"].items():
    if new_key in CONFIG_VALUES:
        CONFIG_VALUES[old_key] = CONFIG_VALUES.pop(new_key)

# Rows of metrics, rollouts, evaluations and summary: old key -> new key, at any depth.
# None: the new tree does not log it any more.
LOG_KEYS: dict[str, str | None] = {
    **RENAMED["RENAMED_METRICS"],
    **RENAMED["RENAMED_ROLLOUT_KEYS"],
    **RENAMED["RENAMED_SUMMARY_KEYS"],
    **RENAMED["RENAMED_TEACHER_KEYS"],
}

# The same rows: old keys at which an object's own keys are no log keys but names, of errors.
NAMES_STAND_AT = ("errors",)

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
    full_config = config_file.load(path, [])
    with shrunk(full_config, path) as config:
        shrunk_folder = Path(config.run.dir).parent
        shutil.copytree(shrunk_folder, folder, dirs_exist_ok=True)
        text = config_file.dump(config)
    text = text.replace(str(shrunk_folder), str(folder))
    (folder / "config.yaml").write_text(text, encoding="utf-8")


def write_quickstart_test(folder: Path) -> None:
    """Write the first queries of the quickstart's test split, and their judgements."""
    data = Path("experiments/data/msrd")
    queries = (data / "test.queries.jsonl").read_text(encoding="utf-8").splitlines()
    queries = queries[:TEST_QUERIES]
    query_ids = {json.loads(line)["id"] for line in queries}

    packed = (data / "test.qrels.tsv.gz").read_bytes()
    judgements = []
    for line in gzip.decompress(packed).decode().splitlines():
        query_id, _, _ = line.partition("\t")
        if query_id in query_ids:
            judgements.append(line)

    write_lines(folder / "test.queries.jsonl", queries)
    write_lines(folder / "test.qrels.tsv", judgements)


def write_lines(path: Path, lines: list[str]) -> None:
    """Write a text file of these lines."""
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


# ---- Old names to new ----------------------------------------------------------------------------


def translate_key(key: str) -> str | None:
    """Give a config key's new name, by its own entry or that of the section it is in."""
    names = key.split(".")
    for length in range(len(names), 0, -1):
        known = ".".join(names[:length])
        if known not in CONFIG_KEYS:
            continue
        new = CONFIG_KEYS[known]
        if new is None:
            return None
        below = names[length:]
        return ".".join([new, *below])
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
    settings = []
    for name, value in tree.items():
        key = f"{above}{name}"
        if isinstance(value, dict):
            settings += list_settings(value, f"{key}.")
        else:
            settings.append((key, value))
    return settings


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
    new_words = []
    for word in words:
        if re.match(r"[a-z0-9_]+(\.[a-z0-9_]+)+=", word):
            new_words += translate_override(word)
        elif word in FILES:
            new_words.append(FILES[word])
        else:
            new_words.append(ARGUMENTS.get(word, word))
    return new_words


def translate_row(value, key: str = ""):
    """Give a logged value in the new names; key: the old one that it stands at."""
    if isinstance(value, list):
        return [translate_row(item, key) for item in value]
    if isinstance(value, str):
        new_texts = LOG_VALUES.get(key, {})
        return new_texts.get(value, value)
    if not isinstance(value, dict):
        return value
    if key in NAMES_STAND_AT:
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
        folders = [str(self.root), str(self.root / "tests")]
        settings = {
            "PYTHONPATH": os.pathsep.join(folders),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
        }
        errors = output.with_name(output.name.replace("stdout", "stderr"))
        with open(output, "wb") as out, open(errors, "wb") as err:
            try:
                process = subprocess.run(
                    [sys.executable, *words],
                    cwd=self.root,
                    env=os.environ | settings,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    timeout=LONGEST,
                )
            except subprocess.TimeoutExpired:
                err.write(f"it ran past {LONGEST} s\n".encode())
                return 124
        return process.returncode


@dataclass(frozen=True)
class Outcome:
    """Hold what a tree made of a job. fault: why it failed, or empty."""

    folder: Path
    seconds: float
    fault: str = ""


def run_job(job: Job, tree: Tree, root: Path) -> Outcome:
    """Run a job's commands in a tree, one after the other."""
    name = re.sub(r"\W+", "_", job.name)
    folder = root / tree.name / name
    folder.mkdir(parents=True)
    started = time.perf_counter()
    fault = ""
    for number, words in enumerate(job.commands, 1):
        output = folder / f"stdout_{number}.txt"
        command = tree.name_command(words, root / "world", folder)
        code = tree.run_python(command, output)
        fault = find_fault(job, tree, folder, number, code)
        if fault:
            break
    seconds = time.perf_counter() - started
    return Outcome(folder, seconds, fault)


def find_fault(job: Job, tree: Tree, folder: Path, number: int, code: int) -> str:
    """Say what is wrong after a command has ended; empty: nothing."""
    if code == 0:
        summary = folder / tree.name_left("run/summary.json")
        if job.stops_first and number == 1 and summary.exists():
            return f"{tree.name}: the run was not stopped, it went to its end"
        return ""
    # commits before recr1/exits.py abort at times when all is done and written
    if tree.name == "old" and number == len(job.commands) and has_left_all(job, tree, folder):
        return ""
    message = read_last_word(folder / f"stderr_{number}.txt")
    return f"{tree.name}: command {number} ended with {code}: {message}"


def has_left_all(job: Job, tree: Tree, folder: Path) -> bool:
    """Say whether every file that the job leaves is there."""
    paths = [folder / tree.name_left(path) for path in job.leaves]
    return all(path.exists() for path in paths)


def read_last_word(path: Path) -> str:
    """Read the last line of a command's errors; before others one of recr1 or of an exception."""
    last_line = "no word"
    last_error = ""
    text = path.read_text(encoding="utf-8", errors="replace")
    for line in text.split("\n"):
        if line.strip():
            last_line = line
        if re.match(r"recr1: |\w*Error\b", line):
            last_error = line
    return last_error or last_line


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
    header_length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + header_length])
    data = raw[8 + header_length :]
    tensors = {}
    for name, about in header.items():
        if name == "__metadata__":
            continue
        start, end = about["data_offsets"]
        digest = hashlib.sha256(data[start:end]).hexdigest()
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
    differences = []
    row_pairs = zip(old_rows, new_rows, strict=True)
    for number, (old_row, new_row) in enumerate(row_pairs, 1):
        difference = find_difference(old_row, new_row, "")
        if difference:
            differences.append(f"{path} row {number}{difference}")
    if len(differences) > 1:
        return f"{differences[0]} ({len(differences)} of {len(old_rows)} rows differ)"
    return "".join(differences)


def find_difference(old, new, where: str) -> str:
    """Say where two values differ first; empty: nowhere. Floats are compared bit by bit."""
    if isinstance(old, dict) and isinstance(new, dict):
        return find_difference_of_rows(old, new, where)
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return find_difference_of_lists(old, new, where)
    old_text = json.dumps(old, ensure_ascii=False)
    new_text = json.dumps(new, ensure_ascii=False)
    if old_text == new_text:
        return ""
    return f"{where}: {old_text[:80]} -> {new_text[:80]}"


def find_difference_of_rows(old: dict, new: dict, where: str) -> str:
    """Say where two rows differ first, by the order of their keys; empty: nowhere."""
    for key in sorted(old.keys() | new.keys()):
        if key in NOT_COMPARED:
            continue
        if key not in old:
            return f"{where} {key}: only in new"
        if key not in new:
            return f"{where} {key}: only in old"
        difference = find_difference(old[key], new[key], f"{where} {key}")
        if difference:
            return difference
    return ""


def find_difference_of_lists(old: list, new: list, where: str) -> str:
    """Say where two lists of one length differ first; empty: nowhere."""
    item_pairs = zip(old, new, strict=True)
    for place, (old_item, new_item) in enumerate(item_pairs):
        difference = find_difference(old_item, new_item, f"{where}[{place}]")
        if difference:
            return difference
    return ""


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
        message = read_last_word(root / f"stderr_imports_{tree.name}.txt")
        sys.exit(f"same_bits: {tree.root}: {message}")
    for path in output.read_text().splitlines():
        if not Path(path).is_relative_to(tree.root):
            sys.exit(f"same_bits: {tree.root} imports {path}, which is another tree's")


def make_world(old: Tree, root: Path) -> None:
    """Make the jobs' world by the old tree's code, and the configs in both trees' names."""
    words = ["-P", str(Path(__file__).resolve()), "world", str(root / "world")]
    if old.run_python(words, root / "stdout_world.txt"):
        message = read_last_word(root / "stderr_world.txt")
        sys.exit(f"same_bits: {old.root} could not write the jobs' world: {message}")
    for name in ("search", "sft", "list"):
        written = root / "world" / name / "config.yaml"
        tree = yaml.safe_load(written.read_text(encoding="utf-8"))
        text = yaml.safe_dump(translate_config(tree), allow_unicode=True)
        written.with_name("new.yaml").write_text(text, encoding="utf-8")
        written.rename(written.with_name("old.yaml"))


def choose_jobs(words: list[str]) -> list[Job]:
    """Choose the jobs whose name holds one of the words; without words all."""
    if not words:
        return JOBS
    jobs = []
    for job in JOBS:
        if any(word in job.name for word in words):
            jobs.append(job)
    if not jobs:
        sys.exit(f"same_bits: no job's name holds {' or '.join(words)}")
    return jobs


def list_differences(job: Job, old: Outcome, new: Outcome) -> list[str]:
    """List what is wrong with a job's outcomes; nothing: they are equal."""
    faults = [fault for fault in (old.fault, new.fault) if fault]
    if faults:
        return faults
    differences = []
    for path in job.leaves:
        difference = compare_file(path, old.folder, new.folder)
        if difference:
            differences.append(difference)
    return differences


def compare_job(job: Job, old_tree: Tree, new_tree: Tree, root: Path) -> bool:
    """Run a job in both trees at once and print its row; say whether they leave the same."""
    with ThreadPoolExecutor(2) as pool:
        old_run = pool.submit(run_job, job, old_tree, root)
        new_run = pool.submit(run_job, job, new_tree, root)
    old = old_run.result()
    new = new_run.result()
    differences = list_differences(job, old, new)
    result = "different" if differences else "equal"
    times = f"{old.seconds:>12.1f}{new.seconds:>7.1f}"
    print(f"{job.name:<24}{len(job.leaves):>6}  {result:<10}{times}", flush=True)
    for difference in differences:
        print(f"    {difference}", flush=True)
    return not differences


def compare_trees(old: Tree, new: Tree, root: Path, words: list[str]) -> int:
    """Run the jobs in both trees, print the table, give the exit code."""
    jobs = choose_jobs(words)
    started = time.perf_counter()
    root.mkdir(parents=True)
    check_tree(old, root)
    check_tree(new, root)
    make_world(old, root)

    print(f"{'job':<24}{'files':>6}  {'result':<10}{'seconds old':>12}{'new':>7}", flush=True)
    equal = 0
    for job in jobs:
        if compare_job(job, old, new, root):
            equal += 1
    seconds = time.perf_counter() - started
    print(f"{equal} of {len(jobs)} jobs equal, {seconds:.0f} s")
    return 0 if equal == len(jobs) else 1


def main(arguments: list[str]) -> int:
    """Do what the arguments ask: compare OLD NEW FOLDER [WORD ...], or world FOLDER."""
    if arguments[0] == "world":
        write_world(Path(arguments[1]))
        return 0
    old, new, root = (Path(argument).resolve() for argument in arguments[1:4])
    return compare_trees(Tree("old", old), Tree("new", new), root, arguments[4:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
