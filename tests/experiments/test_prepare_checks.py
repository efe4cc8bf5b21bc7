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
NUMBERED = [f"q{i}" for i in range(99)]
VALIDATION = next(id for id in NUMBERED if is_validation(id))
TRAIN = next(id for id in NUMBERED if not is_validation(id))
DOCUMENTS = [dict(id=id, title=id) for id in "abcd"]


def make_row(id, text, **more):
    return dict(id=id, text=text, **more)


def make_search() -> dict[str, Split]:
    """Search: two train examples, one of them validation, and a test."""
    train = Split()
    train.add(make_row(TRAIN, "red shoe"), [("a", 1.0)])
    train.add(make_row(VALIDATION, "blue shoe"), [("b", 1.0), ("a", 0.0)])
    test = Split()
    test.add(make_row("t", "green shoe"), [("a", 1.0)])
    return dict(train=train, test=test)


def make_recommendation(test_history=("b",)) -> dict[str, Split]:
    """Recommendation: user u's windows and later test."""
    train = Split()
    train.add(make_row(TRAIN, "A", user="u", history=["a"]), [("b", 1.0)])
    test = Split()
    test.add(make_row("t", "B", user="u", history=list(test_history)), [("c", 1.0)])
    return dict(train=train, test=test)


# what one example more, in which split, is told: its row, its targets
SEARCH = [
    (
        "test",
        make_row("t2", " Blue  SHOE"),
        [("b", 1.0)],
        f"test: 't2' is '{VALIDATION}' of validation again",
    ),
    (
        "test",
        make_row("t2", "red shoe"),
        [("b", 1.0)],
        f"test: 't2' is '{TRAIN}' of train again",
    ),
    (
        "train",
        make_row("q-again", "red  shoe"),
        [("a", 1.0)],
        f"train holds one example twice: '{TRAIN}' and 'q-again'",
    ),
    (
        "train",
        make_row(TRAIN, "other"),
        [("a", 1.0)],
        f"train: id '{TRAIN}' stands for two examples",
    ),
    (
        "test",
        make_row(TRAIN, "other"),
        [("a", 1.0)],
        f"test: id '{TRAIN}' is an id of train too",
    ),
    (
        "test",
        make_row("t2", "other"),
        [("a", 1.0), ("b", 1.0), ("a", 1.0)],
        "test: 't2' has the same target twice",
    ),
    (
        "test",
        make_row("t2", "other"),
        [("a", 0.0)],
        "test: 't2' has no relevant document",
    ),
    (
        "test",
        make_row("t2", "other"),
        [("z", 1.0)],
        "test: 't2' names document 'z', which is not in the corpus",
    ),
    (
        "test",
        make_row("t2", "other", candidates=["z"]),
        [("a", 1.0)],
        "'t2' names document 'z'",
    ),
    (
        "test",
        make_row("t2", "other", history=[["z", "2020-01-01"]]),
        [("a", 1.0)],
        "'t2' names document 'z'",
    ),
    ("test", make_row("t2", " "), [("a", 1.0)], "test: 't2' has no text"),
]
RECOMMENDATION = [
    (
        "test",
        make_row("t2", "B", user="u", history=["c"]),
        [("b", 1.0)],
        f"test: 't2' is '{TRAIN}' of train again",
    ),
    (
        "test",
        make_row("t2", "B", user="u", history=["c"]),
        [("a", 1.0)],
        "test: 't2' asks for 'a', which its user's train",
    ),
    (
        "train",
        make_row(VALIDATION, "B", user="u", history=["b"]),
        [("d", 1.0)],
        "user 'u' lies in train and in validation",
    ),
]


def write_splits(folder, splits, key=checks.by_text):
    writing.write_data_set(folder, DOCUMENTS, splits, source=[], options={}, key=key)


def assert_refused(tmp_path, splits, key, why):
    with pytest.raises(checks.PrepareError) as error:
        write_splits(tmp_path / "bad", splits, key)
    assert why in str(error.value)
    assert not (tmp_path / "bad/prepared.json").exists()


@pytest.mark.parametrize("name, row, targets, why", SEARCH)
def test_each_check_of_search(tmp_path, name, row, targets, why):
    write_splits(tmp_path / "good", make_search())
    splits = make_search()
    splits[name].add(row, targets)

    assert_refused(tmp_path, splits, checks.by_text, why)


def test_a_split_without_examples(tmp_path):
    splits = make_search()
    splits["test"] = Split()

    assert_refused(tmp_path, splits, checks.by_text, "test: no example is left")


@pytest.mark.parametrize("name, row, targets, why", RECOMMENDATION)
def test_each_check_of_recommendation(tmp_path, name, row, targets, why):
    write_splits(tmp_path / "good", make_recommendation(), checks.by_interaction)
    splits = make_recommendation()
    splits[name].add(row, targets)

    assert_refused(tmp_path, splits, checks.by_interaction, why)


def test_a_history_that_shows_its_own_target(tmp_path):
    splits = make_recommendation(test_history=["c"])
    why = "test: 't' asks for 'c', which its user's train examples or its own history show"

    assert_refused(tmp_path, splits, checks.by_interaction, why)


BAD_DOCUMENTS = [
    (dict(id="a", title="x"), "came before"),
    (dict(id=" b", title="x"), "white space around"),
    (dict(id=3, title="x"), "is no string"),
    (dict(id="b", title=" ", text=""), "neither title nor text"),
]


@pytest.mark.parametrize("doc, why", BAD_DOCUMENTS)
def test_documents(tmp_path, doc, why):
    documents = [dict(id="a", title="A"), doc]

    with pytest.raises(checks.PrepareError, match=why):
        writing.write_data_set(tmp_path / "x", documents, make_search(), source=[], options={})


SHARED_WITH_TRAIN = [
    (dict(user="u"), "user 'u'"),
    (dict(history=["c", "b"]), "document 'b'"),
    (dict(history=["a"]), "document 'a'"),
]


def test_inductive():
    train = Split()
    train.add(make_row("q", "A", user="u", history=["a"]), [("b", 1.0)])
    test = Split()
    test.add(make_row("t", "C", user="v", history=["c"]), [("d", 1.0)])

    promises = checks.check_inductive(train, test, "x")

    assert promises == ["x: neither user, history nor target in train"]
    for change, why in SHARED_WITH_TRAIN:
        bad = Split()
        bad.add(test.rows[0] | change, [("d", 1.0)])
        with pytest.raises(checks.PrepareError, match=f"x: {why} of 't' is in train"):
            checks.check_inductive(train, bad, "x")


def test_repeats_are_left_out_of_train():
    splits = make_search()
    splits["train"].add(make_row("x", "GREEN shoe"), [("a", 1.0)])
    splits["train"].add(make_row("y", "red shoe "), [("b", 1.0)])

    unique, num_dropped = checks.drop_repeats(splits["train"], dict(test=splits["test"]))

    assert num_dropped == 2
    assert [row["id"] for row in unique.rows] == [TRAIN, VALIDATION]


def test_a_users_ids_stay_on_its_side():
    upstream = script("upstream")
    users = [f"u{i}" for i in range(300)]
    seen = set()

    for user in users:
        for window in range(20):
            id = upstream.make_example_id(user, f"w{window}")
            assert is_validation(id) == is_validation(user)
            seen.add(id)

    assert len(seen) == 6000
    num_validation = sum(is_validation(user) for user in users)
    assert 10 < num_validation < 50


def test_clean():
    clean = script("upstream").clean_product_text
    raw = 'A 6&quot; <b>"pan"</b>\r\n\tfor  you &amp; me...'

    assert clean(raw) == "A 6 <b>pan</b> for you & me."
    assert clean(" \n") == ""
    assert clean("...") == ""
    assert clean("a") == "a."


def test_a_folder_of_something_else_stays(tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("x")

    line = refused(capsys, "msrd", out)

    assert "exists, and no preparation wrote it; give a new folder with --out" in line


DISK_FULL = OSError(errno.ENOSPC, "No space left on device", "corpus.jsonl.gz")
INTERRUPTIONS = [
    (DISK_FULL, 2, "cannot read or write corpus.jsonl.gz: No space left"),
    (KeyboardInterrupt(), 130, "stopped; the same command starts again"),
]


@pytest.mark.parametrize("fault, code, why", INTERRUPTIONS)
def test_interrupted_half_way(tmp_path, capsys, monkeypatch, fault, code, why):
    def yield_documents():
        yield dict(id="a", title="A")
        raise fault

    def read_source(_):
        return yield_documents(), make_search(), []

    monkeypatch.setattr(script("msrd"), "read_bundled", read_source)

    assert script("msrd").main(["--out", str(tmp_path / "out")]) == code

    err = capsys.readouterr().err
    assert why in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("left", ["out.partial", "out.old.partial"])
def test_what_a_killed_one_left_is_cleared(tmp_path, monkeypatch, left):
    def read_source(_):
        return DOCUMENTS[:2], make_search(), []

    monkeypatch.setattr(script("msrd"), "read_bundled", read_source)
    (tmp_path / left).mkdir()
    (tmp_path / left / "half").write_text("x")
    (tmp_path / "out").mkdir()

    prepare("msrd", tmp_path / "out")

    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out/prepared.json").exists()


def write_small_movielens(folder):
    """Write 120 films and 40 users with 40 ratings each."""
    folder.mkdir()
    films = [[i, f"Film {i}", "Drama"] for i in range(1, 121)]
    write_csv(folder / "movies.csv", ["movieId", "title", "genres"], films)

    ratings = []
    for user in range(1, 41):
        for i in range(40):
            film = 1 + (user * 37 + i * 7) % 120
            ratings.append([user, film, 4.5, 1000 + i])
    write_csv(folder / "ratings.csv", ["userId", "movieId", "rating", "timestamp"], ratings)
    return folder


def read_all_bytes(folder) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_fails_leaves_the_earlier_preparation(tmp_path, capsys):
    source = write_small_movielens(tmp_path / "ml")
    out = prepare("movielens", tmp_path / "out", "--from", source)
    before = read_all_bytes(out)
    ratings = (source / "ratings.csv").read_bytes()

    (source / "ratings.csv").write_bytes(ratings.replace(b"timestamp", b"when"))
    line = refused(capsys, "movielens", out, "--from", source)
    assert "no column 'timestamp' (it has userId, movieId, rating, when)" in line
    assert read_all_bytes(out) == before

    (source / "ratings.csv").write_bytes(ratings)
    prepare("movielens", out, "--from", source)
    # the same bytes, replaced
    assert read_all_bytes(out) == before
    about = json.loads((out / "list/prepared.json").read_text())
    assert str(tmp_path) not in json.dumps(about)
    assert "no test example in train or validation" in about["checks"]


def test_msrd(tmp_path):
    out = prepare("msrd", tmp_path / "out")

    assert counts(out) == dict(documents=9750, train=11790, validation=1303, test=1577)
    source = script("bundled").BUNDLED_MSRD
    expected = {row["id"]: row["text"] for row in rows(source / "test.queries.jsonl")}
    test, _ = read(out, "test")
    assert {id: row["text"] for id, row in test.items()} == expected
    _, qrels = read(out, "train")
    assert sum(len(judged) for judged in qrels.values()) == 45203


def has_relevant(candidates, judged) -> bool:
    return any(judged.get(doc, 0) > 0 for doc in candidates)


def read_lucene_lists() -> dict[str, list[str]]:
    """Read the first eight documents of each query, as Lucene 9.5 ranked them."""
    ranked = defaultdict(list)
    with open(ROOT / "tests/data/lucene/ranking.tsv", encoding="utf-8") as file:
        reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        for name, query, rank, doc, _ in reader:
            if name == "esci_small" and int(rank) <= 8:
                ranked[query].append(doc)
    return ranked


def assert_candidates_are_lucenes(lists, search, lucene, at_least):
    queries, _ = lists
    asked, judged = search
    recorded = lucene.keys() & asked.keys()
    assert len(recorded) >= at_least
    for id in recorded:
        if len(lucene[id]) == 8 and has_relevant(lucene[id], judged[id]):
            assert queries[id]["candidates"] == lucene[id]
        else:
            assert id not in queries


def test_esci_small(tmp_path):
    out = prepare("esci_small", tmp_path / "out")

    assert counts(out / "search") == dict(documents=6764, train=377, validation=42, test=150)
    numbers = counts(out / "rerank")
    for name in ("train", "test"):
        queries, qrels = read(out / "rerank", name)
        asked, judged = read(out / "search", name)
        num_dropped = numbers[f"{name}_without_a_relevant_candidate"]
        assert len(queries) + num_dropped == len(asked)
        for id, row in queries.items():
            assert qrels[id] == judged[id]
            assert len(set(row["candidates"])) == 8
            assert has_relevant(row["candidates"], qrels[id])

    for document in corpus(out / "rerank").values():
        assert isinstance(document.get("category", ""), str)
    test, _ = read(out / "search", "test")
    assert test["j0"]["category"] == "Home & Kitchen"

    lucene = read_lucene_lists()
    for name, at_least in (("train", 50), ("test", 15)):
        lists = read(out / "rerank", name)
        search = read(out / "search", name)
        assert_candidates_are_lucenes(lists, search, lucene, at_least)


LIST_FILES = [
    "corpus.jsonl.gz",
    "train.queries.jsonl",
    "train.qrels.tsv",
    "test.queries.jsonl",
    "test.qrels.tsv",
]


def test_lists_of_a_prepared_set(tmp_path):
    small = prepare("esci_small", tmp_path / "small")
    search = small / "search"
    shutil.copy(search / "test.queries.jsonl", search / "test_home.queries.jsonl")
    shutil.copy(search / "test.qrels.tsv", search / "test_home.qrels.tsv")

    out = prepare("rerank", tmp_path / "lists", "--from", search, "--candidates", 8)
    longer = prepare("rerank", tmp_path / "longer", "--from", search)  # 16

    for name in LIST_FILES:
        assert (out / name).read_bytes() == (small / "rerank" / name).read_bytes()
    numbers = counts(out)
    assert numbers["test_home"] == numbers["test"]
    for name in ("train", "test"):
        of_16, _ = read(longer, name)
        of_8, _ = read(out, name)
        for row in of_16.values():
            assert len(row["candidates"]) == 16
        for id in of_8.keys() & of_16.keys():
            assert of_16[id]["candidates"][:8] == of_8[id]["candidates"]


BAD_CANDIDATES = [
    ("1", "--candidates is 1; a list to be re-ranked needs 2 or more"),
    ("7000", "train: no example is left"),
]


@pytest.mark.parametrize("number, why", BAD_CANDIDATES)
def test_lists_that_cannot_be(tmp_path, capsys, number, why):
    small = prepare("esci_small", tmp_path / "small")
    options = ["--from", small / "search", "--candidates", number]

    line = refused(capsys, "rerank", tmp_path / "lists", *options)

    assert why in line


CHANGED_COPIES = [
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
]


@pytest.mark.parametrize("file, old, new, why", CHANGED_COPIES)
def test_a_changed_copy_of_a_bundled_set(tmp_path, capsys, file, old, new, why):
    source = shutil.copytree(script("esci_small").BUNDLED, tmp_path / "copy")
    text = (source / file).read_text(encoding="utf-8")
    assert old in text
    changed = text.replace(old, new)
    if "j00" in new:  # the query stays, judged once
        changed = text + "j00\tB07NCQWCQS\t3\n"
    (source / file).write_text(changed, encoding="utf-8")

    line = refused(capsys, "esci_small", tmp_path / "out", "--from", source)

    assert why in line
