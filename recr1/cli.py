"""The `recr1` command: score queries as they are or rewritten by a policy, look at a search, a rewrite, a logged step.

Files, plain or .gz, as data.py reads them. With --json the last line of the output is one JSON object. `recr1 eval` also runs under torchrun.
"""
from __future__ import annotations

import argparse
import json
import os
import re
import sys
from functools import partial

import numpy as np
import torch

from . import config_file as configs
from . import data, dist, losslab
from .answers import parse_query
from .chat import make_prompts
from .config import ConfigError
from .dryrun import model_shape
from .evaluate import mean_ci
from .log import say
from .metrics import hit_rate, ndcg, recall, reciprocal_rank
from .plan import bytes_of, plan
from .retrieval.bm25 import BM25, SCORERS, check, load_or_build
from .retrieval.index import Index
from .retrieval.postings import Parameters
from .rewriter import Rewriter
 from .run import guarded
from .weights import check_room

METRICS = {"ndcg": ndcg, "recall": recall, "mrr": reciprocal_rank, "hit": hit_rate}


def main(argv: list[str]) -> None:
    args, args.overrides = parser().parse_known_args(argv)
    if args.overrides and (args.run is not plan_memory or any(text.startswith("-") for text in args.overrides)):
        parser().error(f"unrecognized arguments: {' '.join(args.overrides)}")
    args.run(args)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="recr1", description="Rec-R1: queries, rewrites and what a retriever makes of them. "
                                  "Training: python -m recr1.train CONFIG.yaml")
    commands = top.add_subparsers(title="commands (recr1 COMMAND --help)", required=True, metavar="COMMAND")

    def command(name: str, run, text: str, **more) -> argparse.ArgumentParser:
        p = commands.add_parser(name, help=text, description=text, **more)
        p.set_defaults(run=run)
        return p

    def corpus(p, required=True):
        p.add_argument("--corpus", metavar="F", required=required, help='JSONL[.gz] {"id", "title", "text"}')
        p.add_argument("--k1", type=float, default=1.2)
        p.add_argument("--b", type=float, default=0.75)
        p.add_argument("--variant", choices=("lucene", "okapi"), default="lucene")
        p.add_argument("--length", choices=("exact", "lucene"), default="exact", help="lucene: its one-byte document lengths")
        p.add_argument("--scorer", choices=SCORERS, default="torch", help="numba: extra [fast], CPU, the faster one")
        p.add_argument("--upstream-wrapping", action="store_true", help='search "(contents:QUERY)" as the published code does: it loses the first word')
        p.add_argument("--index-dir", metavar="D", help="keep the index there; default: in memory only")

    def judged(p):
        p.add_argument("--queries", metavar="F", required=True, help='JSONL[.gz] {"id", "text"}')
        p.add_argument("--qrels", metavar="F", required=True, help="TSV[.gz]: query id, document id, gain; queries without a judgement are left out, aloud")
        p.add_argument("--metrics", type=metric_list, default="ndcg@10,ndcg@100,recall@100", metavar="M", help="of ndcg@K, recall@K, mrr@K, hit@K")
        p.add_argument("--json", action="store_true", help="one JSON object on the last line")

    def policy(p):
        p.add_argument("--model", metavar="DIR", required=True, help="model folder or hub id")
        p.add_argument("--config", metavar="X", help="YAML with the prompt it was trained with; default: DIR/recr1.yaml")
    p = command("eval-queries", eval_queries, "score queries as they are")
    corpus(p), judged(p)
    p = command("eval", eval_policy, "rewrite queries with a policy, then score them (also by torchrun -m recr1.cli)")
    policy(p), corpus(p), judged(p)
    p = command("search", search, "the best hits of one query, and what each matched term contributed")
    corpus(p)
    p.add_argument("query", type=utf8)
    p.add_argument("-k", type=positive, default=10, help="how many")
    p = command("generate", generate_one, "a policy's answer to one query, shown as it is sampled; with --corpus both hit lists")
    policy(p), corpus(p, required=False)
    p.add_argument("query", type=utf8)
    p.add_argument("-k", type=positive, default=5, help="hits of each list")
    p.add_argument("--temperature", type=temperature, default=0.0, metavar="T", help="draw at this temperature; default 0: the most likely token each time")
    p.add_argument("--seed", type=natural, metavar="N", help="of the draws, which are the same again for the same seed; default 0")
    p = command("losses", losses, "one logged step of a run under every loss")
    p.add_argument("--run", dest="folder", metavar="RUN", required=True, help="a run's folder")
    p.add_argument("--step", type=positive, required=True, help="a step whose tokens were logged (log.tokens_every)")
    p.add_argument("--new", metavar="DIR", help="model folder of a later moment: the new log-probs come from it, and gradients of its parameters")
    p.add_argument("--json", action="store_true", help="one JSON object on the last line")
    p = command("plan", plan_memory, "the memory that a training needs by phase, and what to set so that it fits",
                usage="recr1 plan CONFIG --gpus N --memory 48GB [a.b=value ...]")
    p.add_argument("config", metavar="CONFIG", help="a training's; the model's shape comes from its folder or from shapes.yaml beside the config")
    p.add_argument("--gpus", type=positive, required=True, metavar="N", help="how many, one rank each")
    p.add_argument("--memory", required=True, metavar="48GB", help="of each; GB is 10^9 bytes, GiB 2^30")
    return top


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, is {text!r}")
    return int(text)


def natural(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2 ** 63:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 2^63 - 1, is {text!r}")
    return int(text)


def temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not (value == 0 or 1e-3 <= value <= 1e3):
        raise argparse.ArgumentTypeError(f"must be 0 or a number from 0.001 to 1000, is {text!r}")
    return value


def utf8(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:                       # bytes that the shell passed on as they were
        raise argparse.ArgumentTypeError(f"is not UTF-8: {text!r}") from None
    return text


def metric_list(text: str) -> dict[str, tuple]:
    """"ndcg@10,recall@100" -> {name: (function, k)}."""
    found = {}
    for name in text.split(","):
        match = re.fullmatch(rf"({'|'.join(METRICS)})@([1-9]\d*)", name.strip())
        if not match:
            raise argparse.ArgumentTypeError(f"{name.strip()!r} is no metric; write {', '.join(METRICS)} with @K, such as ndcg@10")
        found[match[0]] = METRICS[match[1]], int(match[2])
    return found


def eval_queries(args) -> None:
    index, _ = make_index(args)
    queries, qrels = read_judged(args)
    values = scores(index, list(queries.values()), [qrels[id] for id in queries], args.metrics)
    result = dict(n=len(queries), **summary(values))
    say("\n".join(row(name, v) for name, v in values.items()))
    finish(args, result)


def eval_policy(args) -> None:
    with dist.together():
        queries, qrels = read_judged(args)
        index = make_index(args)[0] if dist.rank() == 0 else None
        rewriter = Rewriter(args.model, args.config)
        prompts, long = make_prompts(queries, rewriter.chat, rewriter.config.prompt.max_tokens, "drop")
    mine = {p.id: query for p, query in zip(dist.share(prompts), rewriter.rewrite(dist.share(prompts)))}
    parts = dist.gather(mine)
    if parts is None:
        return
    rewrites = {id: query for part in parts for id, query in part.items()}
    gains = [qrels[id] for id in queries]
    raw = scores(index, list(queries.values()), gains, args.metrics)
    after = scores(index, [rewrites.get(id) for id in queries], gains, args.metrics)
    difference = {name: after[name] - raw[name] for name in raw}
    unparsable = sum(rewrites.get(id) is None for id in queries) - len(long)
    for title, values, sign in (("raw", raw, ""), ("rewritten", after, ""), ("difference", difference, "+")):
        say(title + "\n" + "\n".join(row(name, v, sign) for name, v in values.items()))
    say(f"unparsable answers: {unparsable} of {len(queries)}; prompts over {rewriter.config.prompt.max_tokens} tokens, scored 0: {len(long)}")
    finish(args, dict(n=len(queries), **summary(after), raw=summary(raw), difference=summary(difference), unparsable=unparsable, too_long=len(long)))


def search(args) -> None:
    index, texts = make_index(args)
    say(hits(index, texts, args.query, args.k))


def generate_one(args) -> None:
    if args.seed is not None and not args.temperature:
        raise ConfigError("--seed: nothing is drawn at temperature 0; add --temperature 1")
    rewriter = Rewriter(args.model, args.config)
    prompt = rewriter.prompt(args.query)
    index, texts = make_index(args) if args.corpus else (None, {})       # first: what is wrong with the files is said before anything is sampled
    rollout = rewriter.stream(prompt, args.temperature, args.seed or 0, write_now)
    query, error = parse_query(rewriter.decode(rollout))
    if query is None:
        cut = "" if rollout.finished else f"; it was cut at sampling.max_new_tokens = {len(rollout.ids)}"
        raise ConfigError(f"the policy's answer holds no query ({error}){cut}; is its prompt the one it was trained with?")
    say(plain(query))
    if args.corpus:
        for title, words in (("raw", args.query), ("rewritten", query)):
            say(f"\n{title}: {plain(words)}\n{hits(index, texts, words, args.k)}")


def losses(args) -> None:
    result = losslab.compare(args.folder, args.step, args.new)
    say(losslab.table(result))
    finish(args, result)


def plan_memory(args) -> None:
    memory, cfg = bytes_of(args.memory), configs.load(args.config, args.overrides)
    shape = model_shape(cfg.model.path, args.config)
    check_room(cfg, shape.max_position_embeddings)
    text, why_not = plan(cfg, shape, args.gpus, memory)
    say(text)
    if why_not:
        raise ConfigError(why_not)


def make_index(args) -> tuple[BM25, dict[str, str]]:
    """The index of --corpus and its texts by document id."""
    ids, texts, _ = data.read_corpus(args.corpus)
    parameters = dict(k1=args.k1, b=args.b, variant=args.variant, length=args.length)
    how = dict(scorer=args.scorer, upstream_wrapping=args.upstream_wrapping)
    try:
        if args.index_dir:
            index = load_or_build(args.index_dir, args.corpus, **how, **parameters)
        else:
            check(args.scorer)
            index = BM25(Index.of_file(args.corpus, Parameters(**parameters), numba=args.scorer == "numba"), **how)
    except data.DataError:
        raise
    except (ValueError, OSError) as e:
        raise ConfigError(str(e)) from None
    return index, dict(zip(ids, texts))


def read_judged(args) -> tuple[dict[str, str], dict[str, dict[str, float]]]:
    """Queries that have a judgement, and the judgements. What has no partner in the other file is reported."""
    queries, (qrels, repeats) = data.read_queries(args.queries)[0], data.read_qrels(args.qrels)
    for path, other, lost in ((args.queries, args.qrels, queries.keys() - qrels.keys()), (args.qrels, args.queries, qrels.keys() - queries.keys())):
        if lost:
            say(f"recr1: {path}: {len(lost)} query ids are not in {other} and left out, first: {plain(min(lost))}")
    if repeats:
        say(f"recr1: {len(repeats)} judgements given twice, first: {plain(repeats[0])}")
    if not queries.keys() & qrels.keys():
        raise ConfigError(f"{args.queries}: none of its query ids is judged in {args.qrels}")
    return {id: text for id, text in queries.items() if id in qrels}, qrels


def scores(index: BM25, queries: list[str | None], gains: list[dict[str, float]], metrics: dict[str, tuple]) -> dict[str, np.ndarray]:
    """{metric: (Q,)}; no query (None) scores 0."""
    depth, values = min(max(k for _, k in metrics.values()), len(index.doc_ids)), {name: np.zeros(len(queries)) for name in metrics}
    asked = [i for i, query in enumerate(queries) if query is not None]
    for start in range(0, len(asked), 1024):
        at = asked[start:start + 1024]
        for i, ranking in zip(at, index.search([queries[i] for i in at], depth)[0].tolist()):
            ranked = [index.doc_ids[r] for r in ranking if r >= 0]
            for name, (metric, k) in metrics.items():
                values[name][i] = metric(ranked, gains[i], k)
    return values


def summary(values: dict[str, np.ndarray]) -> dict:
    """{"metrics": {name: mean}, "ci95": {name: [low, high]}}."""
    found = {name: mean_ci(v) for name, v in values.items()}
    return dict(metrics={name: mean for name, (mean, _) in found.items()}, ci95={name: ci for name, (_, ci) in found.items()})


def row(name: str, values: np.ndarray, sign: str = "") -> str:
    mean, (low, high) = mean_ci(values)
    return f"  {name:<12}{mean:{sign}8.4f}   95% [{low:{sign}.4f}, {high:{sign}.4f}]   n {len(values)}"


def finish(args, result: dict) -> None:
    if args.json:
        say(json.dumps(result))


def hits(index: BM25, texts: dict[str, str], query: str, k: int) -> str:
    """The best k as text: rank, score, id, the document's beginning; below it what each matched term adds to the score."""
    rows, found = index.search([query], min(k, len(index.doc_ids)))
    lines = []
    for rank, (r, score) in enumerate(zip(rows[0].tolist(), found[0].tolist()), 1):
        if r >= 0:
            id = index.doc_ids[r]
            lines.append(f"{rank:>3}  {score:7.3f}  {plain(id)}  {plain(texts[id])[:80]}")
            lines.append("              " + "  ".join(f"{plain(term)} {part:.3f}" for term, part in index.explain(query, r)))
    return "\n".join(lines) or "  no hits"


def plain(text: str, keep: str = "") -> str:
    """Data on a terminal: without the characters that could drive it, control codes and those that turn the direction of writing."""
    return "".join(c if c.isprintable() or c in keep else " " for c in text)


def write_now(text: str) -> None:
    sys.stdout.write(plain(text, keep="\n"))
    sys.stdout.flush()


def command() -> None:
    """The console script."""
    torch.set_num_threads(max(1, torch.get_num_threads() // dist.local_world()))
    sys.stdout.reconfigure(errors="replace")         # a title that this terminal cannot write
    try:
        code = guarded(main, sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:                          # `| head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except KeyboardInterrupt:                        # what was written stands
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    command()
