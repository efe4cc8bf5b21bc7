"""ESCI from small parquet files of exactly the published columns, and the category map in one JSON
object: both pools, and what a changed file is told.
"""

import json
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


def rewrite(folder, name, columns):
    parquet.write_table(pyarrow.table(columns), folder / f"shopping_queries_dataset_{name}.parquet")


def examples():
    return dict(zip(COLUMNS, map(list, zip(*JUDGED)))) | dict(
        example_id=list(range(len(JUDGED))), large_version=[1] * len(JUDGED)
    )


@pytest.fixture
def esci(tmp_path, monkeypatch):
    """The folder; the published sizes and hashes are set aside."""
    for name in ("EXAMPLES", "PRODUCTS"):
        monkeypatch.setattr(
            script("esci"), name, replace(getattr(script("esci"), name), size=None, sha256=None)
        )
    folder = tmp_path / "esci"
    folder.mkdir()
    rewrite(folder, "examples", examples())
    ids = [*CATEGORY, "Z0", "L0"]
    columns = dict.fromkeys(PRODUCT_COLUMNS, [None] * (len(ids) + 1)) | dict(
        product_id=[*ids, "V0"],
        product_locale=["us"] * len(ids) + ["es"],
        product_title=[f"Title &quot;{id}&quot;" for id in ids] + ["Juego"],
        product_description=["<p>Text.</p>\nMore.."] + [None] * len(ids),
    )
    rewrite(folder, "products", columns)
    (folder / "asin2category.json").write_text(
        json.dumps(CATEGORY | {f"other{i}": "Books" for i in range(2000)})
    )
    return folder


def test_small_version(esci, tmp_path, monkeypatch):
    monkeypatch.setattr(script("parquet"), "CHUNK", 100)  # pairs cut at every place
    out = prepare("esci", tmp_path / "out", "--from", esci)
    docs = corpus(out)
    assert docs.keys() == CATEGORY.keys() | {"Z0"}  # L0 is in no US judgement of the small version
    assert docs["V0"] == dict(
        id="V0", title="Title V0.", text="<p>Text.</p> More.", category="Video_Games"
    )
    assert docs["B0"]["category"] == "Baby_Products"
    assert "category" not in docs["Z0"]
    assert "category" not in docs["K0"]
    test, qrels = read(out, "test")
    assert {id: (row["text"], row["category"]) for id, row in test.items()} == {
        "esci-1": ("game boy", "Video_Games"),
        "esci-2": ("crib", "Baby_Products"),
        "esci-3": ("pens", "Office_Products"),
        "esci-4": ("ball", "Sports_and_Outdoors"),
    }
    assert qrels["esci-1"] == {"V0": 1, "V1": 1}
    assert list(read(out, "test_video_games")[0]) == ["esci-1"]
    train, qrels = read(out, "train")
    assert qrels == {"esci-7": {"T0": 1, "X0": 1, "X2": 1}, "esci-14": {"V1": 1}}
    assert train["esci-7"]["text"] == "radio"
    said = counts(out)
    assert (said["judgements_given_twice"], said["train_left_out_as_repeats"], said["targets"]) == (
        1,
        1,
        4,
    )
    assert (
        said["test_queries_of_other_categories"],
        said["test_queries_that_share_a_target_with_train"],
    ) == (1, 1)


def test_target_pool_drawn_anew(esci, tmp_path):
    """T0 is no test query's target nor of a target's category: not in the pool. X1 and X2 are of
    one's category.
    """
    out = prepare("esci", tmp_path / "out", "--from", esci, "--target-pool")
    # 50 draws out of 3 miss none
    assert corpus(out).keys() == {"V0", "V1", "B0", "O0", "S0", "X0", "X1", "X2"}
    assert read(out, "train")[1] == {"esci-7": {"X0": 1, "X2": 1}, "esci-14": {"V1": 1}}
    again = prepare("esci", tmp_path / "again", "--from", esci, "--target-pool")
    assert all((out / path.name).read_bytes() == path.read_bytes() for path in again.iterdir())


@pytest.mark.parametrize("id", ["item", "item_id"])
def test_target_pool_of_upstreams_file(esci, tmp_path, id):
    pool = write_json(
        tmp_path / "pool.jsonl",
        [
            {id: p, "category": CATEGORY[p], "metadata": f"Text of {p}.\n"}
            for p in ("V0", "B0", "O0", "S0", "X0", "X1")
        ],
    )
    for name in ("shopping_queries_dataset_products.parquet", "asin2category.json"):
        (esci / name).unlink()  # not needed
    out = prepare("esci", tmp_path / "out", "--from", esci, "--target-pool", pool)
    assert corpus(out)["V0"] == dict(id="V0", text="Text of V0.", category="Video_Games")
    assert read(out, "train")[1] == {"esci-7": {"X0": 1}}
    assert read(out, "test")[1]["esci-1"] == {"V0": 1}


@pytest.mark.parametrize(
    "columns, why",
    [
        (
            lambda c: {k: v for k, v in c.items() if k != "small_version"},
            "examples.parquet: no column 'small_version' (it has ",
        ),
        (
            lambda c: c | dict(esci_label=["Exact"] * len(JUDGED)),
            "labels ['Exact'], splits ['test', 'train']",
        ),
        (
            lambda c: c | dict(split=["train"] * len(JUDGED)),
            "splits ['train']; want E, S, C, I and train, test",
        ),
        (lambda c: c | dict(product_locale=["jp"] * len(JUDGED)), "splits []; want"),
    ],
)
def test_changed_examples(esci, tmp_path, capsys, columns, why):
    rewrite(esci, "examples", columns(examples()))
    assert why in refused(capsys, "esci", tmp_path / "out", "--from", esci)


@pytest.mark.parametrize("name", ["examples", "products"])
def test_torn_parquet(esci, tmp_path, capsys, name):
    path = esci / f"shopping_queries_dataset_{name}.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert f"{name}.parquet: torn, or not parquet" in refused(
        capsys, "esci", tmp_path / "out", "--from", esci
    )
    path.write_bytes(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4a735b69\nsize 51286808\n"
    )
    assert "a Git LFS pointer, not the file; run `git lfs pull`" in refused(
        capsys, "esci", tmp_path / "out", "--from", esci
    )


@pytest.mark.parametrize(
    "text, why",
    [
        ("[]", "does not begin with {"),
        ("", 'no "product": "category" after byte 0'),
        ('{"V0": "Video_Games", "B0": "Ba', "after byte 21; the file is torn"),
        ('{"V0": "Video_Games", "B0": ["Baby"]}', "after byte 21"),
        ('{"V0": "Video_Games"} {}', 'no "product"'),
    ],
)
def test_changed_categories(esci, tmp_path, capsys, text, why):
    (esci / "asin2category.json").write_text(text)
    assert why in refused(capsys, "esci", tmp_path / "out", "--from", esci)


def test_the_published_size_is_held_against_the_file(esci, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        script("esci"), "EXAMPLES", replace(script("esci").EXAMPLES, size=51_286_808)
    )
    assert "bytes, 51,286,808 were published; fetch https://github.com/amazon-science" in refused(
        capsys, "esci", tmp_path / "out", "--from", esci
    )


def test_without_pyarrow(esci, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    assert "parquet files need pyarrow, which is not installed: pip install pyarrow" in refused(
        capsys, "esci", tmp_path / "out", "--from", esci
    )
