"""Audit what training did to a model's general abilities.

python experiments/analysis/audit.py --model DIR --before DIR [--tasks ifeval,gsm8k,mmlu]

It runs IFEval, GSM8K, MBPP, HumanEval and MMLU by lm-evaluation-harness (pip install
"recr1[audit]"), both models under the same settings, which are printed and kept: task and its
version, few-shot examples, chat template on or off, limit. A score depends on all of them: compare
differences, not these scores with those of others. The difference is paired, document by document;
its standard error is that of a mean of such differences (clustered by document where a document
counts several times, as IFEval's instructions do). MBPP and HumanEval run code that the model
writes, which is asked about first.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch

from recr1.cli import parse_natural, parse_positive
from recr1.config.schema import ConfigError
from recr1.distributed.printing import print_rank0
from recr1.training.launch import run_command
from recr1.utils.files import write_text
from recr1.utils.hf_hub import load_tokenizer, resolve_model_folder

TASKS = "ifeval,gsm8k,mbpp,humaneval,mmlu"
# of lm-eval's own results: what was run
RUN_FIELDS = ("versions", "n-shot", "n-samples")

NUMBERS = (bool, int, float, np.number, np.bool_)
SEEDS = ("random_seed", "numpy_seed", "torch_seed", "fewshot_seed")


def build_parser() -> argparse.ArgumentParser:
    """Define the command line."""
    parser = argparse.ArgumentParser(prog="audit.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model",
        metavar="DIR",
        required=True,
        help="the model after training: a Hugging Face folder or hub id",
    )
    parser.add_argument(
        "--before",
        metavar="DIR",
        help="the model before training; without it there are scores and no differences",
    )
    parser.add_argument(
        "--tasks", default=TASKS, metavar="T,...", help=f"lm-eval's names; default {TASKS}"
    )
    parser.add_argument("--include-path", metavar="DIR", help="a folder of task files of your own")
    parser.add_argument(
        "--chat-template",
        action="store_true",
        help="prompts as chats; default: plain text, as upstream ran it",
    )
    parser.add_argument(
        "--fewshot", type=parse_natural, metavar="N", help="default: the task's own number"
    )
    parser.add_argument(
        "--limit", type=parse_positive, metavar="N", help="only the first N documents of each task"
    )
    parser.add_argument("--batch-size", type=parse_positive, default=8, metavar="N")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="default: the checkpoint's",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--confirm-unsafe-code",
        action="store_true",
        help="let tasks run code that the model writes, on this machine",
    )
    parser.add_argument("--out", metavar="F.json", help="settings and figures as one JSON object")
    return parser


def main(argv: list[str]) -> None:
    """Run the audit, print its table and write its figures."""
    args = build_parser().parse_args(argv)
    result = audit_models(args)
    table = format_table(result)
    print_rank0(table)
    if args.out:
        text = json.dumps(result, indent=1)
        write_text(Path(args.out), text + "\n")


def audit_models(args: argparse.Namespace) -> dict:
    """Run every task on both models.

    Returns:
        {"settings", "rows"}, ready for JSON: for each task and metric the scores and their paired
        difference.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as e:
        raise ConfigError(
            f"{e.name} is not installed; the audit needs lm-evaluation-harness: "
            'pip install "recr1[audit]"'
        ) from None
    folders = resolve_models(args)
    template_hashes = hash_templates(folders) if args.chat_template else {}

    # What may not run, or lacks its data, is reported before a model is loaded.
    tasks = split_tasks(args.tasks)
    manager = TaskManager(include_path=args.include_path)
    leaves_by_task = {}
    all_leaves: set[str] = set()
    for name in tasks:
        task_leaves = list_leaf_tasks(manager.task_index, name)
        leaves_by_task[name] = task_leaves
        all_leaves.update(task_leaves)
    leaves = sorted(all_leaves)
    unsafe = [name for name in leaves if runs_code(manager.task_index, name)]
    if unsafe:
        confirm_unsafe_code(unsafe, tasks, args.confirm_unsafe_code)
    for name in tasks:
        load_task(manager, name)

    runs = {}
    for name, folder in folders.items():
        print_rank0(f"audit: {name}: {folder}")
        runs[name] = lm_eval.simple_evaluate(
            model="hf",
            model_args=dict(pretrained=folder, dtype=args.dtype),
            tasks=tasks,
            num_fewshot=args.fewshot,
            batch_size=args.batch_size,
            device=args.device,
            limit=args.limit,
            apply_chat_template=args.chat_template,
            task_manager=manager,
            confirm_run_unsafe_code=bool(unsafe),
        )
    check_same_settings(runs)
    settings = collect_settings(
        args,
        runs["after"],
        names=[*tasks, *leaves],
        leaves=leaves,
        template_hashes=template_hashes,
        unsafe=unsafe,
    )

    return dict(settings=settings, rows=compare_tasks(leaves_by_task, runs))


def resolve_models(args: argparse.Namespace) -> dict[str, str]:
    """Return the folder of each model, in the order in which they run."""
    after = resolve_model_folder(args.model)
    if not args.before:
        return dict(after=after)
    before = resolve_model_folder(args.before)
    return dict(before=before, after=after)


def split_tasks(text: str) -> list[str]:
    """Split a list of tasks; one that is named twice is run once."""
    names = []
    for part in text.split(","):
        name = part.strip()
        if name not in names:
            names.append(name)
    return names


def compare_tasks(leaves_by_task: dict[str, list[str]], runs: dict[str, dict]) -> list[dict]:
    """Return the rows of compare_scores of all tasks."""
    rows = []
    for name, leaves in leaves_by_task.items():
        if name in runs["after"]["results"]:
            rows += compare_scores(name, leaves, runs)
        else:  # a tag has no score of its own: its tasks have
            for leaf in leaves:
                rows += compare_scores(leaf, [leaf], runs)
    return rows


def check_same_settings(runs: dict[str, dict]) -> None:
    """Raise ConfigError where lm-eval ran the two models under different settings."""
    if "before" not in runs:
        return
    for key in RUN_FIELDS:
        before = runs["before"][key]
        after = runs["after"][key]
        if before != after:
            raise ConfigError(
                f"lm-eval's {key} differ between the two models: {before} and {after}; "
                "they cannot be compared"
            )


def collect_settings(
    args: argparse.Namespace,
    result: dict,
    names: list[str],
    leaves: list[str],
    template_hashes: dict[str, str],
    unsafe: list[str],
) -> dict:
    """Return all that a score depends on.

    Args:
        result: what lm-eval returned for one of the models.
        names: the tasks, groups and leaves that were run.
        leaves: those of them that have documents.
        unsafe: those of them that run code of the model's.
    """
    import lm_eval
    import transformers

    tasks = {}
    for name in names:
        version = result["versions"].get(name)
        fewshot = result["n-shot"].get(name)
        tasks[name] = dict(version=version, fewshot=fewshot)
    documents = {}
    for name in leaves:
        documents[name] = result["n-samples"][name]["effective"]
    seeds = {key: result["config"][key] for key in SEEDS}
    versions = dict(
        lm_eval=lm_eval.__version__,
        transformers=transformers.__version__,
        torch=torch.__version__,
    )
    return dict(
        model=args.model,
        before=args.before,
        tasks=tasks,
        documents=documents,
        chat_template=args.chat_template,
        chat_template_sha256=template_hashes,
        limit=args.limit,
        fewshot=args.fewshot,
        batch_size=args.batch_size,
        dtype=args.dtype,
        device=args.device,
        unsafe_code=unsafe,
        seeds=seeds,
        versions=versions,
    )


def hash_templates(folders: dict[str, str]) -> dict[str, str]:
    """Return {name: SHA-256 of the chat template} of the models' folders."""
    template_hashes = {}
    for name, folder in folders.items():
        template = load_tokenizer(folder).chat_template
        digest = hashlib.sha256(template.encode())
        template_hashes[name] = digest.hexdigest()
    return template_hashes


def list_leaf_tasks(index: dict, name: str) -> list[str]:
    """List the tasks that a task, group or tag of lm-eval's index stands for.

    Raises ConfigError for a name that the index has not.
    """
    if name not in index:
        raise ConfigError(
            f"--tasks: lm-eval has no {name!r}; `lm-eval ls tasks` lists all of them, "
            "--include-path adds a folder of yours"
        )
    entry = index[name]
    if entry.kind.name == "GROUP":
        members = (entry.cfg or {}).get("task")
    elif entry.kind.name == "TAG":
        members = sorted(entry.tags)
    else:
        members = None
    if members is None:
        return [name]
    leaves: dict[str, None] = {}  # in order, each once
    for member in members:
        if not isinstance(member, str):
            member = member.get("task") or member.get("group")
        member_leaves = list_leaf_tasks(index, member)
        leaves.update(dict.fromkeys(member_leaves))
    return list(leaves)


def runs_code(index: dict, name: str) -> bool:
    """Return whether a task runs code that the model writes.

    It is read from the task's file, functions unresolved: HumanEval's code runs some as soon as its
    task is loaded.
    """
    config = index[name].cfg or {}
    return bool(config.get("unsafe_code"))


def confirm_unsafe_code(unsafe: list[str], tasks: list[str], confirmed: bool) -> None:
    """Return when the user has agreed that code written by the model runs here.

    Raises ConfigError where the user has not.
    """
    names = ", ".join(unsafe)
    verb = "runs" if len(unsafe) == 1 else "run"
    what = f"{names} {verb} code that the model writes, on this machine and as this user"
    if not confirmed and sys.stdin.isatty():
        print_rank0(f"audit: {what}. Best in a container without network or secrets.")
        answer = input("Type yes to run it: ")
        confirmed = answer.strip() == "yes"
    if not confirmed:
        safe_tasks = [name for name in tasks if name not in unsafe] or ["gsm8k"]
        raise ConfigError(
            f"{what}; add --confirm-unsafe-code to allow it, or leave it out: "
            f"--tasks {','.join(safe_tasks)}"
        )
    os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # the metric itself asks a second time


def load_task(manager, name: str) -> None:
    """Load a task and its data. Raises ConfigError for what cannot be had."""
    try:
        manager.load([name])
    except ImportError as e:
        raise ConfigError(f'{name}: needs {e.name or e}; pip install "recr1[audit]"') from None
    except Exception as e:  # whatever the hub, datasets, nltk or the task's own code raise
        words = str(e).split()
        message = " ".join(words)[:200]
        raise ConfigError(
            f"{name}: lm-eval cannot load it ({type(e).__name__}: {message}); "
            "its data come from the Hugging Face hub: go online once, or fill HF_HOME"
        ) from None


def compare_scores(name: str, leaves: list[str], runs: dict[str, dict]) -> list[dict]:
    """Return one row per metric of a task or group.

    A row is {task, metric, n, after, stderr}, with both models also {before, difference,
    difference_stderr}.
    """
    rows = []
    for key, value in runs["after"]["results"][name].items():
        metric, _, filter_name = key.partition(",")
        is_number = isinstance(value, (int, float))
        if not filter_name or metric.endswith("_stderr") or not is_number:
            continue
        scores = {}
        logged = {}
        for run, result in runs.items():
            scores[run] = collect_documents(result, leaves, metric, filter_name)
            logged[run] = float(result["results"][name][key])
        higher_is_better = runs["after"]["higher_is_better"].get(name, {})
        row = dict(
            task=name,
            metric=key,
            n=len(scores["after"]),
            after=logged["after"],
            higher_is_better=higher_is_better.get(metric),
        )
        # A score that is no mean over documents has no standard error here.
        is_mean = are_means(scores, logged)
        row["stderr"] = None
        if is_mean:
            total, weight = sum_values(scores["after"])
            row["stderr"] = compute_stderr(total, weight)
        if "before" in runs:
            row["before"] = logged["before"]
            row["difference"] = logged["after"] - logged["before"]
            if scores["before"].keys() != scores["after"].keys():
                raise ConfigError(
                    f"{name}: the two models were not asked the same documents; run the audit again"
                )
            row["difference_stderr"] = compute_difference_stderr(scores) if is_mean else None
        rows.append(row)
    return rows


def are_means(scores: dict[str, dict[tuple, list[float]]], logged: dict[str, float]) -> bool:
    """Return whether the score of every run is the mean of its documents' values."""
    if not scores["after"]:
        return False
    for run, documents in scores.items():
        mean = compute_mean(documents)
        if not math.isclose(mean, logged[run], abs_tol=1e-6):
            return False
    return True


def compute_difference_stderr(scores: dict[str, dict[tuple, list[float]]]) -> float | None:
    """Return the standard error of the paired difference of two models' means.

    Returns None where a document has not as many values for both.
    """
    before_documents = {document: scores["before"][document] for document in scores["after"]}
    before, before_weight = sum_values(before_documents)
    after, after_weight = sum_values(scores["after"])
    if not np.array_equal(before_weight, after_weight):
        return None
    return compute_stderr(after - before, before_weight)


def collect_documents(
    result: dict, leaves: list[str], metric: str, filter_name: str
) -> dict[tuple, list[float]]:
    """Return {(task, document number, its hash): its values}; a number is one value.

    Returns {} where some document's values are no numbers.
    """
    documents = {}
    for leaf in leaves:
        for sample in result["samples"][leaf]:
            if sample["filter"] != filter_name or metric not in sample:
                continue
            values = sample[metric]
            if not isinstance(values, (list, tuple)):
                values = [values]
            if not all(isinstance(value, NUMBERS) for value in values):
                return {}
            document = (leaf, sample["doc_id"], sample["doc_hash"])
            documents[document] = [float(value) for value in values]
    return documents


def sum_values(documents: dict[tuple, list[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum and the number of the values of every document, (n,) each."""
    totals = []
    counts = []
    for values in documents.values():
        totals.append(sum(values))
        counts.append(len(values))
    return np.array(totals), np.array(counts, dtype=float)


def compute_mean(documents: dict[tuple, list[float]]) -> float:
    """Return the mean of all values; NaN for none."""
    total, weight = sum_values(documents)
    if not weight.sum():
        return math.nan
    return float(total.sum() / weight.sum())


def compute_stderr(total: np.ndarray, weight: np.ndarray) -> float | None:
    """Return the standard error of sum(total) / sum(weight) over n documents, each drawn whole.

    With weights of 1 it is that of a mean. None for n < 2.
    """
    n = len(total)
    if n < 2:
        return None
    total_weight = weight.sum()
    residual = total - total.sum() / total_weight * weight
    sum_of_squares = (residual**2).sum()
    return float(math.sqrt(n / (n - 1) * sum_of_squares) / total_weight)


def format_table(result: dict) -> str:
    """Format the settings and a line per task and metric."""
    settings = result["settings"]
    has_both = settings["before"] is not None
    lines = [format_settings(settings)]
    template_hashes = set(settings["chat_template_sha256"].values())
    if len(template_hashes) > 1:
        lines.append(
            "the two models have different chat templates: the difference is that of model and "
            "template together"
        )
    header = f"{'task':<18}{'metric':<34}{'version':>8}{'shots':>6}{'n':>7}"
    if has_both:
        lines.append(f"{header}{'before':>9}{'after':>9}{'difference':>12}  standard error")
    else:
        lines.append(f"{header}{'after':>9}  standard error")
    for row in result["rows"]:
        task = settings["tasks"].get(row["task"], {})
        version = str(task.get("version"))
        shots = str(task.get("fewshot"))
        line = f"{row['task']:<18}{row['metric']:<34}{version:>8}{shots:>6}{row['n']:>7}"
        if has_both:
            line += f"{row['before']:9.4f}{row['after']:9.4f}{row['difference']:+12.4f}"
            error = row["difference_stderr"]
        else:
            line += f"{row['after']:9.4f}"
            error = row["stderr"]
        error_text = "no mean over documents" if error is None else f"{error:.4f}"
        lines.append(f"{line}  {error_text}")
    return "\n".join(lines)


def format_settings(settings: dict) -> str:
    """Format what all scores depend on, in one line."""
    versions = settings["versions"]
    template = "on" if settings["chat_template"] else "off"
    fewshot = settings["fewshot"]
    shots = "as each task says" if fewshot is None else fewshot
    documents = "all documents"
    if settings["limit"] is not None:
        documents = f"first {settings['limit']} documents of each task"
    return (
        f"lm-eval {versions['lm_eval']}, transformers {versions['transformers']}, "
        f"torch {versions['torch']}; chat template {template}, few-shot {shots}, {documents}, "
        f"{settings['dtype']} on {settings['device']}"
    )


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
