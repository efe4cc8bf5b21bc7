"""Prepare MovieLens latest-small as sequences and as lists.

It is bundled, or --from another MovieLens folder -> DIR/sequential and DIR/list.

sequential: last <= 10 films -> the next one; every rating counts as a view. One train file, two
test settings:
  train              windows slid over the films of every user but the inductive ones, all films but
                     the cold ones, without each user's last film
  test_transductive  the last film of each of those users
  test_inductive     of a hash tenth of the users, the films of a hash tenth of all (the cold ones):
                     neither user, history nor target is in train
list: profile, dated history and a pool of 20 -> ordered list. Every ten ratings of a user are a
  future: those of 4 stars and more are the targets, films the user never rated fill the pool, drawn
  by popularity. Each user's last ten ratings are test, earlier tens are train; profile and history
  come from before.
Ratings of the same second keep the file's order. Popularity counts train without validation.
"""

import sys
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
from checks import (
    PrepareError,
    Split,
    by_interaction,
    check_inductive,
    count_popularity,
    get_history,
)
from tqdm import tqdm
from upstream import find_file, iterate_csv, make_example_id, parse_number, to_one_line
from writing import run_command_line, write_data_set

from recr1.data.readers import is_test, is_validation
from recr1.utils.counter_rng import draw_uniforms
from recr1.utils.files import fingerprint_file

BUNDLED = Path(__file__).resolve().parents[1] / "data/ml_latest_small"
HISTORY = 10
FUTURE = 10
POOL = 20
LIKED = 4.0
NO_GENRES = "(no genres listed)"


class Rating(NamedTuple):
    """Hold a rating of a film."""

    film: str
    stars: float
    time: int  # seconds since 1970, UTC


def read_films(path: Path) -> dict[str, dict]:
    """Return {id: corpus row without popularity}, in file order."""
    films = {}
    for line, row in iterate_csv(path, ("movieId", "title", "genres")):
        id = row["movieId"]
        if id in films:
            raise PrepareError(f"{path}:{line}: film {id} came before; keep one of the lines")
        genres = row["genres"].split("|")
        if row["genres"] == NO_GENRES:
            genres = []
        title = to_one_line(row["title"])
        films[id] = dict(id=id, title=title, text=" ".join(genres), genres=genres)
    return films


def read_ratings(path: Path, films: dict[str, dict]) -> dict[str, list[Rating]]:
    """Return {user: ratings, oldest first}."""
    users: dict[str, list[Rating]] = {}
    seen = set()
    for line, row in iterate_csv(path, ("userId", "movieId", "rating", "timestamp")):
        user = f"u{row['userId']}"
        film = row["movieId"]
        if film not in films:
            raise PrepareError(
                f"{path}:{line}: film {film!r} is not in movies.csv; "
                "take both files from one release"
            )
        if (user, film) in seen:
            raise PrepareError(
                f"{path}:{line}: user {row['userId']} rated film {film} before; "
                "keep one of the lines"
            )
        seen.add((user, film))
        stars = parse_number(path, line, "rating", row["rating"])
        time = parse_number(path, line, "timestamp", row["timestamp"], int)
        users.setdefault(user, []).append(Rating(film, stars, time))
    for ratings in users.values():
        ratings.sort(key=get_time)  # stable
    return users


def get_time(rating: Rating) -> int:
    """Return the second of a rating."""
    return rating.time


def make_sequences(
    films: dict[str, dict], users: dict[str, list[Rating]], most: int | None
) -> dict[str, Split]:
    """Cut windows over films in time order. most: of each user only so many windows, the latest."""
    train = Split()
    transductive = Split()
    inductive = Split()
    for user, ratings in users.items():
        is_inductive = is_test(user)
        seen = [rating.film for rating in ratings if is_test(rating.film) == is_inductive]
        if is_inductive:
            add_windows(inductive, films, user, "cold", seen, most)
            continue
        # the last film is the transductive test's
        add_windows(train, films, user, "w", seen[:-1], most)
        if len(seen) >= 2:
            add_window(transductive, films, user, "last", seen)
    return dict(train=train, test_transductive=transductive, test_inductive=inductive)


def add_windows(
    split: Split, films: dict[str, dict], user: str, name: str, seen: list[str], most: int | None
) -> None:
    """Add a window for every film of `seen` but the first, or for the latest `most` of them."""
    first = 1
    if most:
        first = max(1, len(seen) - most)
    for target in range(first, len(seen)):
        add_window(split, films, user, f"{name}{target}", seen[: target + 1])


def add_window(split: Split, films: dict[str, dict], user: str, name: str, seen: list[str]) -> None:
    """Add one window: the last film of `seen` is the target, those before it the history."""
    *past, target = seen
    history = past[-HISTORY:]
    id = make_example_id(user, name)
    row = dict(id=id, text=films[history[-1]]["title"], history=history, user=user)
    split.add(row, [(target, 1.0)])


def make_lists(
    films: dict[str, dict], users: dict[str, list[Rating]], most: int | None
) -> tuple[dict[str, Split], Counter]:
    """Make the lists of train and test: ({"train", "test"}, popularity).

    A cut of a user is a place in the ratings with a whole future behind it and at least as much
    before it.
    """
    popularity = count_past_films(users)

    def get_rank(film: str) -> tuple[int, str]:
        return -popularity[film], film

    names = sorted(films, key=get_rank)  # (D,) the most popular first
    numbers = {film: number for number, film in enumerate(names)}
    weight = np.array([popularity[film] for film in names], float)  # (D,)
    train = Split()
    test = Split()
    bar = tqdm(users.items(), desc="pools", unit=" users", disable=None, leave=False)
    for user_number, (user, ratings) in enumerate(bar):
        rated = [numbers[rating.film] for rating in ratings]
        cuts = range(len(ratings) - FUTURE, FUTURE - 1, -FUTURE)
        if most:
            cuts = cuts[: most + 1]
        for back, cut in enumerate(cuts):
            future = ratings[cut : cut + FUTURE]
            liked = [rating.film for rating in future if rating.stars >= LIKED]
            if not liked:
                continue
            uniforms = draw_uniforms(0, back, np.array([user_number]), 1, len(names))[0, 0]
            others = draw_others(uniforms, weight, rated, POOL - len(liked))
            if others is None:
                raise PrepareError(
                    f"user {user[1:]} has rated so many films that none are left for a pool of "
                    f"{POOL}"
                )
            liked_numbers = [numbers[film] for film in liked]
            pool = sorted(liked_numbers + others)
            row = make_list_row(films, user, ratings, cut, [names[number] for number in pool])
            split = train if back else test
            split.add(row, [(film, 1.0) for film in liked])
    return dict(train=train, test=test), popularity


def count_past_films(users: dict[str, list[Rating]]) -> Counter:
    """Count the ratings of each film in train without validation: all but each user's last ten."""
    popularity = Counter()
    for user, ratings in users.items():
        if is_validation(user):
            continue
        for rating in ratings[:-FUTURE]:
            popularity[rating.film] += 1
    return popularity


def draw_others(
    uniforms: np.ndarray, weight: np.ndarray, rated: list[int], num_others: int
) -> list[int] | None:
    """Draw films that the user never rated, by popularity; None where too few are left.

    The smallest of Exp(1) / weight: a draw without replacement in proportion to weight
    (Efraimidis and Spirakis 2006). uniforms, weight: (D,).
    """
    with np.errstate(divide="ignore"):
        order = -np.log(uniforms) / weight
    order[rated] = np.inf
    smallest = np.argpartition(order, POOL)[:POOL]
    ascending = np.argsort(order[smallest])
    others = smallest[ascending][:num_others]
    if not np.isfinite(order[others]).all():
        return None
    return others.tolist()


def make_list_row(
    films: dict[str, dict], user: str, ratings: list[Rating], cut: int, candidates: list[str]
) -> dict:
    """Return the query row of one cut of a user."""
    text = describe_user(films, ratings[:cut])
    history = []
    for rating in ratings[max(0, cut - HISTORY) : cut]:
        history.append([rating.film, format_day(rating.time)])
    return dict(
        id=make_example_id(user, f"cut{cut}"),
        text=text,
        profile=text,
        history=history,
        candidates=candidates,
        user=user,
    )


def describe_user(films: dict[str, dict], past: list[Rating]) -> str:
    """Say in two sentences what is known of the user before the cut.

    MovieLens has no demographics.
    """
    liked = [rating for rating in past if rating.stars >= LIKED]
    genre_counts = Counter()
    for rating in liked or past:
        genre_counts.update(films[rating.film]["genres"])

    def get_rank(genre: str) -> tuple[int, str]:
        return -genre_counts[genre], genre

    text = (
        f"Has rated {len(past)} films since {format_day(past[0].time)}, "
        f"{len(liked)} of them 4 stars or more."
    )
    favorites = sorted(genre_counts, key=get_rank)[:3]
    if favorites:
        text += f" Favourite genres: {', '.join(favorites)}."
    return text


def format_day(time: int) -> str:
    """Format a rating's day."""
    moment = datetime.fromtimestamp(time, UTC)
    return moment.date().isoformat()


def prepare(args: Namespace, out: Path) -> None:
    """Write both data sets into `folder`."""
    most = args.max_windows_per_user
    films_path = find_file(args.source, "movies.csv")
    ratings_path = find_file(args.source, "ratings.csv")
    films = read_films(films_path)
    users = read_ratings(ratings_path, films)
    source = []
    for path in (films_path, ratings_path):
        source.append(dict(name=path.name, **fingerprint_file(path)))
    about = dict(source=source, options=dict(max_windows_per_user=most), key=by_interaction)

    windows = make_sequences(films, users, most)
    popularity = count_popularity(windows["train"])
    unseen = count_unseen_targets(windows["train"], windows["test_transductive"])
    write_data_set(
        out / "sequential",
        iterate_corpus(films, popularity),
        windows,
        counts=dict(users=len(users), transductive_targets_not_in_train=unseen),
        **about,
        also=lambda: check_inductive(windows["train"], windows["test_inductive"], "test_inductive"),
    )

    lists, list_popularity = make_lists(films, users, most)
    write_data_set(
        out / "list",
        iterate_corpus(films, list_popularity),
        lists,
        counts=dict(users=len(users)),
        **about,
        also=lambda: check_pools(lists, list_popularity),
    )


def count_unseen_targets(train: Split, test: Split) -> int:
    """Count the test windows whose target no train window names."""
    train_films = set()
    for row in train.rows:
        train_films.update(row["history"], list_target_docs(train, row))
    num_unseen = 0
    for row in test.rows:
        if train_films.isdisjoint(list_target_docs(test, row)):
            num_unseen += 1
    return num_unseen


def list_target_docs(split: Split, row: dict) -> list[str]:
    """Return the documents that a query's judgements name."""
    return [doc for doc, _ in split.targets[row["id"]]]


def iterate_corpus(films: dict[str, dict], popularity: Counter) -> Iterator[dict]:
    """Yield the corpus rows with their popularity."""
    for id, row in films.items():
        yield row | dict(popularity=popularity[id])


def check_pools(splits: dict[str, Split], popularity: Counter) -> list[str]:
    """Check the pools and return the names of the checks.

    They have the right size, each film once, most popular first, nothing of the history in them,
    every target in them.
    """
    for name, split in splits.items():
        for row in split.rows:
            pool = row["candidates"]
            pool_films = set(pool)
            past_films = set(get_history(row))
            target_films = set(list_target_docs(split, row))
            right_size = len(pool) == len(pool_films) == POOL
            if not right_size or past_films & pool_films or not target_films <= pool_films:
                raise PrepareError(
                    f"{name}: the pool of {row['id']!r} is not {POOL} films, "
                    "lacks a target or shows the history"
                )
            pool_counts = [popularity[film] for film in pool]
            if pool_counts != sorted(pool_counts, reverse=True):
                raise PrepareError(
                    f"{name}: the pool of {row['id']!r} is not in order of popularity"
                )
    return ["pools hold their targets, nothing of the history, most popular first"]


def add_options(parser: ArgumentParser) -> None:
    """Add the script's own options."""
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        default=BUNDLED,
        metavar="FOLDER",
        help="movies.csv and ratings.csv[.gz] (default: the bundled ones)",
    )
    parser.add_argument(
        "--max-windows-per-user",
        type=int,
        metavar="N",
        help="of each user only the latest N windows (sequential) and N train lists (default: all)",
    )


def main(argv: list[str] | None = None) -> int:
    """Run the script; return its exit code."""
    return run_command_line(__file__, __doc__, prepare, add_options, argv)


if __name__ == "__main__":
    sys.exit(main())
