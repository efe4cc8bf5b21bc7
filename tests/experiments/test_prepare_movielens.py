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
from operator import itemgetter

import pytest
from helpers.prepared import ROOT, corpus, counts, prepare, read, refused, script, write_csv

from recr1.data.readers import is_test, is_validation

movielens = script("movielens")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ml") / "out"
    return prepare("movielens", folder, "--max-windows-per-user", 3)


@pytest.fixture(scope="module")
def users():
    """Read {user: [(film, stars, seconds)]} in time order; of one second in the file's."""
    ratings = defaultdict(list)
    path = ROOT / "experiments/data/ml_latest_small/ratings.csv.gz"
    with gzip.open(path, "rt") as file:
        for row in csv.DictReader(file):
            rating = (row["movieId"], float(row["rating"]), int(row["timestamp"]))
            ratings[f"u{row['userId']}"].append(rating)
    assert len(ratings) == 610
    assert sum(len(of_user) for of_user in ratings.values()) == 100_836
    for of_user in ratings.values():
        of_user.sort(key=itemgetter(2))
    return dict(ratings)


def list_warm_films(ratings) -> list[str]:
    return [film for film, _, _ in ratings if not is_test(film)]


def list_cold_films(ratings) -> list[str]:
    return [film for film, _, _ in ratings if is_test(film)]


def collect_users(rows) -> set[str]:
    return {row["user"] for row in rows.values()}


def collect_shown_films(rows, qrels) -> set[str]:
    """Collect every film that a history or a target of these rows shows."""
    shown = set()
    for id, row in rows.items():
        shown.update(row["history"])
        shown.update(qrels[id])
    return shown


def test_transductive_is_each_users_last_warm_film(out, users):
    test, qrels = read(out / "sequential", "test_transductive")
    docs = corpus(out / "sequential")

    assert collect_users(test) == {user for user in users if not is_test(user)}
    for id, row in test.items():
        warm = list_warm_films(users[row["user"]])
        last_title = docs[row["history"][-1]]["title"]
        assert qrels[id] == {warm[-1]: 1}
        assert row["history"] == warm[-11:-1]
        assert row["text"] == last_title


def test_train_is_windows_before_it(out, users):
    train, qrels = read(out / "sequential", "train")
    windows = defaultdict(list)
    for id, row in train.items():
        [target] = qrels[id]
        windows[row["user"]].append([*row["history"], target])
        assert is_validation(id) == is_validation(row["user"])

    assert windows.keys() == {user for user in users if not is_test(user)}
    for user, actual in windows.items():
        before_test = list_warm_films(users[user])[:-1]
        expected = []
        for end in range(len(before_test) - 3, len(before_test)):
            begin = max(0, end - 10)
            expected.append(before_test[begin : end + 1])
        assert actual == expected


def test_inductive_shares_nothing_with_train(out, users):
    train, train_qrels = read(out / "sequential", "train")
    shown = collect_shown_films(train, train_qrels)
    test, qrels = read(out / "sequential", "test_inductive")
    assert not collect_users(test) & collect_users(train)

    num_windows = 0
    for user, ratings in users.items():
        if is_test(user):
            num_films = len(list_cold_films(ratings))
            num_windows += max(0, min(3, num_films - 1))
    assert len(test) == num_windows

    for id, row in test.items():
        assert is_test(row["user"])
        films = list_cold_films(users[row["user"]])
        [target] = qrels[id]
        end = films.index(target)
        begin = max(0, end - 10)
        assert end >= max(1, len(films) - 3)
        assert row["history"] == films[begin:end]
        assert not {target, *row["history"]} & shown


def collect_list_viewers(users) -> dict[str, set[str]]:
    """Collect who rated each film before the last ten ratings, without validation."""
    viewers = defaultdict(set)
    for user, ratings in users.items():
        if is_validation(user):
            continue
        for film, _, _ in ratings[:-10]:
            viewers[film].add(user)
    return viewers


def collect_window_viewers(folder) -> dict[str, set[str]]:
    """Collect whose train windows show each film, without validation."""
    viewers = defaultdict(set)
    train, qrels = read(folder, "train")
    for id, row in train.items():
        if is_validation(id):
            continue
        for film in (*row["history"], *qrels[id]):
            viewers[film].add(row["user"])
    return viewers


GENRES = ["Adventure", "Animation", "Children", "Comedy", "Fantasy"]


@pytest.mark.parametrize("name", ["sequential", "list"])
def test_popularity_counts_train_without_validation(out, users, name):
    docs = corpus(out / name)
    if name == "list":
        viewers = collect_list_viewers(users)
    else:
        viewers = collect_window_viewers(out / name)

    for id, row in docs.items():
        assert row["popularity"] == len(viewers[id])
    toy_story = docs["1"]
    del toy_story["popularity"]
    text = "Adventure Animation Children Comedy Fantasy"
    assert toy_story == dict(id="1", title="Toy Story (1995)", text=text, genres=GENRES)


def format_history(ratings) -> list[list[str]]:
    """Format [film, day] of each rating."""
    history = []
    for film, _, seconds in ratings:
        day = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")
        history.append([film, day])
    return history


def assert_list_is_of_its_cut(id, row, judged, ratings, is_last):
    """Hold one example against the user's ratings before its cut and the ten after it."""
    cut = int(re.search(r"-cut(\d+)", id)[1])
    assert (cut == len(ratings) - 10) == is_last
    assert (len(ratings) - cut) % 10 == 0
    assert cut >= 10

    future = {film for film, stars, _ in ratings[cut : cut + 10] if stars >= 4}
    assert set(judged) == future
    assert set(judged.values()) == {1}
    assert row["history"] == format_history(ratings[cut - 10 : cut])

    rated = {film for film, _, _ in ratings}
    pool = set(row["candidates"])
    assert len(pool) == 20
    assert rated & pool == future

    num_liked = sum(stars >= 4 for _, stars, _ in ratings[:cut])
    since = rf"Has rated {cut} films since \d{{4}}-\d\d-\d\d, "
    assert row["profile"] == row["text"]
    assert re.match(since + rf"{num_liked} of them 4 stars or more\.", row["profile"])


def test_pools(out, users):
    docs = corpus(out / "list")
    popularity = {id: row["popularity"] for id, row in docs.items()}

    for name in ("train", "test"):
        lists, qrels = read(out / "list", name)
        for id, row in lists.items():
            ratings = users[row["user"]]
            assert_list_is_of_its_cut(id, row, qrels[id], ratings, is_last=name == "test")
            by_place = [popularity[film] for film in row["candidates"]]
            assert by_place == sorted(by_place, reverse=True)

    draws = []
    test, qrels = read(out / "list", "test")
    for id, row in test.items():
        drawn = set(row["candidates"]) - qrels[id].keys()
        draws += [popularity[film] for film in drawn]
    # of a draw in proportion to popularity: 62; of a uniform one 9
    squares = sum(number * number for number in popularity.values())
    expected = squares / sum(popularity.values())
    mean = sum(draws) / len(draws)
    # below: without replacement, and without what the user rated
    assert 0.75 * expected < mean <= expected


def swap_stars(rating):
    """Make a good rating of a bad one, and a bad one of a good one."""
    stars = 4.5 if rating.stars < 4 else 1.0
    return rating._replace(stars=stars)


def test_the_future_shows_in_nothing_but_targets_and_pools(users):
    """All ratings of the last ten are swapped: profile and history of the test stay."""
    films = {}
    for ratings in users.values():
        for film, _, _ in ratings:
            films[film] = dict(id=film, title=film, genres=["Drama"])
    some = {}
    swapped = {}
    for user in list(users)[:30]:
        ratings = [movielens.Rating(*rating) for rating in users[user]]
        some[user] = ratings
        swapped[user] = ratings[:-10] + [swap_stars(rating) for rating in ratings[-10:]]

    one, _ = movielens.make_lists(films, some, 1)
    other, _ = movielens.make_lists(films, swapped, 1)

    assert one["train"].rows == other["train"].rows
    by_user = {row["user"]: row for row in other["test"].rows}
    both = [row for row in one["test"].rows if row["user"] in by_user]
    assert len(both) > 20
    for row in both:
        same = by_user[row["user"]]
        targets = set(one["test"].targets[row["id"]])
        swapped_targets = set(other["test"].targets[same["id"]])
        assert row["text"] == same["text"]
        assert row["history"] == same["history"]
        assert not targets & swapped_targets


def test_counts(out):
    numbers = counts(out / "sequential")
    assert numbers["documents"] == 9742
    assert numbers["users"] == 610
    assert numbers["train"] + numbers["validation"] == 3 * 550
    assert numbers["test_transductive"] == 550

    train, qrels = read(out / "sequential", "train")
    shown = collect_shown_films(train, qrels)
    _, judged = read(out / "sequential", "test_transductive")
    num_unseen = sum(not targets.keys() & shown for targets in judged.values())
    assert numbers["transductive_targets_not_in_train"] == num_unseen

    lists, _ = read(out / "list", "test")
    assert counts(out / "list")["test"] == len(lists)


CHANGED_FILES = [
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
]


@pytest.mark.parametrize("file, old, new, why", CHANGED_FILES)
def test_changed_files(tmp_path, capsys, file, old, new, why):
    films = [[i, f"Film {i}", "Drama|War"] for i in range(1, 26)]
    write_csv(tmp_path / "movies.csv", ["movieId", "title", "genres"], films)
    ratings = []
    for user in range(1, 41):
        ratings += [[user, film, 4.0, film] for film in range(1, 26)]
    write_csv(tmp_path / "ratings.csv", ["userId", "movieId", "rating", "timestamp"], ratings)
    text = (tmp_path / file).read_text()
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new, 1))

    line = refused(capsys, "movielens", tmp_path / "out", "--from", tmp_path)

    assert why in line


def test_as_a_user_starts_it(tmp_path):
    command = [sys.executable, ROOT / "experiments/prepare/movielens.py"]
    options = ["--out", "out", "--from", "nowhere"]

    result = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True)

    assert result.returncode == 2
    assert result.stdout == ""
    why = "nowhere/movies.csv: no such file (nor movies.csv.gz); check the folder"
    assert result.stderr == f"movielens.py: {why}\n"
    assert not list(tmp_path.iterdir())
