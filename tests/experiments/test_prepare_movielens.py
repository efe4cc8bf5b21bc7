"""MovieLens, prepared from the bundled files: every promise recomputed from ratings.csv alone; and
that the future shows in nothing a policy is given.
"""

import csv
import gzip
import re
import subprocess
import sys
from collections import defaultdict
from datetime import UTC, datetime

import pytest
from helpers.prepared import ROOT, corpus, counts, prepare, read, refused, script, write_csv

from recr1.data.readers import is_test, is_validation

movielens = script("movielens")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return prepare("movielens", tmp_path_factory.mktemp("ml") / "out", "--max-windows-per-user", 3)


@pytest.fixture(scope="module")
def users():
    """{user: [(film, stars, seconds)]} in time order; of one second in the file's."""
    found = defaultdict(list)
    with gzip.open(ROOT / "experiments/data/ml_latest_small/ratings.csv.gz", "rt") as file:
        for row in csv.DictReader(file):
            found[f"u{row['userId']}"].append(
                (row["movieId"], float(row["rating"]), int(row["timestamp"]))
            )
    assert len(found) == 610
    assert sum(map(len, found.values())) == 100_836
    return {user: sorted(ratings, key=lambda r: r[2]) for user, ratings in found.items()}


def test_transductive_is_each_users_last_warm_film(out, users):
    test, qrels = read(out / "sequential", "test_transductive")
    assert {row["user"] for row in test.values()} == {user for user in users if not is_test(user)}
    docs = corpus(out / "sequential")
    for id, row in test.items():
        warm = [film for film, _, _ in users[row["user"]] if not is_test(film)]
        assert qrels[id] == {warm[-1]: 1}
        assert row["history"] == warm[-11:-1]
        assert row["text"] == docs[row["history"][-1]]["title"]


def test_train_is_windows_before_it(out, users):
    train, qrels = read(out / "sequential", "train")
    windows = defaultdict(list)
    for id, row in train.items():
        [target] = qrels[id]
        windows[row["user"]].append([*row["history"], target])
        assert is_validation(id) == is_validation(row["user"])
    assert windows.keys() == {user for user in users if not is_test(user)}
    for user, found in windows.items():
        warm = [film for film, _, _ in users[user] if not is_test(film)][:-1]
        assert found == [
            warm[max(0, end - 10) : end + 1] for end in range(len(warm) - 3, len(warm))
        ]


def test_inductive_shares_nothing_with_train(out, users):
    train, qrels = read(out / "sequential", "train")
    shown = {film for id, row in train.items() for film in (*row["history"], *qrels[id])}
    test, qrels = read(out / "sequential", "test_inductive")
    assert not {row["user"] for row in test.values()} & {row["user"] for row in train.values()}
    cold = {
        user: [film for film, _, _ in ratings if is_test(film)]
        for user, ratings in users.items()
        if is_test(user)
    }
    assert len(test) == sum(max(0, min(3, len(films) - 1)) for films in cold.values())
    for id, row in test.items():
        films, [target] = cold[row["user"]], qrels[id]
        at = films.index(target)
        assert at >= max(1, len(films) - 3)
        assert row["history"] == films[max(0, at - 10) : at]
        assert not {target, *row["history"]} & shown


@pytest.mark.parametrize("name", ["sequential", "list"])
def test_popularity_counts_train_without_validation(out, users, name):
    docs = corpus(out / name)
    expected = defaultdict(set)
    if name == "list":
        for user, ratings in users.items():
            for film, _, _ in ratings[:-10] if not is_validation(user) else ():
                expected[film].add(user)
    else:
        train, qrels = read(out / name, "train")
        for id, row in train.items():
            for film in (*row["history"], *qrels[id]) if not is_validation(id) else ():
                expected[film].add(row["user"])
    assert {id: row["popularity"] for id, row in docs.items()} == {
        id: len(expected[id]) for id in docs
    }
    assert docs["1"] | dict(popularity=0) == dict(
        id="1",
        title="Toy Story (1995)",
        text="Adventure Animation Children Comedy Fantasy",
        genres=["Adventure", "Animation", "Children", "Comedy", "Fantasy"],
        popularity=0,
    )


def test_pools(out, users):
    docs = corpus(out / "list")
    for name in ("train", "test"):
        found, qrels = read(out / "list", name)
        for id, row in found.items():
            ratings = users[row["user"]]
            rated = {film for film, _, _ in ratings}
            cut = int(re.search(r"-cut(\d+)", id)[1])
            assert (cut == len(ratings) - 10) == (name == "test")
            assert (len(ratings) - cut) % 10 == 0
            assert cut >= 10
            future = {film for film, stars, _ in ratings[cut : cut + 10] if stars >= 4}
            assert set(qrels[id]) == future
            assert set(qrels[id].values()) == {1}
            assert row["history"] == [
                [film, datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d")]
                for film, _, time in ratings[cut - 10 : cut]
            ]
            pool = row["candidates"]
            assert len(set(pool)) == 20
            assert rated & set(pool) == future
            seen = [docs[film]["popularity"] for film in pool]
            assert seen == sorted(seen, reverse=True)
            assert row["profile"] == row["text"]
            liked = sum(stars >= 4 for _, stars, _ in ratings[:cut])
            assert re.match(
                rf"Has rated {cut} films since \d{{4}}-\d\d-\d\d, {liked} of them 4 stars or "
                r"more\.",
                row["profile"],
            )
    draws = [
        docs[film]["popularity"]
        for id, row in found.items()
        for film in row["candidates"]
        if film not in qrels[id]
    ]
    every = [row["popularity"] for row in docs.values()]
    # of a draw in proportion to popularity: 62; of a uniform one 9
    expected = sum(p * p for p in every) / sum(every)
    # below: without replacement, and without what the user rated
    assert 0.75 * expected < sum(draws) / len(draws) <= expected


def test_the_future_shows_in_nothing_but_targets_and_pools(users):
    """All ratings of the last ten are swapped: profile and history of the test stay."""
    films = {
        film: dict(id=film, title=film, genres=["Drama"])
        for film in {film for ratings in users.values() for film, _, _ in ratings}
    }
    some = {user: [movielens.Rating(*r) for r in users[user]] for user in list(users)[:30]}
    swapped = {
        user: ratings[:-10] + [r._replace(stars=4.5 if r.stars < 4 else 1.0) for r in ratings[-10:]]
        for user, ratings in some.items()
    }
    (one, _), (other, _) = (movielens.make_lists(films, of, 1) for of in (some, swapped))
    by_user = {row["user"]: row for row in other["test"].rows}
    both = [row for row in one["test"].rows if row["user"] in by_user]
    assert len(both) > 20
    assert one["train"].rows == other["train"].rows
    for row in both:
        same = by_user[row["user"]]
        assert (row["text"], row["history"]) == (same["text"], same["history"])
        assert not set(one["test"].targets[row["id"]]) & set(other["test"].targets[same["id"]])


def test_counts(out):
    said = counts(out / "sequential")
    assert (
        said["documents"],
        said["users"],
        said["train"] + said["validation"],
        said["test_transductive"],
    ) == (9742, 610, 3 * 550, 550)
    train, qrels = read(out / "sequential", "train")
    shown = {film for id, row in train.items() for film in (*row["history"], *qrels[id])}
    assert said["transductive_targets_not_in_train"] == sum(
        not judged.keys() & shown
        for judged in read(out / "sequential", "test_transductive")[1].values()
    )
    assert counts(out / "list")["test"] == len(read(out / "list", "test")[0])


@pytest.mark.parametrize(
    "file, old, new, why",
    [
        (
            "movies.csv",
            "genres",
            "tags",
            "movies.csv: no column 'genres' (it has movieId, title, tags)",
        ),
        ("ratings.csv", "rating,", "stars,", "ratings.csv: no column 'rating'"),
        ("ratings.csv", "\n1,2,4.0", "\n1,2,good", "ratings.csv:3: rating is 'good', not a number"),
        ("ratings.csv", "\n1,2,4.0,", "\n1,2,", "ratings.csv:3: 3 values, the header has 4"),
        ("ratings.csv", "\n1,2,4.0", "\n1,99,4.0", "ratings.csv:3: film '99' is not in movies.csv"),
        ("ratings.csv", "\n1,2,4.0", "\n1,1,4.0", "ratings.csv:3: user 1 rated film 1 before"),
        ("movies.csv", "2,Film", "1,Film", "movies.csv:3: film 1 came before"),
        ("ratings.csv", "", "", "has rated so many films that none are left for a pool of 20"),
    ],
)
def test_changed_files(tmp_path, capsys, file, old, new, why):
    write_csv(
        tmp_path / "movies.csv",
        ["movieId", "title", "genres"],
        [[i, f"Film {i}", "Drama|War"] for i in range(1, 26)],
    )
    write_csv(
        tmp_path / "ratings.csv",
        ["userId", "movieId", "rating", "timestamp"],
        [[u, i, 4.0, i] for u in range(1, 41) for i in range(1, 26)],
    )
    text = (tmp_path / file).read_text()
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new, 1))
    assert why in refused(capsys, "movielens", tmp_path / "out", "--from", tmp_path)


def test_as_a_user_starts_it(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "experiments/prepare/movielens.py",
            "--out",
            "out",
            "--from",
            "nowhere",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert (
        done.stderr
        == "movielens.py: nowhere/movies.csv: no such file (nor movies.csv.gz); check the folder\n"
    )
    assert not list(tmp_path.iterdir())
