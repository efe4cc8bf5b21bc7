"""Searches that find nothing, more than there is, or all the same: reward 0, and one order. Each
function makes n faults.
"""

import itertools
import json
import re
from collections.abc import Iterator
from functools import partial

from alone import Bench, Case, each, expect, logged, refused, said, spread
from helpers import tiny_world
from helpers.fuzz_answers import wrap
from world import Outcome, World, result

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


def empty(world: World, n: int) -> Iterator[Outcome]:
    """Unknown words, no words, k beyond the corpus, a corpus without a word, ties."""
    bench = Bench(world, "searches")
    nothing = [partial(_nothing_found, bench, name) for name in RETRIEVERS]
    rest = [
        partial(make, bench)
        for make in (
            _search_nothing,
            _more_than_there_is,
            _rewarded_beyond,
            _empty_corpus,
            _corpus_without_words,
            _ties,
            _ties_cut,
            _ties_of_scorers,
            _unjudged,
        )
    ]
    return each(world, spread(world.rng, n, [*nothing, *rest]))


def unknown(rng, name: str) -> str:
    """Return a text in which this retriever finds no word of the corpus; the user's knows no stop
    words.
    """
    letters = "".join(rng.choices("qxzvj", k=rng.randrange(5, 12)))
    return rng.choice(
        [
            letters,
            " ".join([letters, letters[::-1], letters]),
            letters if name == "a user's" else "the of and a",
            "?! ... --",
            "🎬🎬 ☃",
            "\u200d\u2060x\u0301z",
            "(contents:" + letters + ")",
            'AND OR NOT +-"*~^' + letters,
            letters * 2_000,
        ]
    )


def _nothing_found(bench: Bench, name: str) -> Case:
    text = unknown(bench.rng, name)

    def case():
        _, run = bench.run_saying(
            itertools.repeat(wrap(json.dumps({"query": text}))),
            None,
            *RETRIEVERS[name],
            "reward.bonus=0.5",
            "reward.miss=-0.25",
        )
        rows = logged(run)
        trained = [row for row in rows if "reward" in row]
        expect(
            trained
            and all(row["reward"] == -0.25 and row["reward_terms"]["ndcg"] == 0 for row in trained),
            f"{text[:80]!r} is rewarded: {trained[0]}",
        )
        expect(
            all(row["error"] is None and row.get("ndcg", 0) == 0 for row in rows),
            f"{text[:80]!r}: {rows[-1]}",
        )

    return f"nothing found ({name})", case


def _search(bench: Bench, corpus, query: str, *flags) -> list[str]:
    """Ids of the hits that `recr1 search` prints."""
    code, out, err = said(cli.main, ["search", "--corpus", corpus, query, *flags])
    expect(code == 0 and not err, f"search {query!r} ends with {code}: {err}")
    expect("no hits" in out or re.search(r"^ +1 ", out), out)
    return re.findall(r"^ *\d+ +-?[\d.]+  (\S+)  ", out, re.MULTILINE)


def _search_nothing(bench: Bench) -> Case:
    name = bench.rng.choice(sorted(FLAGS))
    text = bench.rng.choice(["", " ", "\t\u3000", unknown(bench.rng, name)])
    return f"search, no words ({name})", lambda: expect(
        not (found := _search(bench, bench.data()["corpus"], text, *FLAGS[name])),
        f"{text!r} finds {found}",
    )


def _more_than_there_is(bench: Bench) -> Case:
    name = bench.rng.choice(sorted(FLAGS))
    k = bench.rng.randrange(41, 10**6)
    query = f"{bench.rng.choice(tiny_world.COLOURS)} {bench.rng.choice(tiny_world.THINGS)}"

    def case():
        corpus = bench.data()["corpus"]
        found = _search(bench, corpus, query, *FLAGS[name], "-k", k)
        have = [json.loads(line) for line in corpus.read_text().splitlines()]
        want = {
            doc["id"]
            for doc in have
            if set(query.split()) & set(f"{doc['title']} {doc['text']}".split())
        }
        expect(
            set(found) == want and len(found) == len(want),
            f"{query!r}: {sorted(found)}, must be {sorted(want)}",
        )
        expect(
            found == _search(bench, corpus, query, *FLAGS[name], "-k", 40), "the order depends on k"
        )

    return f"search, k {k} of 40 ({name})", case


def _rewarded_beyond(bench: Bench) -> Case:
    """A ranking is no longer than the corpus, so k beyond it is k = the corpus."""
    k = bench.rng.randrange(41, 5_000)

    def case():
        runs = [
            result(bench.run(None, f"reward.k_train={k}", f"reward.k_eval={k}")[1]) for k in (40, k)
        ]
        for found in runs:
            found["summary"].pop("metric")  # which has the k in its name
        expect(runs[0] == runs[1], "the run is another one than with k = 40")

    return f"reward at {k} of 40", case


def _corpus(bench: Bench, docs: list[dict]):
    data = bench.data()
    data["corpus"].write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    return data


def _empty_corpus(bench: Bench) -> Case:
    data = _corpus(bench, [])
    command = bench.rng.choice(["train", "search"])
    argv = (
        bench.argv(data)[0]
        if command == "train"
        else ["search", "--corpus", data["corpus"], "lamp"]
    )
    return f"empty corpus ({command})", lambda: refused(
        train.main if command == "train" else cli.main, argv, data["corpus"], "empty"
    )


def _corpus_without_words(bench: Bench) -> Case:
    data = _corpus(
        bench,
        [
            dict(id=f"d{i}", text=bench.rng.choice(["the of and", "?!", "a a a"]))
            for i in range(bench.rng.randrange(1, 20))
        ],
    )
    return "a corpus of no words", lambda: refused(
        train.main, bench.argv(data)[0], data["corpus"], "token"
    )


def _same(bench: Bench) -> tuple[dict, list[str]]:
    """A corpus whose documents say the same, in random order, and their ids ascending."""
    ids = sorted({f"p{bench.rng.randrange(10**4)}" for _ in range(bench.rng.randrange(5, 400))})
    return _corpus(
        bench, [dict(id=id, text="red lamp") for id in bench.rng.sample(ids, len(ids))]
    ), ids


def _ties(bench: Bench) -> Case:
    (data, ids), name = _same(bench), bench.rng.choice(["bm25", "numba"])
    return f"{len(ids)} ties ({name})", lambda: expect(
        (found := _search(bench, data["corpus"], "lamp", *FLAGS[name], "-k", 1000)) == ids,
        f"{found[:9]}, must be {ids[:9]}",
    )


def _ties_cut(bench: Bench) -> Case:
    (data, ids), name = _same(bench), bench.rng.choice(["bm25", "numba"])
    k = bench.rng.randrange(1, len(ids))
    return f"{len(ids)} ties cut at {k} ({name})", lambda: expect(
        (found := _search(bench, data["corpus"], "red", *FLAGS[name], "-k", k)) == ids[:k],
        f"{found[:9]}, must be {ids[:9]}",
    )


def _ties_of_scorers(bench: Bench) -> Case:
    """Groups of equal documents, queries alone and among others: every scorer gives one and the
    same ranking.
    """
    rng = bench.rng
    data = _corpus(
        bench,
        [
            dict(
                id=f"p{i}", text=f"{rng.choice(tiny_world.COLOURS)} {rng.choice(tiny_world.THINGS)}"
            )
            for i in rng.sample(range(1000), 300)
        ],
    )
    queries = [
        " ".join(rng.choices(tiny_world.COLOURS + tiny_world.THINGS, k=2)) for _ in range(20)
    ]

    def case():
        rankings = []
        for scorer in ("torch", "numba"):
            retriever, _ = build_retriever(schema.RetrieverConfig(scorer=scorer))(
                data["corpus"], "stop", None, print
            )
            together = retriever.search(queries, 50)[0].tolist()
            expect(
                together == [retriever.search([query], 50)[0][0].tolist() for query in queries],
                f"{scorer}: a query's hits depend on its neighbours",
            )
            rankings.append([[retriever.doc_ids[i] for i in row if i >= 0] for row in together])
        expect(rankings[0] == rankings[1], "the scorers differ")

    return "ties, both scorers", case


def _unjudged(bench: Bench) -> Case:
    """Queries without a relevant document score 0, and a run of nothing else has no gradient to
    follow.
    """

    def case():
        data = bench.data()
        for split in ("train", "test"):
            file = data[f"{split}_qrels"]
            file.write_text(re.sub(r"\t\d$", "\t0", file.read_text(), flags=re.MULTILINE))
        rows = logged(
            bench.run_saying(
                (
                    wrap(json.dumps({"query": f"red {thing}"}))
                    for thing in itertools.cycle(tiny_world.THINGS)
                ),
                data,
                "reward.miss=-0.5",
            )[1]
        )
        expect(
            all(
                row["error"] is None and row.get("ndcg", 0) == 0 and row.get("reward", -0.5) == -0.5
                for row in rows
            ),
            rows[0],
        )

    return "no relevant document", case
