"""Amazon-C4 and All_Beauty from small files of exactly their upstream's formats: what is written,
and what a changed file is told.
"""

import pytest
from helpers.prepared import corpus, counts, prepare, read, refused, write_csv, write_json

from recr1.data.readers import is_validation

# ---- Amazon-C4 -----------------------------------------------------------------------------------

C4_HEADER = ["qid", "query", "item_id", "user_id", "ori_rating", "ori_review"]
C4_DOMAINS = ["Sports", "Office", "Baby", "Games", *["Pet"] * 8]
C4_ITEMS = "sampled_item_metadata_1M.jsonl"
SECRET = "the review, word for word,\nin two lines"


def ask_for(number: int) -> str:
    return f'I need thing {number}, it\'s "the" one'


@pytest.fixture
def c4(tmp_path):
    """15 queries on 12 products: 4 of them in test's domains, the others in Pet."""
    folder = tmp_path / "c4"
    folder.mkdir()

    items = []
    for i, domain in enumerate(C4_DOMAINS):
        text = f"Thing {i} &amp; more.\n Good. "
        items.append(dict(item_id=f"B{i}", category=domain, metadata=text))
    write_json(folder / C4_ITEMS, items)

    asked = [(i, ask_for(i), f"B{i}") for i in range(12)]
    asked.append((12, 'i NEED  thing 1, it\'s "the" one', "B5"))
    asked.append((13, "Another thing", "B4"))
    asked.append((14, "Last thing", "B11"))
    lines = []
    for number, query, item in asked:
        lines.append([number, query, item, f"U{number}", 5, SECRET])
    write_csv(folder / "test.csv", C4_HEADER, lines)
    return folder


def test_c4(c4, tmp_path):
    out = prepare("amazon_c4", tmp_path / "out", "--from", c4, "--last", 2)

    documents = corpus(out)
    assert len(documents) == 12
    assert documents["B4"] == dict(id="B4", text="Thing 4 & more. Good.", category="Pet")

    test, qrels = read(out, "test")
    rows = list(test.values())
    assert len(rows) == 4
    for i, row in enumerate(rows):
        assert row["text"] == ask_for(i)
        assert row["category"] == C4_DOMAINS[i]
        assert qrels[row["id"]] == {f"B{i}": 1}

    for i, domain in enumerate(C4_DOMAINS[:4]):
        queries, _ = read(out, f"test_{domain.lower()}")
        assert list(queries) == [f"c4-{i}"]

    in_domain, _ = read(out, "test_in_domain")
    assert list(in_domain) == ["c4-13", "c4-14"]

    # 12 has a test query's words
    train, _ = read(out, "train")
    assert list(train) == [f"c4-{i}" for i in range(4, 12)]
    assert counts(out)["train_left_out_as_repeats"] == 1

    plain = [path for path in out.iterdir() if path.suffix != ".gz"]
    assert plain
    for path in plain:
        assert b"review" not in path.read_bytes()


C4_CHANGES = [
    ("test.csv", "item_id", "asin", "test.csv: no column 'item_id' (it has qid, query, asin"),
    ("test.csv", "B7,U7", "B7", "test.csv:17: 5 values, the header has 6"),
    ("test.csv", ",B7,", ",B77,", f"query 7 asks for 'B77', which {C4_ITEMS} does not have"),
    (
        C4_ITEMS,
        '"metadata"',
        '"text"',
        "_1M.jsonl:1: no column 'metadata' (it has item_id, category, text)",
    ),
    (
        C4_ITEMS,
        '"category": "Baby"',
        '"category": 3',
        "_1M.jsonl:3: 'category' is a int, not a string",
    ),
    (C4_ITEMS, '"B11", "cat', '"B11", cat', "_1M.jsonl:12: not JSON"),
    (C4_ITEMS, '"B3"', '"B2"', "document 'B2' came before"),
]


@pytest.mark.parametrize("file, old, new, why", C4_CHANGES)
def test_c4_changed(c4, tmp_path, capsys, file, old, new, why):
    text = (c4 / file).read_text()
    assert old in text
    (c4 / file).write_text(text.replace(old, new))
    if "came before" in why:  # no query asks for the one that is gone
        queries = (c4 / "test.csv").read_text()
        (c4 / "test.csv").write_text(queries.replace(",B3,", ",B2,"))

    line = refused(capsys, "amazon_c4", tmp_path / "out", "--from", c4, "--last", 2)

    assert why in line


def test_c4_missing(c4, tmp_path, capsys):
    (c4 / "test.csv").unlink()

    line = refused(capsys, "amazon_c4", tmp_path / "out", "--from", c4)

    assert "test.csv: no such file; fetch https://huggingface.co/" in line


# ---- All_Beauty ----------------------------------------------------------------------------------

BEAUTY_HEADER = ["user_id", "parent_asin", "rating", "timestamp", "history"]
LONG_HISTORY = " ".join(f"A{i}" for i in range(14))
TRAIN_ROWS = [
    ["u0", "A1", 5.0, 1, "A0"],
    ["u1", "A1", 5.0, 1, "A0"],
    ["u2", "A14", 5.0, 2, LONG_HISTORY],
    ["u3", "A5", 5.0, 1, "gone"],
    ["u3", "A5", 1.0, 1, "A6 gone A7"],
]
VALID_ROWS = [["u4", "V1", 5.0, 3, "A0"]]
TEST_ROWS = [
    ["u9", "A5", 4.0, 9, "A0 A1"],  # transductive
    ["u1", "A1", 4.0, 9, "A0 A2"],  # u1's own train row asked for A1: left out
    ["u8", "N1", 4.0, 9, "N0 gone"],  # inductive
    ["u7", "N2", 4.0, 9, "A0"],  # neither
    ["u0", "N2", 4.0, 9, "N0"],  # new products, but a user of train
    ["u6", "A3", 4.0, 9, ""],  # no history
    ["u5", "gone", 4.0, 9, "A0"],  # a target without metadata
]
BEAUTY_FIELDS = dict(
    main_category="All Beauty",
    average_rating=4.1,
    rating_number=3,
    features=["<b>Soft</b>", "Café"],
    description=[],
    price=None,
    images=[],
    videos=[],
    store="S",
    categories=[],
    details="{}",
    bought_together=None,
)
# the fields that a user's window is known by: history, target, text
WINDOWS = {
    "u0": (["A0"], {"A1": 1}, "Cream & A0"),
    "u1": (["A0"], {"A1": 1}, "Cream & A0"),
    "u3": (["A6", "A7"], {"A5": 1}, "Cream & A7"),
    "u2": ([f"A{i}" for i in range(4, 14)], {"A14": 1}, "Cream & A13"),
}


@pytest.fixture
def beauty(tmp_path):
    folder = tmp_path / "beauty"
    folder.mkdir()
    for part, lines in (("train", TRAIN_ROWS), ("valid", VALID_ROWS), ("test", TEST_ROWS)):
        write_csv(folder / f"All_Beauty.{part}.csv", BEAUTY_HEADER, lines)

    numbered = [f"A{i}" for i in range(16)]
    items = []
    for id in [*numbered, "N0", "N1", "N2", "V1", "never"]:
        items.append(BEAUTY_FIELDS | dict(title=f"Cream &amp; {id}", parent_asin=id))
    write_json(folder / "meta_All_Beauty.jsonl", items)
    return folder


def test_beauty(beauty, tmp_path):
    out = prepare("amazon_beauty", tmp_path / "out", "--from", beauty)

    documents = corpus(out)
    # the others are in no row that is kept
    train_items = {f"A{i}" for i in range(15) if i != 3}
    assert documents.keys() == train_items | {"N0", "N1", "N2", "V1"}
    assert documents["A0"]["title"] == "Cream & A0"
    assert documents["A0"]["text"] == "Soft, Caf."

    train, qrels = read(out, "train")
    by_user = {}
    for id, row in train.items():
        by_user[row["user"]] = (row["history"], qrels[id], row["text"])
    assert by_user == WINDOWS

    transductive, _ = read(out, "test_transductive")
    [row] = transductive.values()
    assert row["user"] == "u9"
    assert row["history"] == ["A0", "A1"]

    inductive, _ = read(out, "test_inductive")
    [row] = inductive.values()
    assert row["user"] == "u8"
    assert row["history"] == ["N0"]

    assert counts(out)["rows_left_out_as_repeats"] == 1

    buyers = [user for user in ("u0", "u1") if not is_validation(user)]
    assert documents["A0"]["popularity"] == len(buyers)
    assert documents["N0"]["popularity"] == 0
    assert documents["V1"]["popularity"] == 0
    of_u2 = [id for id, row in train.items() if row["user"] == "u2"]
    sides = {is_validation(id) for id in of_u2}
    assert sides == {is_validation("u2")}


BEAUTY_CHANGES = [
    ("All_Beauty.train.csv", "history", "past", "All_Beauty.train.csv: no column 'history'"),
    (
        "All_Beauty.valid.csv",
        "parent_asin",
        "asin",
        "All_Beauty.valid.csv: no column 'parent_asin'",
    ),
    (
        "meta_All_Beauty.jsonl",
        '"description": []',
        '"desc": []',
        "meta_All_Beauty.jsonl:1: no column 'description'",
    ),
    (
        "meta_All_Beauty.jsonl",
        '"features": ["<b>',
        '"features": [7, "<b>',
        "meta_All_Beauty.jsonl:1: one of title, features",
    ),
    ("All_Beauty.test.csv", "u8,N1", "u8,A1", "test_inductive: no example is left"),
]


@pytest.mark.parametrize("file, old, new, why", BEAUTY_CHANGES)
def test_beauty_changed(beauty, tmp_path, capsys, file, old, new, why):
    text = (beauty / file).read_text()
    assert old in text
    (beauty / file).write_text(text.replace(old, new))

    line = refused(capsys, "amazon_beauty", tmp_path / "out", "--from", beauty)

    assert why in line
