"""The `recr1` command: score queries as they are or rewritten by a policy, look at a search, a
rewrite, a logged step.

It reads files, plain or .gz, as data/readers.py does. With --json the last line of the output is
one JSON object. `recr1 eval` also runs under torchrun.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

import numpy as np
import torch

from recr1 import doctor, report
from recr1.commands import compare_losses, explain, score_completions
from recr1.commands.merge import run_merge
from recr1.commands.rewrite import Rewriter
from recr1.commands.search import (
    add_corpus_flags,
    format_hits,
    format_row,
    make_retriever,
    parse_metrics,
    print_json,
    read_judged_files,
    read_texts,
    run_eval_queries,
    run_index,
    run_search,
    score_queries,
    summarize_scores,
)
from recr1.config import loader as configs
from recr1.config.schema import ConfigError
from recr1.data.chat_template import make_prompts
from recr1.data_types import Prompt
from recr1.distributed import collectives as dist
from recr1.distributed.printing import print_rank0
from recr1.memory.plan import make_plan, parse_bytes
from recr1.training.checks import check_lengths
from recr1.training.dry_run import read_model_shape
from recr1.training.launch import run_guarded
from recr1.utils.exits import end_process
from recr1.utils.renamed import RENAMED_FLAGS
from recr1.utils.terminal import make_printable


def main(argv: list[str]) -> None:
    """Parse the command line and run its command."""
    parser = build_parser()
    args, overrides = parser.parse_known_args(argv)
    for flag in overrides:
        if flag in RENAMED_FLAGS:
            parser.error(f"{flag} is called {RENAMED_FLAGS[flag]} now")
    args.overrides = overrides
    takes_overrides = args.run in (run_plan, run_reward)
    has_unknown_flag = any(text.startswith("-") for text in overrides)
    if overrides and (has_unknown_flag or not takes_overrides):
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    args.run(args)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands, in the order in which --help lists them."""
    parser = argparse.ArgumentParser(
        prog="recr1",
        description="Rec-R1: queries, rewrites and what a retriever makes of them. "
        "Training: python -m recr1.train CONFIG.yaml",
    )
    commands = parser.add_subparsers(
        title="commands (recr1 COMMAND --help)", required=True, metavar="COMMAND"
    )
    add_index_command(commands)
    add_eval_queries_command(commands)
    add_eval_command(commands)
    add_search_command(commands)
    add_generate_command(commands)
    add_reward_command(commands)
    add_losses_command(commands)
    add_explain_command(commands)
    add_doctor_command(commands)
    add_report_command(commands)
    add_plan_command(commands)
    add_merge_command(commands)
    return parser


# --- the commands and their flags -----------------------------------------------------------------


def add_command(
    commands: argparse._SubParsersAction,
    name: str,
    run: Callable[[argparse.Namespace], None],
    summary: str,
    details: str = "",
    usage: str | None = None,
) -> argparse.ArgumentParser:
    """Add a command without flags. The summary is listed by `recr1 --help`, the details are not."""
    description = f"{summary}; {details}" if details else summary
    parser = commands.add_parser(name, help=summary, description=description, usage=usage)
    parser.set_defaults(run=run)
    return parser


def add_index_command(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "index",
        run_index,
        "make or check the index of a corpus",
        "for runs and the other commands",
    )
    add_corpus_flags(parser)


def add_eval_queries_command(commands: argparse._SubParsersAction) -> None:
    parser = add_command(commands, "eval-queries", run_eval_queries, "score queries as they are")
    add_corpus_flags(parser)
    add_judgement_flags(parser)


def add_eval_command(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "eval",
        run_eval,
        "rewrite queries with a policy, then score them",
        "also by torchrun -m recr1.cli",
    )
    add_policy_flags(parser)
    add_corpus_flags(parser)
    add_judgement_flags(parser)


def add_search_command(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "search",
        run_search,
        "the best hits of one query",
        "and what each matched term contributed",
    )
    add_corpus_flags(parser)
    parser.add_argument("query", type=check_utf8)
    parser.add_argument("-k", type=parse_positive, default=10, help="how many")


def add_generate_command(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "generate",
        run_generate,
        "a policy's answer to one query",
        "shown as it is sampled; with --corpus both hit lists",
    )
    add_policy_flags(parser)
    add_corpus_flags(parser, required=False)
    parser.add_argument("query", type=check_utf8)
    parser.add_argument("-k", type=parse_positive, default=5, help="hits of each list")
    parser.add_argument(
        "--temperature",
        type=parse_temperature,
        default=0.0,
        metavar="T",
        help="draw at this temperature; default 0: the most likely token each time",
    )
    parser.add_argument(
        "--seed",
        type=parse_natural,
        metavar="N",
        help="of the draws, which are the same again for the same seed; default 0",
    )


def add_reward_command(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "reward",
        run_reward,
        "score stored completions: each part of the reward",
        usage="recr1 reward --config X --completions F [--json] [a.b=value ...]",
    )
    parser.add_argument(
        "--config",
        metavar="X",
        required=True,
        help="a training's; its task, data, retriever and reward are used, no model",
    )
    parser.add_argument(
        "--completions",
        metavar="F",
        required=True,
        help='JSONL[.gz] {"id": query id, "text": completion}, such as a run\'s eval_after.jsonl',
    )
    add_json_flag(parser, "one JSON object on the last line, with a row for each completion")


def add_losses_command(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands, "losses", run_losses, "one logged step of a run under every loss"
    )
    add_logged_step_flags(parser)
    parser.add_argument(
        "--new",
        metavar="DIR",
        help="model folder of a later moment: the new log-probs come from it, "
        "and gradients of its parameters",
    )
    add_json_flag(parser)


def add_explain_command(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "explain",
        run_explain,
        "one logged step from prompt to gradient",
        "worked again and held against the log; exit code 1 where it disagrees",
    )
    add_logged_step_flags(parser)
    parser.add_argument(
        "--prompt", metavar="ID", help="the one to show; default: whose rewards lie furthest apart"
    )
    add_json_flag(parser)


def add_doctor_command(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "doctor",
        run_doctor,
        "what a run here would take, what clashes and what to do",
        "exit code 1 when something will not work "
        "(python -m recr1.doctor where this command does not even start)",
    )
    parser.add_argument(
        "--run",
        dest="folder",
        metavar="RUN",
        default="runs/run",
        help="the folder that a run would write to; default: runs/run",
    )
    parser.add_argument(
        "--gpu",
        action="store_true",
        help="run on the GPU, in about two minutes, what must be right there "
        "(experiments/gpu_day.py of a checkout)",
    )
    add_json_flag(parser)


def add_report_command(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "report",
        run_report,
        "a run as one HTML page, needing no network; two runs compared",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or two")
    parser.add_argument(
        "--out",
        metavar="F",
        default="",
        help="default: RUN/report.html, of two runs RUN/compare_OTHER.html",
    )


def add_plan_command(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands,
        "plan",
        run_plan,
        "the memory that a training needs by phase",
        "and what to set so that it fits",
        usage="recr1 plan CONFIG --gpus N --memory 48GB [a.b=value ...]",
    )
    parser.add_argument(
        "config",
        metavar="CONFIG",
        help="a training's; the model's shape comes from its folder "
        "or from shapes.yaml beside the config, in configs/ beside it or in the folder above",
    )
    parser.add_argument(
        "--gpus", type=parse_positive, required=True, metavar="N", help="how many, one rank each"
    )
    parser.add_argument(
        "--memory", required=True, metavar="48GB", help="of each; GB is 10^9 bytes, GiB 2^30"
    )


def add_merge_command(commands: argparse._SubParsersAction) -> None:
    parser = add_command(
        commands, "merge", run_merge, "a model and its LoRA adapter as one plain model"
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="a folder or a hub id")
    parser.add_argument("--adapter", required=True, metavar="DIR", help="a run's, or PEFT's")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder")


# --- flags that several commands have -------------------------------------------------------------


def add_judgement_flags(parser: argparse.ArgumentParser) -> None:
    """Add --queries, --qrels, --metrics and --json."""
    parser.add_argument("--queries", metavar="F", required=True, help='JSONL[.gz] {"id", "text"}')
    parser.add_argument(
        "--qrels",
        metavar="F",
        required=True,
        help="TSV[.gz]: query id, document id, gain; "
        "queries without a judgement are left out, aloud",
    )
    parser.add_argument(
        "--metrics",
        type=parse_metrics,
        default="ndcg@10,ndcg@100,recall@100",
        metavar="M",
        help="of ndcg@K, recall@K, mrr@K, hit@K",
    )
    add_json_flag(parser)


def add_policy_flags(parser: argparse.ArgumentParser) -> None:
    """Add --model and --config."""
    parser.add_argument("--model", metavar="DIR", required=True, help="model folder or hub id")
    parser.add_argument(
        "--config",
        metavar="X",
        help="YAML with the prompt it was trained with; default: DIR/recr1.yaml",
    )


def add_logged_step_flags(parser: argparse.ArgumentParser) -> None:
    """Add --run and --step."""
    parser.add_argument("--run", dest="folder", metavar="RUN", required=True, help="a run's folder")
    parser.add_argument(
        "--step",
        type=parse_positive,
        required=True,
        help="a step whose tokens were logged (log.tokens_every)",
    )


def add_json_flag(
    parser: argparse.ArgumentParser, help_text: str = "one JSON object on the last line"
) -> None:
    parser.add_argument("--json", action="store_true", help=help_text)


def parse_positive(text: str) -> int:
    """Parse a whole number from 1. Raises argparse.ArgumentTypeError."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, is {text!r}")
    return int(text)


def parse_natural(text: str) -> int:
    """Parse a whole number from 0 to 2^63 - 1. Raises argparse.ArgumentTypeError."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 2^63 - 1, is {text!r}")
    return int(text)


def parse_temperature(text: str) -> float:
    """Parse 0 or a number from 0.001 to 1000. Raises argparse.ArgumentTypeError."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not (value == 0 or 1e-3 <= value <= 1e3):
        raise argparse.ArgumentTypeError(f"must be 0 or a number from 0.001 to 1000, is {text!r}")
    return value


def check_utf8(text: str) -> str:
    """Return the text. Raises argparse.ArgumentTypeError for bytes that are no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes that the shell passed on as they were
        raise argparse.ArgumentTypeError(f"is not UTF-8: {text!r}") from None
    return text


# --- what the commands do -------------------------------------------------------------------------


def run_eval(args: argparse.Namespace) -> None:
    """`recr1 eval`: score queries as they are, and rewritten by a policy. A collective."""
    # Whatever is wrong with the files or the model fails here, on every rank.
    with dist.fail_together():
        queries, qrels = read_judged_files(args)
        retriever = None
        if dist.rank() == 0:
            retriever = make_retriever(args)
        rewriter = Rewriter(args.model, args.config)
        max_prompt_tokens = rewriter.config.prompt.max_tokens
        rows = {query_id: dict(text=text) for query_id, text in queries.items()}
        prompts, too_long = make_prompts(
            rows, lambda row: (row["text"],), rewriter.chat, max_prompt_tokens, "drop"
        )

    rewrite_of = rewrite_on_all_ranks(rewriter, prompts)
    if dist.rank() != 0:
        return

    gains = [qrels[query_id] for query_id in queries]
    raw_queries = list(queries.values())
    rewrites = [rewrite_of.get(query_id) for query_id in queries]
    assert retriever is not None  # rank 0 has made it
    raw_scores = score_queries(retriever, raw_queries, gains, args.metrics)
    rewritten_scores = score_queries(retriever, rewrites, gains, args.metrics)
    difference = {name: rewritten_scores[name] - raw_scores[name] for name in raw_scores}
    unparsable = rewrites.count(None) - len(too_long)

    print_score_table("raw", raw_scores)
    print_score_table("rewritten", rewritten_scores)
    print_score_table("difference", difference, sign="+")
    print_rank0(
        f"unparsable answers: {unparsable} of {len(queries)}; "
        f"prompts over {max_prompt_tokens} tokens, scored 0: {len(too_long)}"
    )
    result = dict(
        n=len(queries),
        **summarize_scores(rewritten_scores),
        raw=summarize_scores(raw_scores),
        difference=summarize_scores(difference),
        unparsable=unparsable,
        too_long=len(too_long),
    )
    print_json(args, result)


def rewrite_on_all_ranks(rewriter: Rewriter, prompts: list[Prompt]) -> dict[str, str | None]:
    """Rewrite the prompts' queries, each rank its share.

    Rank 0 gets {query id: rewrite, None where the answer holds none}; the other ranks get {}.
    """
    local_prompts = dist.split_across_ranks(prompts)
    local_rewrites = rewriter.rewrite(local_prompts)
    local_rewrite_of = {
        prompt.id: rewrite for prompt, rewrite in zip(local_prompts, local_rewrites)
    }
    rewrite_of = {}
    for rewrites_of_rank in dist.gather_to_rank0(local_rewrite_of) or []:
        rewrite_of.update(rewrites_of_rank)
    return rewrite_of


def print_score_table(title: str, scores: dict[str, np.ndarray], sign: str = "") -> None:
    lines = [title]
    for name, values in scores.items():
        lines.append(format_row(name, values, sign))
    print_rank0("\n".join(lines))


def run_generate(args: argparse.Namespace) -> None:
    """`recr1 generate`: sample one answer, and search with it. Raises ConfigError."""
    if args.seed is not None and not args.temperature:
        raise ConfigError("--seed: nothing is drawn at temperature 0; add --temperature 1")
    rewriter = Rewriter(args.model, args.config)
    prompt = rewriter.make_prompt(args.query)
    # The corpus is read first: an error in it is reported before anything is sampled.
    if args.corpus:
        retriever = make_retriever(args)
        texts = read_texts(args)

    rollout = rewriter.stream_answer(prompt, args.temperature, args.seed or 0, print_now)
    query, error = rewriter.parse_answer(rollout)
    if query is None:
        cut = ""
        if not rollout.finished:
            cut = f"; it was cut at sampling.max_new_tokens = {len(rollout.ids)}"
        raise ConfigError(
            f"the policy's answer holds no query ({error}){cut}; "
            "is its prompt the one it was trained with?"
        )

    print_rank0(make_printable(query))
    if args.corpus:
        for title, words in (("raw", args.query), ("rewritten", query)):
            hits = format_hits(retriever, texts, words, args.k)
            print_rank0(f"\n{title}: {make_printable(words)}\n{hits}")


def run_losses(args: argparse.Namespace) -> None:
    """`recr1 losses`: compare the losses on one logged step."""
    result = compare_losses.compare_losses(args.folder, args.step, args.new)
    print_rank0(compare_losses.format_comparison(result))
    print_json(args, result)


def run_explain(args: argparse.Namespace) -> None:
    """`recr1 explain`: work one logged step again. Exit code 1 where the log disagrees."""
    text, result = explain.explain_step(args.folder, args.step, args.prompt)
    print_rank0(make_printable(text, keep="\n"))
    print_json(args, result)
    if not result["agrees"]:
        sys.exit(1)


def run_doctor(args: argparse.Namespace) -> None:
    """`recr1 doctor`: check the machine."""
    exit_code = doctor.main(args.folder, args.json, args.gpu)
    sys.exit(exit_code)


def run_report(args: argparse.Namespace) -> None:
    """`recr1 report`: write the HTML page and print its path."""
    path = report.write_report(args.runs, args.out)
    print_rank0(str(path))


def run_reward(args: argparse.Namespace) -> None:
    """`recr1 reward`: score stored completions as a config's training does."""
    cfg = configs.load_config(args.config, args.overrides)
    result = score_completions.score_completions(cfg, args.completions)
    print_rank0(score_completions.format_scores(result))
    print_json(args, result)


def run_plan(args: argparse.Namespace) -> None:
    """`recr1 plan`: print the memory of a training. Raises ConfigError where it does not fit."""
    memory = parse_bytes(args.memory)
    cfg = configs.load_config(args.config, args.overrides)
    shape = read_model_shape(cfg.model.path, args.config)
    check_lengths(cfg, shape.max_position_embeddings)
    text, why_not = make_plan(cfg, shape, args.gpus, memory)
    print_rank0(text)
    if why_not:
        raise ConfigError(why_not)


def print_now(text: str) -> None:
    """Print a piece of a line at once."""
    sys.stdout.write(make_printable(text, keep="\n"))
    sys.stdout.flush()


# --- the process ----------------------------------------------------------------------------------


def run_console_script() -> NoReturn:
    """Run the command of sys.argv, and end the process with its exit code."""
    end_process(_run)


def _run() -> int:
    """Run the command and return the exit code."""
    torch.set_num_threads(max(1, torch.get_num_threads() // dist.local_world_size()))
    # a title that this terminal cannot write; typeshed does not say that it is a TextIOWrapper
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        exit_code = run_guarded(main, sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # `| head`: the reader has seen enough
        null_device = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null_device, sys.stdout.fileno())
        exit_code = 0
    except KeyboardInterrupt:  # what was written stands
        exit_code = 130
    return exit_code


if __name__ == "__main__":
    run_console_script()
