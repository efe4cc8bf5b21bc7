"""What training did to a model's general abilities: python experiments/audit.py --model DIR
--before DIR [--tasks ifeval,gsm8k,mmlu]

IFEval, GSM8K, MBPP, HumanEval and MMLU by lm-evaluation-harness (pip install "recr1[audit]"), both
models under the same settings, which are printed and kept: task and its version, few-shot examples,
chat template on or off, limit. A score depends on all of them: compare differences, not these
scores with those of others. The difference is paired, document by document; its standard error is
that of a mean of such differences (clustered by document where a document counts several times, as
IFEval's instructions do). MBPP and HumanEval run code that the model writes, which is asked about
first.
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
KEPT = ("versions", "n-shot", "n-samples")  # of lm-eval's own results: what was run


def main(argv: list[str]) -> None:
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
    args = parser.parse_args(argv)
    result = audit(args)
    print_rank0(table(result))
    if args.out:
        write_text(Path(args.out), json.dumps(result, indent=1) + "\n")


def audit(args) -> dict:
    """Runs every task on both models -> settings, and for each task and metric the scores and their
    paired difference. JSON-ready.
    """
    try:
        import lm_eval
        import transformers
        from lm_eval.tasks import TaskManager
    except ImportError as e:
        raise ConfigError(
            f"{e.name} is not installed; the audit needs lm-evaluation-harness: "
            'pip install "recr1[audit]"'
        ) from None
    folders = {
        name: resolve_model_folder(path)
        for name, path in (("before", args.before), ("after", args.model))
        if path
    }
    templates = (
        {
            name: hashlib.sha256(load_tokenizer(folder).chat_template.encode()).hexdigest()
            for name, folder in folders.items()
        }
        if args.chat_template
        else {}
    )
    tasks = list(dict.fromkeys(name.strip() for name in args.tasks.split(",")))
    manager = TaskManager(include_path=args.include_path)
    index = manager.task_index
    leaves = {name: leaf_tasks(index, name) for name in tasks}
    names = sorted({leaf for found in leaves.values() for leaf in found})
    if unsafe := [name for name in names if runs_code(index, name)]:
        allow(unsafe, tasks, args.confirm_unsafe_code)
    for name in tasks:
        load(manager, name)  # what a task lacks is said before a model is loaded
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
    after = runs["after"]
    settings = dict(
        model=args.model,
        before=args.before,
        tasks={
            name: dict(version=after["versions"].get(name), fewshot=after["n-shot"].get(name))
            for name in (*tasks, *names)
        },
        documents={name: after["n-samples"][name]["effective"] for name in names},
        chat_template=args.chat_template,
        chat_template_sha256=templates,
        limit=args.limit,
        fewshot=args.fewshot,
        batch_size=args.batch_size,
        dtype=args.dtype,
        device=args.device,
        unsafe_code=unsafe,
        seeds={
            key: after["config"][key]
            for key in ("random_seed", "numpy_seed", "torch_seed", "fewshot_seed")
        },
        versions=dict(
            lm_eval=lm_eval.__version__,
            transformers=transformers.__version__,
            torch=torch.__version__,
        ),
    )
    if "before" in runs:
        for key in KEPT:
            if runs["before"][key] != after[key]:
                raise ConfigError(
                    f"lm-eval's {key} differ between the two models: "
                    f"{runs['before'][key]} and {after[key]}; they cannot be compared"
                )
    rows = []
    for name, found in leaves.items():
        # a tag has no score of its own: its tasks have
        for part in [name] if name in after["results"] else found:
            rows += compared(part, found if part == name else [part], runs)
    return dict(settings=settings, rows=rows)


def leaf_tasks(index: dict, name: str) -> list[str]:
    """Names of the tasks that a task, group or tag of lm-eval's index stands for. Raises
    ConfigError for a name that it has not.
    """
    if name not in index:
        raise ConfigError(
            f"--tasks: lm-eval has no {name!r}; `lm-eval ls tasks` lists all of them, "
            "--include-path adds a folder of yours"
        )
    entry = index[name]
    parts = (
        (entry.cfg or {}).get("task")
        if entry.kind.name == "GROUP"
        else sorted(entry.tags)
        if entry.kind.name == "TAG"
        else None
    )
    if parts is None:
        return [name]
    below = [
        part if isinstance(part, str) else part.get("task") or part.get("group") for part in parts
    ]
    return list(dict.fromkeys(leaf for part in below for leaf in leaf_tasks(index, part)))


def runs_code(index: dict, name: str) -> bool:
    """Read from the task's file, functions unresolved: HumanEval's code runs some as soon as its
    task is loaded.
    """
    return bool((index[name].cfg or {}).get("unsafe_code"))


def allow(unsafe: list[str], tasks: list[str], confirmed: bool) -> None:
    """Returns when the user has agreed that code written by the model runs here; else raises
    ConfigError.
    """
    what = (
        f"{', '.join(unsafe)} run{'s' if len(unsafe) == 1 else ''} code that the model writes, "
        "on this machine and as this user"
    )
    if not confirmed and sys.stdin.isatty():
        print_rank0(f"audit: {what}. Best in a container without network or secrets.")
        confirmed = input("Type yes to run it: ").strip() == "yes"
    if not confirmed:
        rest = ",".join(name for name in tasks if name not in unsafe) or "gsm8k"
        raise ConfigError(
            f"{what}; add --confirm-unsafe-code to allow it, or leave it out: --tasks {rest}"
        )
    os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # the metric itself asks a second time


def load(manager, name: str) -> None:
    """Loads a task and its data. Raises ConfigError for what cannot be had."""
    try:
        manager.load([name])
    except ImportError as e:
        raise ConfigError(f'{name}: needs {e.name or e}; pip install "recr1[audit]"') from None
    except Exception as e:  # whatever the hub, datasets, nltk or the task's own code raise
        raise ConfigError(
            f"{name}: lm-eval cannot load it ({type(e).__name__}: "
            f"{' '.join(str(e).split())[:200]}); "
            "its data come from the Hugging Face hub: go online once, or fill HF_HOME"
        ) from None


def compared(name: str, leaves: list[str], runs: dict[str, dict]) -> list[dict]:
    """One row per metric of a task or group: {task, metric, n, after, stderr, and with both models
    before, difference, difference_stderr}.
    """
    rows = []
    for key, value in runs["after"]["results"][name].items():
        metric, _, how = key.partition(",")
        if not how or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        scores = {run: documents(result, leaves, metric, how) for run, result in runs.items()}
        n = len(scores["after"])
        row = dict(
            task=name,
            metric=key,
            n=n,
            after=float(value),
            higher_is_better=runs["after"]["higher_is_better"].get(name, {}).get(metric),
        )
        exact = all(
            n and math.isclose(mean(found), runs[run]["results"][name][key], abs_tol=1e-6)
            for run, found in scores.items()
        )
        # a score that is no mean over documents has none here
        row["stderr"] = stderr(*sums(scores["after"])) if exact else None
        if "before" in runs:
            row |= dict(
                before=float(runs["before"]["results"][name][key]),
                difference=float(value) - float(runs["before"]["results"][name][key]),
            )
            if scores["before"].keys() != scores["after"].keys():
                raise ConfigError(
                    f"{name}: the two models were not asked the same documents; run the audit again"
                )
            (before, weight), (after, other) = (
                sums({doc: found[doc] for doc in scores["after"]})
                for found in (scores["before"], scores["after"])
            )
            row["difference_stderr"] = (
                stderr(after - before, weight) if exact and np.array_equal(weight, other) else None
            )
        rows.append(row)
    return rows


def documents(result: dict, leaves: list[str], metric: str, how: str) -> dict[tuple, list[float]]:
    """{(task, document number, its hash): its values}; a number is one value. {} where some
    document's are no numbers.
    """
    found = {}
    for leaf in leaves:
        for sample in result["samples"][leaf]:
            if sample["filter"] == how and metric in sample:
                values = (
                    sample[metric]
                    if isinstance(sample[metric], (list, tuple))
                    else [sample[metric]]
                )
                if not all(isinstance(v, (bool, int, float, np.number, np.bool_)) for v in values):
                    return {}
                found[leaf, sample["doc_id"], sample["doc_hash"]] = [float(v) for v in values]
    return found


def sums(found: dict[tuple, list[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the values of every document, (n,) each."""
    return np.array([sum(v) for v in found.values()]), np.array(
        [len(v) for v in found.values()], dtype=float
    )


def mean(found: dict[tuple, list[float]]) -> float:
    total, weight = sums(found)
    return float(total.sum() / weight.sum()) if weight.sum() else math.nan


def stderr(total: np.ndarray, weight: np.ndarray) -> float | None:
    """Standard error of sum(total) / sum(weight) over n documents, each drawn whole; with weights
    of 1 that of a mean. None for n = 1.
    """
    n = len(total)
    if n < 2:
        return None
    residual = total - total.sum() / weight.sum() * weight
    return float(math.sqrt(n / (n - 1) * (residual**2).sum()) / weight.sum())


def table(result: dict) -> str:
    s = result["settings"]
    lines = [
        f"lm-eval {s['versions']['lm_eval']}, transformers {s['versions']['transformers']}, "
        f"torch {s['versions']['torch']}; "
        f"chat template {'on' if s['chat_template'] else 'off'}, "
        f"few-shot {'as each task says' if s['fewshot'] is None else s['fewshot']}, "
        f"{'all documents' if s['limit'] is None else 'first {} documents of each task'.format(s['limit'])}, "
        f"{s['dtype']} on {s['device']}"
    ]
    if len(set(s["chat_template_sha256"].values())) > 1:
        lines.append(
            "the two models have different chat templates: the difference is that of model and "
            "template together"
        )
    both = s["before"] is not None
    lines.append(
        f"{'task':<18}{'metric':<34}{'version':>8}{'shots':>6}{'n':>7}"
        + (f"{'before':>9}" if both else "")
        + f"{'after':>9}"
        + (f"{'difference':>12}  standard error" if both else "  standard error")
    )
    for row in result["rows"]:
        task = s["tasks"].get(row["task"], {})
        error = row["difference_stderr" if both else "stderr"]
        figures = (
            (f"{row['before']:9.4f}" if both else "")
            + f"{row['after']:9.4f}"
            + (f"{row['difference']:+12.4f}" if both else "")
        )
        lines.append(
            f"{row['task']:<18}{row['metric']:<34}{task.get('version')!s:>8}{task.get('fewshot')!s:>6}{row['n']:>7}{figures} "
            " "
            f"{'no mean over documents' if error is None else format(error, '.4f')}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
