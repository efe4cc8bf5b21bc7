"""ESCI from small parquet files of exactly the published columns, and the category map in one JSON
object: both pools, and what a changed file is told.
"""

import json
import sys
from dataclasses import replace

import pytest
from helpers.prepared import corpus, counts, prepare, read, refused, script, write_json

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

CATEGORY = {
    "V0": "Video_Games",
    "V1": "Video_Games",
    "B0": "Baby Products",
    "O0": "Office_Products",
    "S0": "Sports and Outdoors",
    "X0": "Electronics",
    "X1": "Electronics",
    "X2": "Electronics",
    "K0": "Unknown",
    "T0": "Toys_and_Games",
}
COLUMNS = [
    "query_id",
    "query",
    "product_id",
    "product_locale",
    "esci_label",
    "small_version",
    "split",
]
JUDGED = [
    (1, "game boy", "V0", "us", "E", 1, "test"),
    (1, "game boy", "V1", "us", "E", 1, "test"),
    (1, "game boy", "X0", "us", "I", 1, "test"),
    (2, "crib", "B0", "us", "E", 1, "test"),
    (3, "pens", "O0", "us", "E", 1, "test"),
    (4, "ball", "S0", "us", "E", 1, "test"),
    (5, "tv", "X0", "us", "E", 1, "test"),
    (6, "Ball ", "X2", "us", "E", 1, "train"),  # a test query's words
    (7, "radio", "T0", "us", "E", 1, "train"),
    (7, "radio", "X0", "us", "E", 1, "train"),
    (7, "radio", "K0", "us", "E", 1, "train"),
    # query 7's words
    (8, "RADIO", "T0", "us", "E", 1, "train"),
    (8, "RADIO", "X2", "us", "E", 1, "train"),
    (9, "large version", "X1", "us", "E", 0, "train"),
    (10, "no exact", "X1", "us", "S", 1, "train"),
    (11, "juego", "V0", "es", "E", 1, "train"),
    (12, "uncategorised", "Z0", "us", "E", 1, "train"),
    (13, "one more", "X0", "us", "C", 1, "train"),
    (14, "console", "V1", "us", "E", 1, "train"),
]
PRODUCT_COLUMNS = [
    "product_id",
    "product_title",
    "product_description",
    "product_bullet_point",
    "product_brand",
    "product_color",
    "product_locale",
]


EXAMPLES = "shopping_queries_dataset_examples.parquet"
PRODUCTS = "shopping_queries_dataset_products.parquet"
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4a735b69\nsize 51286808\n"
TEST_QUERIES = {
    "esci-1": ("game boy", "Video_Games"),
    "esci-2": ("crib", "Baby_Products"),
    "esci-3": ("pens", "Office_Products"),
    "esci-4": ("ball", "Sports_and_Outdoors"),
}


def write_parquet(path, columns) -> None:
    parquet.write_table(pyarrow.table(columns), path)


def make_examples() -> dict[str, list]:
    """Turn the rows of JUDGED into columns."""
    columns = {}
    for place, name in enumerate(COLUMNS):
        columns[name] = [judged[place] for judged in JUDGED]
    columns["example_id"] = list(range(len(JUDGED)))
    columns["large_version"] = [1] * len(JUDGED)
    return columns


def make_products() -> dict[str, list]:
    """Make one US product of each id, and V0 once more, in Spanish."""
    ids = [*CATEGORY, "Z0", "L0"]
    titles = [f"Title &quot;{id}&quot;" for id in ids]
    columns = dict.fromkeys(PRODUCT_COLUMNS, [None] * (len(ids) + 1))
    columns["product_id"] = [*ids, "V0"]
    columns["product_locale"] = ["us"] * len(ids) + ["es"]
    columns["product_title"] = [*titles, "Juego"]
    columns["product_description"] = ["<p>Text.</p>\nMore.."] + [None] * len(ids)
    return columns


@pytest.fixture
def esci(tmp_path, monkeypatch):
    """The folder; the published sizes and hashes are set aside."""
    module = script("esci")
    for name in ("EXAMPLES", "PRODUCTS"):
        unchecked = replace(getattr(module, name), size=None, sha256=None)
        monkeypatch.setattr(module, name, unchecked)

    folder = tmp_path / "esci"
    folder.mkdir()
    write_parquet(folder / EXAMPLES, make_examples())
    write_parquet(folder / PRODUCTS, make_products())
    others = {f"other{i}": "Books" for i in range(2000)}
    categories = json.dumps(CATEGORY | others)
    (folder / "asin2category.json").write_text(categories)
    return folder


def test_small_version(esci, tmp_path, monkeypatch):
    monkeypatch.setattr(script("parquet"), "CHUNK", 100)  # pairs cut at every place

    out = prepare("esci", tmp_path / "out", "--from", esci)

    documents = corpus(out)
    v0 = dict(id="V0", title="Title V0.", text="<p>Text.</p> More.", category="Video_Games")
    # L0 is in no US judgement of the small version
    assert documents.keys() == CATEGORY.keys() | {"Z0"}
    assert documents["V0"] == v0
    assert documents["B0"]["category"] == "Baby_Products"
    assert "category" not in documents["Z0"]
    assert "category" not in documents["K0"]

    test, qrels = read(out, "test")
    queries = {id: (row["text"], row["category"]) for id, row in test.items()}
    assert queries == TEST_QUERIES
    assert qrels["esci-1"] == {"V0": 1, "V1": 1}
    video_games, _ = read(out, "test_video_games")
    assert list(video_games) == ["esci-1"]

    train, qrels = read(out, "train")
    assert qrels == {"esci-7": {"T0": 1, "X0": 1, "X2": 1}, "esci-14": {"V1": 1}}
    assert train["esci-7"]["text"] == "radio"

    numbers = counts(out)
    assert numbers["judgements_given_twice"] == 1
    assert numbers["train_left_out_as_repeats"] == 1
    assert numbers["targets"] == 4
    assert numbers["test_queries_of_other_categories"] == 1
    assert numbers["test_queries_that_share_a_target_with_train"] == 1


def test_target_pool_drawn_anew(esci, tmp_path):
    """T0 is no test query's target nor of a target's category: not in the pool. X1 and X2 are of
    one's category.
    """
    out = prepare("esci", tmp_path / "out", "--from", esci, "--target-pool")

    # 50 draws out of 3 miss none
    assert corpus(out).keys() == {"V0", "V1", "B0", "O0", "S0", "X0", "X1", "X2"}
    _, qrels = read(out, "train")
    assert qrels == {"esci-7": {"X0": 1, "X2": 1}, "esci-14": {"V1": 1}}

    again = prepare("esci", tmp_path / "again", "--from", esci, "--target-pool")
    for path in again.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("id", ["item", "item_id"])
def test_target_pool_of_upstreams_file(esci, tmp_path, id):
    entries = []
    for product in ("V0", "B0", "O0", "S0", "X0", "X1"):
        text = f"Text of {product}.\n"
        entries.append({id: product, "category": CATEGORY[product], "metadata": text})
    pool = write_json(tmp_path / "pool.jsonl", entries)
    (esci / PRODUCTS).unlink()  # not needed
    (esci / "asin2category.json").unlink()  # nor this

    out = prepare("esci", tmp_path / "out", "--from", esci, "--target-pool", pool)

    assert corpus(out)["V0"] == dict(id="V0", text="Text of V0.", category="Video_Games")
    _, qrels = read(out, "train")
    assert qrels == {"esci-7": {"X0": 1}}
    _, qrels = read(out, "test")
    assert qrels["esci-1"] == {"V0": 1}


# column, its new value in all rows (None: no such column), what is said
CHANGED_EXAMPLES = [
    ("small_version", None, "examples.parquet: no column 'small_version' (it has "),
    ("esci_label", "Exact", "labels ['Exact'], splits ['test', 'train']"),
    ("split", "train", "splits ['train']; want E, S, C, I and train, test"),
    ("product_locale", "jp", "splits []; want"),
]


@pytest.mark.parametrize("column, value, why", CHANGED_EXAMPLES)
def test_changed_examples(esci, tmp_path, capsys, column, value, why):
    columns = make_examples()
    if value is None:
        del columns[column]
    else:
        columns[column] = [value] * len(JUDGED)
    write_parquet(esci / EXAMPLES, columns)

    line = refused(capsys, "esci", tmp_path / "out", "--from", esci)

    assert why in line


@pytest.mark.parametrize("name", ["examples", "products"])
def test_torn_parquet(esci, tmp_path, capsys, name):
    path = esci / f"shopping_queries_dataset_{name}.parquet"
    data = path.read_bytes()

    path.write_bytes(data[: len(data) // 2])
    line = refused(capsys, "esci", tmp_path / "out", "--from", esci)
    assert f"{name}.parquet: torn, or not parquet" in line

    path.write_bytes(LFS_POINTER)
    line = refused(capsys, "esci", tmp_path / "out", "--from", esci)
    assert "a Git LFS pointer, not the file; run `git lfs pull`" in line


CHANGED_CATEGORIES = [
    ("[]", "does not begin with {"),
    ("", 'no "product": "category" after byte 0'),
    ('{"V0": "Video_Games", "B0": "Ba', "after byte 21; the file is torn"),
    ('{"V0": "Video_Games", "B0": ["Baby"]}', "after byte 21"),
    ('{"V0": "Video_Games"} {}', 'no "product"'),
]


@pytest.mark.parametrize("text, why", CHANGED_CATEGORIES)
def test_changed_categories(esci, tmp_path, capsys, text, why):
    (esci / "asin2category.json").write_text(text)

    line = refused(capsys, "esci", tmp_path / "out", "--from", esci)

    assert why in line


def test_the_published_size_is_held_against_the_file(esci, tmp_path, capsys, monkeypatch):
    module = script("esci")
    published = replace(module.EXAMPLES, size=51_286_808)
    monkeypatch.setattr(module, "EXAMPLES", published)

    line = refused(capsys, "esci", tmp_path / "out", "--from", esci)

    assert "bytes, 51,286,808 were published; fetch https://github.com/amazon-science" in line


def test_without_pyarrow(esci, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)

    line = refused(capsys, "esci", tmp_path / "out", "--from", esci)

    assert "parquet files need pyarrow, which is not installed: pip install pyarrow" in line
