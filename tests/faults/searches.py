"""Searches that find nothing, more than there is, or all the same: reward 0, and one order. Each
function makes n faults.
"""

import itertools
import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from alone import (
    Bench,
    Case,
    draw_cases,
    expect,
    expect_refusal,
    read_log,
    run_cases,
    run_command,
    write_rows,
)
from helpers import tiny_world
from helpers.fuzz_answers import wrap
from world import Outcome, World, read_result

from recr1 import cli, train
from recr1.config import schema
from recr1.retrieval.factory import build_retriever

RETRIEVERS = {
    "bm25": (),
    "numba": ("retriever.scorer=numba",),
    "okapi": ("retriever.variant=okapi",),
    "rank_bm25": ("retriever.kind=rank_bm25",),
    "a user's": ("retriever.kind=shaky:overlap",),
}
FLAGS = {
    "bm25": (),
    "numba": ("--scorer", "numba"),
    "okapi": ("--variant", "okapi"),
    "rank_bm25": ("--retriever", "rank_bm25"),
    "a user's": ("--retriever", "shaky:overlap"),
}
CORPUS_SIZE = 40


def search_in_vain(world: World, n: int) -> Iterator[Outcome]:
    """Search unknown words, no words, k beyond the corpus, a corpus without a word, ties."""
    bench = Bench(world, "searches")
    makers = [partial(find_nothing, bench, name) for name in RETRIEVERS]
    for make in MAKERS:
        makers.append(partial(make, bench))
    cases = draw_cases(world.rng, n, makers)
    return run_cases(world, cases)


def draw_unknown(rng, name: str) -> str:
    """Draw a text in which this retriever finds no word of the corpus; the user's knows no stop
    words.
    """
    letters = "".join(rng.choices("qxzvj", k=rng.randrange(5, 12)))
    stop_words = letters if name == "a user's" else "the of and a"
    texts = [
        letters,
        f"{letters} {letters[::-1]} {letters}",
        stop_words,
        "?! ... --",
        "🎬🎬 ☃",
        "\u200d\u2060x\u0301z",
        f"(contents:{letters})",
        f'AND OR NOT +-"*~^{letters}',
        letters * 2_000,
    ]
    return rng.choice(texts)


def draw_product(rng) -> str:
    colour = rng.choice(tiny_world.COLOURS)
    thing = rng.choice(tiny_world.THINGS)
    return f"{colour} {thing}"


def answer_query(query: str) -> str:
    return wrap(json.dumps({"query": query}))


def find_nothing(bench: Bench, name: str) -> Case:
    text = draw_unknown(bench.rng, name)
    settings = [*RETRIEVERS[name], "reward.bonus=0.5", "reward.miss=-0.25"]

    def check():
        answers = itertools.repeat(answer_query(text))
        _, run = bench.run_saying(answers, None, *settings)
        rows = read_log(run)
        trained = [row for row in rows if "reward" in row]
        expect(trained, f"{text[:80]!r}: no completion was trained on")
        for row in trained:
            is_miss = row["reward"] == -0.25 and row["reward_terms"]["ndcg"] == 0
            expect(is_miss, f"{text[:80]!r} is rewarded: {row}")
        for row in rows:
            is_plain_zero = row["error"] is None and row.get("ndcg", 0) == 0
            expect(is_plain_zero, f"{text[:80]!r}: {row}")

    return f"nothing found ({name})", check


def search_corpus(corpus: Path, query: str, *flags) -> list[str]:
    """Return the ids of the hits that `recr1 search` prints."""
    code, out, err = run_command(cli.main, ["search", "--corpus", corpus, query, *flags])
    expect(code == 0 and not err, f"search {query!r} ends with {code}: {err}")
    expect("no hits" in out or re.search(r"^ +1 ", out), out)
    return re.findall(r"^ *\d+ +-?[\d.]+  (\S+)  ", out, re.MULTILINE)


def search_no_words(bench: Bench) -> Case:
    name = bench.rng.choice(sorted(FLAGS))
    text = bench.rng.choice(["", " ", "\t\u3000", draw_unknown(bench.rng, name)])

    def check():
        corpus = bench.copy_data()["corpus"]
        ids = search_corpus(corpus, text, *FLAGS[name])
        expect(not ids, f"{text!r} finds {ids}")

    return f"search, no words ({name})", check


def search_for_more(bench: Bench) -> Case:
    """More hits than there are documents."""
    name = bench.rng.choice(sorted(FLAGS))
    k = bench.rng.randrange(CORPUS_SIZE + 1, 10**6)
    query = draw_product(bench.rng)

    def check():
        corpus = bench.copy_data()["corpus"]
        ids = search_corpus(corpus, query, *FLAGS[name], "-k", k)
        want = find_sharing(corpus, query)
        expect(sorted(ids) == sorted(want), f"{query!r}: {sorted(ids)}, must be {sorted(want)}")
        cut = search_corpus(corpus, query, *FLAGS[name], "-k", CORPUS_SIZE)
        expect(ids == cut, "the order depends on k")

    return f"search, k {k} of 40 ({name})", check


def find_sharing(corpus: Path, query: str) -> set[str]:
    """Return the ids of the documents that share a word with the query."""
    query_words = set(query.split())
    ids = set()
    for doc in tiny_world.jsonl(corpus):
        doc_words = f"{doc['title']} {doc['text']}".split()
        if query_words.intersection(doc_words):
            ids.add(doc["id"])
    return ids


def reward_beyond(bench: Bench) -> Case:
    """A ranking is no longer than the corpus, so k beyond it is k = the corpus."""
    k = bench.rng.randrange(CORPUS_SIZE + 1, 5_000)

    def check():
        actual = reward_at(bench, k)
        want = reward_at(bench, CORPUS_SIZE)
        expect(actual == want, "the run is another one than with k = 40")

    return f"reward at {k} of 40", check


def reward_at(bench: Bench, k: int) -> dict:
    """Return what a run comes to, without the metric's name, which has the k in it."""
    _, run = bench.run(None, f"reward.k_train={k}", f"reward.k_eval={k}")
    values = read_result(run)
    values["summary"].pop("metric")
    return values


def write_corpus(bench: Bench, docs: list[dict]) -> dict[str, Path]:
    data = bench.copy_data()
    write_rows(data["corpus"], docs)
    return data


def empty_corpus(bench: Bench) -> Case:
    data = write_corpus(bench, [])
    corpus = data["corpus"]
    command = bench.rng.choice(["train", "search"])
    main = cli.main
    argv = ["search", "--corpus", corpus, "lamp"]
    if command == "train":
        main = train.main
        argv, _ = bench.make_argv(data)

    def check():
        expect_refusal(main, argv, corpus, "empty")

    return f"empty corpus ({command})", check


def write_no_words(bench: Bench) -> Case:
    count = bench.rng.randrange(1, 20)
    docs = []
    for i in range(count):
        text = bench.rng.choice(["the of and", "?!", "a a a"])
        docs.append(dict(id=f"d{i}", text=text))
    data = write_corpus(bench, docs)

    def check():
        argv, _ = bench.make_argv(data)
        expect_refusal(train.main, argv, data["corpus"], "token")

    return "a corpus of no words", check


def write_ties(bench: Bench) -> tuple[Path, list[str]]:
    """Write a corpus whose documents say the same, in random order. Return it and their ids,
    ascending.
    """
    count = bench.rng.randrange(5, 400)
    numbers = {bench.rng.randrange(10**4) for _ in range(count)}
    ids = sorted(f"p{number}" for number in numbers)
    shuffled = bench.rng.sample(ids, len(ids))
    data = write_corpus(bench, [dict(id=id, text="red lamp") for id in shuffled])
    return data["corpus"], ids


def search_ties(bench: Bench) -> Case:
    corpus, ids = write_ties(bench)
    name = bench.rng.choice(["bm25", "numba"])

    def check():
        ranking = search_corpus(corpus, "lamp", *FLAGS[name], "-k", 1000)
        expect(ranking == ids, f"{ranking[:9]}, must be {ids[:9]}")

    return f"{len(ids)} ties ({name})", check


def cut_ties(bench: Bench) -> Case:
    corpus, ids = write_ties(bench)
    name = bench.rng.choice(["bm25", "numba"])
    k = bench.rng.randrange(1, len(ids))

    def check():
        ranking = search_corpus(corpus, "red", *FLAGS[name], "-k", k)
        expect(ranking == ids[:k], f"{ranking[:9]}, must be {ids[:9]}")

    return f"{len(ids)} ties cut at {k} ({name})", check


def compare_scorers(bench: Bench) -> Case:
    """Groups of equal documents, queries alone and among others: every scorer gives one and the
    same ranking.
    """
    rng = bench.rng
    docs = []
    for number in rng.sample(range(1000), 300):
        docs.append(dict(id=f"p{number}", text=draw_product(rng)))
    data = write_corpus(bench, docs)
    queries = []
    for _ in range(20):
        words = rng.choices(tiny_world.COLOURS + tiny_world.THINGS, k=2)
        queries.append(" ".join(words))

    def check():
        by_torch = rank_by(data["corpus"], "torch", queries)
        by_numba = rank_by(data["corpus"], "numba", queries)
        expect(by_torch == by_numba, "the scorers differ")

    return "ties, both scorers", check


def rank_by(corpus: Path, scorer: str, queries: list[str]) -> list[list[str]]:
    """Return each query's ranking, which must not depend on the queries beside it."""
    build = build_retriever(schema.RetrieverConfig(scorer=scorer))
    retriever, _ = build(corpus, "stop", None, print)
    together, _ = retriever.search(queries, 50)
    rankings = []
    for query, rows in zip(queries, together.tolist(), strict=True):
        alone, _ = retriever.search([query], 50)
        expect(
            [rows] == alone.tolist(),
            f"{scorer}: a query's hits depend on its neighbours",
        )
        rankings.append([retriever.doc_ids[row] for row in rows if row >= 0])
    return rankings


def judge_nothing(bench: Bench) -> Case:
    """Queries without a relevant document score 0, and a run of nothing else has no gradient to
    follow.
    """

    def check():
        data = bench.copy_data()
        for split in ("train", "test"):
            file = data[f"{split}_qrels"]
            judgements = file.read_text()
            file.write_text(re.sub(r"\t\d$", "\t0", judgements, flags=re.MULTILINE))
        answers = [answer_query(f"red {thing}") for thing in tiny_world.THINGS]
        _, run = bench.run_saying(itertools.cycle(answers), data, "reward.miss=-0.5")
        for row in read_log(run):
            is_miss = row.get("ndcg", 0) == 0 and row.get("reward", -0.5) == -0.5
            expect(row["error"] is None and is_miss, row)

    return "no relevant document", check


MAKERS = (
    search_no_words,
    search_for_more,
    reward_beyond,
    empty_corpus,
    write_no_words,
    search_ties,
    cut_ties,
    compare_scorers,
    judge_nothing,
)
