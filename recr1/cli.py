"""The `recr1` command: score queries as they are or rewritten by a policy, look at a search, a
rewrite, a logged step.

Files, plain or .gz, as data/readers.py reads them. With --json the last line of the output is one JSON
object. `recr1 eval` also runs under torchrun.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import NoReturn

import torch

from recr1 import doctor, report
from recr1.commands import compare_losses, explain, score_completions
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
from recr1.distributed import collectives as dist
from recr1.distributed.printing import print_rank0
from recr1.memory.plan import make_plan, parse_bytes
from recr1.training.checks import check_lengths
from recr1.training.dry_run import read_model_shape
from recr1.training.launch import run_guarded
from recr1.utils.exits import end_process
from recr1.utils.terminal import make_printable


def main(argv: list[str]) -> None:
    args, args.overrides = build_parser().parse_known_args(argv)
    if args.overrides and (
        args.run not in (run_plan, run_reward)
        or any(text.startswith("-") for text in args.overrides)
    ):
        build_parser().error(f"unrecognized arguments: {' '.join(args.overrides)}")
    args.run(args)


def build_parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="recr1",
        description="Rec-R1: queries, rewrites and what a retriever makes of them. "
        "Training: python -m recr1.train CONFIG.yaml",
    )
    commands = top.add_subparsers(
        title="commands (recr1 COMMAND --help)", required=True, metavar="COMMAND"
    )

    def command(name: str, run, text: str, more: str = "", **options) -> argparse.ArgumentParser:
        p = commands.add_parser(
            name, help=text, description=f"{text}; {more}" if more else text, **options
        )
        p.set_defaults(run=run)
        return p

    def judged(p):
        p.add_argument("--queries", metavar="F", required=True, help='JSONL[.gz] {"id", "text"}')
        p.add_argument(
            "--qrels",
            metavar="F",
            required=True,
            help="TSV[.gz]: query id, document id, gain; queries without a judgement are left out, aloud",
        )
        p.add_argument(
            "--metrics",
            type=parse_metrics,
            default="ndcg@10,ndcg@100,recall@100",
            metavar="M",
            help="of ndcg@K, recall@K, mrr@K, hit@K",
        )
        p.add_argument("--json", action="store_true", help="one JSON object on the last line")

    def policy(p):
        p.add_argument("--model", metavar="DIR", required=True, help="model folder or hub id")
        p.add_argument(
            "--config",
            metavar="X",
            help="YAML with the prompt it was trained with; default: DIR/recr1.yaml",
        )

    p = command(
        "index",
        run_index,
        "make or check the index of a corpus",
        "for runs and the other commands",
    )
    add_corpus_flags(p)
    p = command("eval-queries", run_eval_queries, "score queries as they are")
    add_corpus_flags(p), judged(p)
    p = command(
        "eval",
        run_eval,
        "rewrite queries with a policy, then score them",
        "also by torchrun -m recr1.cli",
    )
    policy(p), add_corpus_flags(p), judged(p)
    p = command(
        "search", run_search, "the best hits of one query", "and what each matched term contributed"
    )
    add_corpus_flags(p)
    p.add_argument("query", type=check_utf8)
    p.add_argument("-k", type=parse_positive, default=10, help="how many")
    p = command(
        "generate",
        run_generate,
        "a policy's answer to one query",
        "shown as it is sampled; with --corpus both hit lists",
    )
    policy(p), add_corpus_flags(p, required=False)
    p.add_argument("query", type=check_utf8)
    p.add_argument("-k", type=parse_positive, default=5, help="hits of each list")
    p.add_argument(
        "--temperature",
        type=parse_temperature,
        default=0.0,
        metavar="T",
        help="draw at this temperature; default 0: the most likely token each time",
    )
    p.add_argument(
        "--seed",
        type=parse_natural,
        metavar="N",
        help="of the draws, which are the same again for the same seed; default 0",
    )
    p = command(
        "reward",
        run_reward,
        "score stored completions: each part of the reward",
        usage="recr1 reward --config X --completions F [--json] [a.b=value ...]",
    )
    p.add_argument(
        "--config",
        metavar="X",
        required=True,
        help="a training's; its task, data, retriever and reward are used, no model",
    )
    p.add_argument(
        "--completions",
        metavar="F",
        required=True,
        help='JSONL[.gz] {"id": query id, "text": completion}, such as a run\'s eval_after.jsonl',
    )
    p.add_argument(
        "--json",
        action="store_true",
        help="one JSON object on the last line, with a row for each completion",
    )
    p = command("losses", run_losses, "one logged step of a run under every loss")
    p.add_argument("--run", dest="folder", metavar="RUN", required=True, help="a run's folder")
    p.add_argument(
        "--step",
        type=parse_positive,
        required=True,
        help="a step whose tokens were logged (log.tokens_every)",
    )
    p.add_argument(
        "--new",
        metavar="DIR",
        help="model folder of a later moment: the new log-probs come from it, and gradients of its parameters",
    )
    p.add_argument("--json", action="store_true", help="one JSON object on the last line")
    p = command(
        "explain",
        run_explain,
        "one logged step from prompt to gradient",
        "worked again and held against the log; exit code 1 where it disagrees",
    )
    p.add_argument("--run", dest="folder", metavar="RUN", required=True, help="a run's folder")
    p.add_argument(
        "--step",
        type=parse_positive,
        required=True,
        help="a step whose tokens were logged (log.tokens_every)",
    )
    p.add_argument(
        "--prompt", metavar="ID", help="the one to show; default: whose rewards lie furthest apart"
    )
    p.add_argument("--json", action="store_true", help="one JSON object on the last line")
    p = command(
        "doctor",
        lambda args: sys.exit(doctor.main(args.folder, args.json)),
        "what a run here would take, what clashes and what to do",
        "exit code 1 when something will not work (python -m recr1.doctor where this command does not even start)",
    )
    p.add_argument(
        "--run",
        dest="folder",
        metavar="RUN",
        default="runs/run",
        help="the folder that a run would write to; default: runs/run",
    )
    p.add_argument("--json", action="store_true", help="one JSON object on the last line")
    p = command(
        "report", run_report, "a run as one HTML page, needing no network; two runs compared"
    )
    p.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or two")
    p.add_argument(
        "--out",
        metavar="F",
        default="",
        help="default: RUN/report.html, of two runs RUN/compare_OTHER.html",
    )
    p = command(
        "plan",
        run_plan,
        "the memory that a training needs by phase",
        "and what to set so that it fits",
        usage="recr1 plan CONFIG --gpus N --memory 48GB [a.b=value ...]",
    )
    p.add_argument(
        "config",
        metavar="CONFIG",
        help="a training's; the model's shape comes from its folder or from shapes.yaml beside the config",
    )
    p.add_argument(
        "--gpus", type=parse_positive, required=True, metavar="N", help="how many, one rank each"
    )
    p.add_argument(
        "--memory", required=True, metavar="48GB", help="of each; GB is 10^9 bytes, GiB 2^30"
    )
    return top


def parse_positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, is {text!r}")
    return int(text)


def parse_natural(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 2^63 - 1, is {text!r}")
    return int(text)


def parse_temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not (value == 0 or 1e-3 <= value <= 1e3):
        raise argparse.ArgumentTypeError(f"must be 0 or a number from 0.001 to 1000, is {text!r}")
    return value


def check_utf8(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes that the shell passed on as they were
        raise argparse.ArgumentTypeError(f"is not UTF-8: {text!r}") from None
    return text


def run_eval(args) -> None:
    with dist.fail_together():
        queries, qrels = read_judged_files(args)
        index = make_retriever(args) if dist.rank() == 0 else None
        rewriter = Rewriter(args.model, args.config)
        prompts, long = make_prompts(
            {id: dict(text=text) for id, text in queries.items()},
            lambda row: (row["text"],),
            rewriter.chat,
            rewriter.config.prompt.max_tokens,
            "drop",
        )
    mine = {
        p.id: query
        for p, query in zip(
            dist.split_across_ranks(prompts), rewriter.rewrite(dist.split_across_ranks(prompts))
        )
    }
    parts = dist.gather_to_rank0(mine)
    if parts is None:
        return
    rewrites = {id: query for part in parts for id, query in part.items()}
    gains = [qrels[id] for id in queries]
    raw = score_queries(index, list(queries.values()), gains, args.metrics)
    after = score_queries(index, [rewrites.get(id) for id in queries], gains, args.metrics)
    difference = {name: after[name] - raw[name] for name in raw}
    unparsable = sum(rewrites.get(id) is None for id in queries) - len(long)
    for title, values, sign in (
        ("raw", raw, ""),
        ("rewritten", after, ""),
        ("difference", difference, "+"),
    ):
        print_rank0(
            title + "\n" + "\n".join(format_row(name, v, sign) for name, v in values.items())
        )
    print_rank0(
        f"unparsable answers: {unparsable} of {len(queries)}; prompts over {rewriter.config.prompt.max_tokens} tokens, scored 0: {len(long)}"
    )
    print_json(
        args,
        dict(
            n=len(queries),
            **summarize_scores(after),
            raw=summarize_scores(raw),
            difference=summarize_scores(difference),
            unparsable=unparsable,
            too_long=len(long),
        ),
    )


def run_generate(args) -> None:
    if args.seed is not None and not args.temperature:
        raise ConfigError("--seed: nothing is drawn at temperature 0; add --temperature 1")
    rewriter = Rewriter(args.model, args.config)
    prompt = rewriter.prompt(args.query)
    # first: what is wrong with the files is said before anything is sampled
    index, texts = (make_retriever(args), read_texts(args)) if args.corpus else (None, {})
    rollout = rewriter.stream(prompt, args.temperature, args.seed or 0, print_now)
    query, error = rewriter.parsed(rollout)
    if query is None:
        cut = (
            ""
            if rollout.finished
            else f"; it was cut at sampling.max_new_tokens = {len(rollout.ids)}"
        )
        raise ConfigError(
            f"the policy's answer holds no query ({error}){cut}; is its prompt the one it was trained with?"
        )
    print_rank0(make_printable(query))
    if args.corpus:
        for title, words in (("raw", args.query), ("rewritten", query)):
            print_rank0(
                f"\n{title}: {make_printable(words)}\n{format_hits(index, texts, words, args.k)}"
            )


def run_losses(args) -> None:
    result = compare_losses.compare_losses(args.folder, args.step, args.new)
    print_rank0(compare_losses.format_comparison(result))
    print_json(args, result)


def run_explain(args) -> None:
    text, result = explain.explain_step(args.folder, args.step, args.prompt)
    print_rank0(make_printable(text, keep="\n"))
    print_json(args, result)
    if not result["agrees"]:
        sys.exit(1)


def run_report(args) -> None:
    print_rank0(str(report.write_report(args.runs, args.out)))


def run_reward(args) -> None:
    result = score_completions.score_completions(
        configs.load_config(args.config, args.overrides), args.completions
    )
    print_rank0(score_completions.format_scores(result))
    print_json(args, result)


def run_plan(args) -> None:
    memory = parse_bytes(args.memory)
    cfg = configs.load_config(args.config, args.overrides)
    shape = read_model_shape(cfg.model.path, args.config)
    check_lengths(cfg, shape.max_position_embeddings)
    text, why_not = make_plan(cfg, shape, args.gpus, memory)
    print_rank0(text)
    if why_not:
        raise ConfigError(why_not)


def print_now(text: str) -> None:
    sys.stdout.write(make_printable(text, keep="\n"))
    sys.stdout.flush()


def run_console_script() -> NoReturn:
    """The console script."""
    end_process(_run)


def _run() -> int:
    torch.set_num_threads(max(1, torch.get_num_threads() // dist.local_world_size()))
    sys.stdout.reconfigure(errors="replace")  # a title that this terminal cannot write
    try:
        code = run_guarded(main, sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # `| head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except KeyboardInterrupt:  # what was written stands
        code = 130
    return code


if __name__ == "__main__":
    run_console_script()
