"""Amazon-C4 and All_Beauty from small files of exactly their upstream's formats: what is written,
and what a changed file is told.
"""

import pytest
from helpers.prepared import corpus, counts, prepare, read, refused, write_csv, write_json

from recr1.data.readers import is_validation

# ---- Amazon-C4 -----------------------------------------------------------------------------------

C4_HEADER = ["qid", "query", "item_id", "user_id", "ori_rating", "ori_review"]
SECRET = "the review, word for word,\nin two lines"


@pytest.fixture
def c4(tmp_path):
    """15 queries on 12 products: 4 of them in test's domains, the others in Pet."""
    folder = tmp_path / "c4"
    folder.mkdir()
    domain = ["Sports", "Office", "Baby", "Games", *["Pet"] * 8]
    write_json(
        folder / "sampled_item_metadata_1M.jsonl",
        [
            dict(item_id=f"B{i}", category=domain[i], metadata=f"Thing {i} &amp; more.\n Good. ")
            for i in range(12)
        ],
    )
    asked = [(i, f'I need thing {i}, it\'s "the" one', f"B{i}") for i in range(12)]
    asked += [
        (12, 'i NEED  thing 1, it\'s "the" one', "B5"),
        (13, "Another thing", "B4"),
        (14, "Last thing", "B11"),
    ]
    write_csv(folder / "test.csv", C4_HEADER, [[*row, f"U{row[0]}", 5, SECRET] for row in asked])
    return folder


def test_c4(c4, tmp_path):
    out = prepare("amazon_c4", tmp_path / "out", "--from", c4, "--last", 2)
    assert corpus(out)["B4"] == dict(id="B4", text="Thing 4 & more. Good.", category="Pet")
    assert len(corpus(out)) == 12
    test, qrels = read(out, "test")
    assert [(row["text"], row["category"], qrels[id]) for id, row in test.items()] == [
        (f'I need thing {i}, it\'s "the" one', name, {f"B{i}": 1})
        for i, name in enumerate(("Sports", "Office", "Baby", "Games"))
    ]
    for i, name in enumerate(("sports", "office", "baby", "games")):
        assert list(read(out, f"test_{name}")[0]) == [f"c4-{i}"]
    assert list(read(out, "test_in_domain")[0]) == ["c4-13", "c4-14"]
    # 12 has a test query's words
    assert list(read(out, "train")[0]) == [f"c4-{i}" for i in range(4, 12)]
    assert counts(out)["train_left_out_as_repeats"] == 1
    assert not any(b"review" in path.read_bytes() for path in out.iterdir() if path.suffix != ".gz")


@pytest.mark.parametrize(
    "file, old, new, why",
    [
        ("test.csv", "item_id", "asin", "test.csv: no column 'item_id' (it has qid, query, asin"),
        ("test.csv", "B7,U7", "B7", "test.csv:17: 5 values, the header has 6"),
        (
            "test.csv",
            ",B7,",
            ",B77,",
            "query 7 asks for 'B77', which sampled_item_metadata_1M.jsonl does not have",
        ),
        (
            "sampled_item_metadata_1M.jsonl",
            '"metadata"',
            '"text"',
            "_1M.jsonl:1: no column 'metadata' (it has item_id, category, text)",
        ),
        (
            "sampled_item_metadata_1M.jsonl",
            '"category": "Baby"',
            '"category": 3',
            "_1M.jsonl:3: 'category' is a int, not a string",
        ),
        ("sampled_item_metadata_1M.jsonl", '"B11", "cat', '"B11", cat', "_1M.jsonl:12: not JSON"),
        ("sampled_item_metadata_1M.jsonl", '"B3"', '"B2"', "document 'B2' came before"),
    ],
)
def test_c4_changed(c4, tmp_path, capsys, file, old, new, why):
    text = (c4 / file).read_text()
    assert old in text
    (c4 / file).write_text(text.replace(old, new))
    if "came before" in why:  # no query asks for the one that is gone
        (c4 / "test.csv").write_text((c4 / "test.csv").read_text().replace(",B3,", ",B2,"))
    assert why in refused(capsys, "amazon_c4", tmp_path / "out", "--from", c4, "--last", 2)


def test_c4_missing(c4, tmp_path, capsys):
    (c4 / "test.csv").unlink()
    said = refused(capsys, "amazon_c4", tmp_path / "out", "--from", c4)
    assert "test.csv: no such file; fetch https://huggingface.co/" in said


# ---- All_Beauty ----------------------------------------------------------------------------------

BEAUTY_HEADER = ["user_id", "parent_asin", "rating", "timestamp", "history"]
TEST_ROWS = [
    ["u9", "A5", 4.0, 9, "A0 A1"],  # transductive
    ["u1", "A1", 4.0, 9, "A0 A2"],  # u1's own train row asked for A1: left out
    ["u8", "N1", 4.0, 9, "N0 gone"],  # inductive
    ["u7", "N2", 4.0, 9, "A0"],  # neither
    ["u0", "N2", 4.0, 9, "N0"],  # new products, but a user of train
    ["u6", "A3", 4.0, 9, ""],  # no history
    ["u5", "gone", 4.0, 9, "A0"],  # a target without metadata
]


def beauty_item(id: str) -> dict:
    return dict(
        main_category="All Beauty",
        title=f"Cream &amp; {id}",
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
        parent_asin=id,
        bought_together=None,
    )


@pytest.fixture
def beauty(tmp_path):
    folder = tmp_path / "beauty"
    folder.mkdir()
    long = " ".join(f"A{i}" for i in range(14))
    files = dict(
        train=[
            ["u0", "A1", 5.0, 1, "A0"],
            ["u1", "A1", 5.0, 1, "A0"],
            ["u2", "A14", 5.0, 2, long],
            ["u3", "A5", 5.0, 1, "gone"],
            ["u3", "A5", 1.0, 1, "A6 gone A7"],
        ],
        valid=[["u4", "V1", 5.0, 3, "A0"]],
        test=TEST_ROWS,
    )
    for part, lines in files.items():
        write_csv(folder / f"All_Beauty.{part}.csv", BEAUTY_HEADER, lines)
    ids = [*(f"A{i}" for i in range(16)), "N0", "N1", "N2", "V1", "never"]
    write_json(folder / "meta_All_Beauty.jsonl", [beauty_item(id) for id in ids])
    return folder


def test_beauty(beauty, tmp_path):
    out = prepare("amazon_beauty", tmp_path / "out", "--from", beauty)
    docs = corpus(out)
    # the others are in no row that is kept
    assert docs.keys() == {*(f"A{i}" for i in range(15) if i != 3), "N0", "N1", "N2", "V1"}
    assert docs["A0"]["title"] == "Cream & A0"
    assert docs["A0"]["text"] == "Soft, Caf."
    train, qrels = read(out, "train")
    by_user = {row["user"]: (row["history"], qrels[id], row["text"]) for id, row in train.items()}
    assert by_user == {
        "u0": (["A0"], {"A1": 1}, "Cream & A0"),
        "u1": (["A0"], {"A1": 1}, "Cream & A0"),
        "u3": (["A6", "A7"], {"A5": 1}, "Cream & A7"),
        "u2": ([f"A{i}" for i in range(4, 14)], {"A14": 1}, "Cream & A13"),
    }
    assert [
        (row["user"], row["history"]) for row in read(out, "test_transductive")[0].values()
    ] == [("u9", ["A0", "A1"])]
    assert [(row["user"], row["history"]) for row in read(out, "test_inductive")[0].values()] == [
        ("u8", ["N0"])
    ]
    assert counts(out)["rows_left_out_as_repeats"] == 1
    kept = [user for user in ("u0", "u1") if not is_validation(user)]
    assert docs["A0"]["popularity"] == len(kept)
    assert docs["N0"]["popularity"] == docs["V1"]["popularity"] == 0
    assert {is_validation(id) for id, row in train.items() if row["user"] == "u2"} == {
        is_validation("u2")
    }


@pytest.mark.parametrize(
    "file, old, new, why",
    [
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
    ],
)
def test_beauty_changed(beauty, tmp_path, capsys, file, old, new, why):
    text = (beauty / file).read_text()
    assert old in text
    (beauty / file).write_text(text.replace(old, new))
    assert why in refused(capsys, "amazon_beauty", tmp_path / "out", "--from", beauty)
