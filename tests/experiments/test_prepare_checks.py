"""Each check against a data set that is good but for one thing; the folder that a preparation
leaves; and the bundled sets.
"""

import csv
import errno
import json
import shutil
from collections import defaultdict

import pytest
from helpers.prepared import ROOT, corpus, counts, prepare, read, refused, rows, script, write_csv

from recr1.data.readers import is_validation

checks = script("checks")
writing = script("writing")
Split = checks.Split
VALIDATION = next(f"q{i}" for i in range(99) if is_validation(f"q{i}"))
TRAIN = next(f"q{i}" for i in range(99) if not is_validation(f"q{i}"))


def row(id, text, **more):
    return dict(id=id, text=text, **more)


def good() -> dict[str, Split]:
    """Search: two train examples, one of them validation, and a test."""
    splits = dict(train=Split(), test=Split())
    splits["train"].add(row(TRAIN, "red shoe"), [("a", 1.0)])
    splits["train"].add(row(VALIDATION, "blue shoe"), [("b", 1.0), ("a", 0.0)])
    splits["test"].add(row("t", "green shoe"), [("a", 1.0)])
    return splits


def people(**change) -> dict[str, Split]:
    """Recommendation: user u's windows and later test."""
    splits = dict(train=Split(), test=Split())
    splits["train"].add(row(TRAIN, "A", user="u", history=["a"]), [("b", 1.0)])
    splits["test"].add(row("t", "B", **dict(user="u", history=["b"]) | change), [("c", 1.0)])
    return splits


def with_(splits, name, *args):
    splits[name].add(*args)
    return splits


SEARCH = [
    (
        lambda: with_(good(), "test", row("t2", " Blue  SHOE"), [("b", 1.0)]),
        f"test: 't2' is '{VALIDATION}' of validation again",
    ),
    (
        lambda: with_(good(), "test", row("t2", "red shoe"), [("b", 1.0)]),
        f"test: 't2' is '{TRAIN}' of train again",
    ),
    (
        lambda: with_(good(), "train", row("q-again", "red  shoe"), [("a", 1.0)]),
        f"train holds one example twice: '{TRAIN}' and 'q-again'",
    ),
    (
        lambda: with_(good(), "train", row(TRAIN, "other"), [("a", 1.0)]),
        f"train: id '{TRAIN}' stands for two examples",
    ),
    (
        lambda: with_(good(), "test", row(TRAIN, "other"), [("a", 1.0)]),
        f"test: id '{TRAIN}' is an id of train too",
    ),
    (
        lambda: with_(good(), "test", row("t2", "other"), [("a", 1.0), ("b", 1.0), ("a", 1.0)]),
        "test: 't2' has the same target twice",
    ),
    (
        lambda: with_(good(), "test", row("t2", "other"), [("a", 0.0)]),
        "test: 't2' has no relevant document",
    ),
    (
        lambda: with_(good(), "test", row("t2", "other"), [("z", 1.0)]),
        "test: 't2' names document 'z', which is not in the corpus",
    ),
    (
        lambda: with_(good(), "test", row("t2", "other", candidates=["z"]), [("a", 1.0)]),
        "'t2' names document 'z'",
    ),
    (
        lambda: with_(
            good(), "test", row("t2", "other", history=[["z", "2020-01-01"]]), [("a", 1.0)]
        ),
        "'t2' names document 'z'",
    ),
    (lambda: with_(good(), "test", row("t2", " "), [("a", 1.0)]), "test: 't2' has no text"),
    (lambda: good() | dict(test=Split()), "test: no example is left"),
]
PEOPLE = [
    (
        lambda: with_(people(), "test", row("t2", "B", user="u", history=["c"]), [("b", 1.0)]),
        f"test: 't2' is '{TRAIN}' of train again",
    ),
    (
        lambda: with_(people(), "test", row("t2", "B", user="u", history=["c"]), [("a", 1.0)]),
        "test: 't2' asks for 'a', which its user's train",
    ),
    (
        lambda: people(history=["c"]),
        "test: 't' asks for 'c', which its user's train examples or its own history show",
    ),
    (
        lambda: with_(
            people(), "train", row(VALIDATION, "B", user="u", history=["b"]), [("d", 1.0)]
        ),
        "user 'u' lies in train and in validation",
    ),
]


@pytest.mark.parametrize(
    "splits, key, why",
    [(s, checks.by_text, w) for s, w in SEARCH]
    + [(s, checks.by_interaction, w) for s, w in PEOPLE],
)
def test_each_check(tmp_path, splits, key, why):
    docs = [dict(id=id, title=id) for id in "abcd"]
    writing.write_data_set(tmp_path / "good", docs, good(), source=[], options={})
    writing.write_data_set(
        tmp_path / "people", docs, people(), source=[], options={}, key=checks.by_interaction
    )
    with pytest.raises(checks.PrepareError) as e:
        writing.write_data_set(tmp_path / "bad", docs, splits(), source=[], options={}, key=key)
    assert why in str(e.value)
    assert not (tmp_path / "bad/prepared.json").exists()


@pytest.mark.parametrize(
    "doc, why",
    [
        (dict(id="a", title="x"), "came before"),
        (dict(id=" b", title="x"), "white space around"),
        (dict(id=3, title="x"), "is no string"),
        (dict(id="b", title=" ", text=""), "neither title nor text"),
    ],
)
def test_documents(tmp_path, doc, why):
    with pytest.raises(checks.PrepareError, match=why):
        writing.write_data_set(
            tmp_path / "x", [dict(id="a", title="A"), doc], good(), source=[], options={}
        )


def test_inductive():
    train = Split()
    test = Split()
    train.add(row("q", "A", user="u", history=["a"]), [("b", 1.0)])
    test.add(row("t", "C", user="v", history=["c"]), [("d", 1.0)])
    assert checks.check_inductive(train, test, "x") == [
        "x: neither user, history nor target in train"
    ]
    for change, why in (
        (dict(user="u"), "user 'u'"),
        (dict(history=["c", "b"]), "document 'b'"),
        (dict(history=["a"]), "document 'a'"),
    ):
        bad = Split()
        bad.add(test.rows[0] | change, [("d", 1.0)])
        with pytest.raises(checks.PrepareError, match=f"x: {why} of 't' is in train"):
            checks.check_inductive(train, bad, "x")


def test_repeats_are_left_out_of_train():
    splits = with_(
        with_(good(), "train", row("x", "GREEN shoe"), [("a", 1.0)]),
        "train",
        row("y", "red shoe "),
        [("b", 1.0)],
    )
    kept, left = checks.drop_repeats(splits["train"], dict(test=splits["test"]))
    assert left == 2
    assert [r["id"] for r in kept.rows] == [TRAIN, VALIDATION]


def test_a_users_ids_stay_on_its_side():
    upstream = script("upstream")
    users = [f"u{i}" for i in range(300)]
    ids = {user: [upstream.make_example_id(user, f"w{k}") for k in range(20)] for user in users}
    assert all(
        {is_validation(id) for id in of} == {is_validation(user)} for user, of in ids.items()
    )
    assert len({id for of in ids.values() for id in of}) == 6000
    assert 10 < sum(map(is_validation, users)) < 50


def test_clean():
    clean = script("upstream").clean_product_text
    assert (
        clean('A 6&quot; <b>"pan"</b>\r\n\tfor  you &amp; me...') == "A 6 <b>pan</b> for you & me."
    )
    assert clean(" \n") == clean("...") == ""
    assert clean("a") == "a."


def test_a_folder_of_something_else_stays(tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("x")
    assert "exists, and no preparation wrote it; give a new folder with --out" in refused(
        capsys, "msrd", out
    )


@pytest.mark.parametrize(
    "fault, code, why",
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "corpus.jsonl.gz"),
            2,
            "cannot read or write corpus.jsonl.gz: No space left",
        ),
        (KeyboardInterrupt(), 130, "stopped; the same command starts again"),
    ],
)
def test_interrupted_half_way(tmp_path, capsys, monkeypatch, fault, code, why):
    def documents():
        yield dict(id="a", title="A")
        raise fault

    monkeypatch.setattr(script("msrd"), "read_bundled", lambda _: (documents(), good(), []))
    assert script("msrd").main(["--out", str(tmp_path / "out")]) == code
    said = capsys.readouterr().err
    assert why in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("left", ["out.partial", "out.old.partial"])
def test_what_a_killed_one_left_is_cleared(tmp_path, monkeypatch, left):
    monkeypatch.setattr(
        script("msrd"),
        "read_bundled",
        lambda _: ([dict(id=id, title=id) for id in "ab"], good(), []),
    )
    (tmp_path / left).mkdir()
    (tmp_path / left / "half").write_text("x")
    (tmp_path / "out").mkdir()
    prepare("msrd", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out/prepared.json").exists()


def small_movielens(folder, user_ratings: int):
    folder.mkdir()
    write_csv(
        folder / "movies.csv",
        ["movieId", "title", "genres"],
        [[i, f"Film {i}", "Drama"] for i in range(1, 121)],
    )
    write_csv(
        folder / "ratings.csv",
        ["userId", "movieId", "rating", "timestamp"],
        [
            [u, 1 + (u * 37 + i * 7) % 120, 4.5, 1000 + i]
            for u in range(1, 41)
            for i in range(user_ratings)
        ],
    )
    return folder


def test_what_fails_leaves_the_earlier_preparation(tmp_path, capsys):
    source = small_movielens(tmp_path / "ml", 40)
    out = prepare("movielens", tmp_path / "out", "--from", source)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    ratings = (source / "ratings.csv").read_bytes()
    (source / "ratings.csv").write_bytes(ratings.replace(b"timestamp", b"when"))
    assert "no column 'timestamp' (it has userId, movieId, rating, when)" in refused(
        capsys, "movielens", out, "--from", source
    )
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    (source / "ratings.csv").write_bytes(ratings)
    prepare("movielens", out, "--from", source)
    # the same bytes, replaced
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    about = json.loads((out / "list/prepared.json").read_text())
    assert str(tmp_path) not in json.dumps(about)
    assert "no test example in train or validation" in about["checks"]


def test_msrd(tmp_path):
    out = prepare("msrd", tmp_path / "out")
    assert counts(out) == dict(documents=9750, train=11790, validation=1303, test=1577)
    source = script("bundled").BUNDLED_MSRD
    assert {id: r["text"] for id, r in read(out, "test")[0].items()} == {
        r["id"]: r["text"] for r in rows(source / "test.queries.jsonl")
    }
    assert sum(map(len, read(out, "train")[1].values())) == 45203


def test_esci_small(tmp_path):
    out = prepare("esci_small", tmp_path / "out")
    assert counts(out / "search") == dict(documents=6764, train=377, validation=42, test=150)
    said = counts(out / "rerank")
    docs = corpus(out / "rerank")
    for name in ("train", "test"):
        (queries, qrels), (asked, judged) = read(out / "rerank", name), read(out / "search", name)
        assert len(queries) + said[f"{name}_without_a_relevant_candidate"] == len(asked)
        for id, r in queries.items():
            assert qrels[id] == judged[id]
            assert len(set(r["candidates"])) == 8
            assert any(qrels[id].get(doc, 0) > 0 for doc in r["candidates"])
    assert all(isinstance(r.get("category", ""), str) for r in docs.values())
    assert read(out / "search", "test")[0]["j0"]["category"] == "Home & Kitchen"
    lucene = defaultdict(list)  # recorded outputs of Lucene 9.5
    with open(ROOT / "tests/data/lucene/ranking.tsv", encoding="utf-8") as file:
        for name, query, rank, doc, _ in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            if name == "esci_small" and int(rank) <= 8:
                lucene[query].append(doc)
    for name, at_least in (("train", 50), ("test", 15)):
        (queries, _), (asked, judged) = read(out / "rerank", name), read(out / "search", name)
        found = lucene.keys() & asked.keys()
        assert len(found) >= at_least
        for id in found:
            if len(lucene[id]) == 8 and any(judged[id].get(doc, 0) > 0 for doc in lucene[id]):
                assert queries[id]["candidates"] == lucene[id]
            else:
                assert id not in queries


def test_lists_of_a_prepared_set(tmp_path):
    small = prepare("esci_small", tmp_path / "small")
    shutil.copy(small / "search/test.queries.jsonl", small / "search/test_home.queries.jsonl")
    shutil.copy(small / "search/test.qrels.tsv", small / "search/test_home.qrels.tsv")
    out = prepare("rerank", tmp_path / "lists", "--from", small / "search", "--candidates", 8)
    for name in (
        "corpus.jsonl.gz",
        "train.queries.jsonl",
        "train.qrels.tsv",
        "test.queries.jsonl",
        "test.qrels.tsv",
    ):
        assert (out / name).read_bytes() == (small / "rerank" / name).read_bytes()
    assert counts(out)["test_home"] == counts(out)["test"]
    longer = prepare("rerank", tmp_path / "longer", "--from", small / "search")  # 16
    for name in ("train", "test"):
        (queries, _), (of_8, _) = read(longer, name), read(out, name)
        assert all(len(r["candidates"]) == 16 for r in queries.values())
        assert all(
            queries[id]["candidates"][:8] == r["candidates"]
            for id, r in of_8.items()
            if id in queries
        )


@pytest.mark.parametrize(
    "options, why",
    [
        (["--candidates", "1"], "--candidates is 1; a list to be re-ranked needs 2 or more"),
        (["--candidates", "7000"], "train: no example is left"),
    ],
)
def test_lists_that_cannot_be(tmp_path, capsys, options, why):
    small = prepare("esci_small", tmp_path / "small")
    assert why in refused(
        capsys, "rerank", tmp_path / "lists", "--from", small / "search", *options
    )


@pytest.mark.parametrize(
    "file, old, new, why",
    [
        ("train.queries.jsonl", '"id": "t0"', '"id": "t00"', "'t00' is not in train.qrels.tsv"),
        (
            "test.qrels.tsv",
            "j0\t",
            "j00\t",
            "test.qrels.tsv: judges 'j00', which test.queries.jsonl does not have",
        ),
        (
            "test.queries.jsonl",
            '"text"',
            '"query"',
            "test.queries.jsonl:1: no column 'text' (it has id, query)",
        ),
        (
            "train.queries.jsonl",
            '"text": "extra large receiving blankets"',
            '"text": "T towels  kitchen"',
            "'j0' is 't0' of train again",
        ),
    ],
)
def test_a_changed_copy_of_a_bundled_set(tmp_path, capsys, file, old, new, why):
    source = shutil.copytree(script("esci_small").BUNDLED, tmp_path / "copy")
    text = (source / file).read_text(encoding="utf-8")
    assert old in text
    (source / file).write_text(text.replace(old, new), encoding="utf-8")
    if "j00" in new:  # the query stays, judged once
        (source / file).write_text(text + "j00\tB07NCQWCQS\t3\n", encoding="utf-8")
    assert why in refused(capsys, "esci_small", tmp_path / "out", "--from", source)
