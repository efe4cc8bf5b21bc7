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
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from checks import PrepareError, Split, by_interaction, check_inductive, count_popularity
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


class Rating(NamedTuple):
    """Hold a rating of a film."""

    film: str
    stars: float
    time: int  # seconds since 1970, UTC


def read_films(path: Path) -> dict[str, dict]:
    """Return {id: corpus row without popularity}, in file order."""
    films = {}
    for line, row in iterate_csv(path, ("movieId", "title", "genres")):
        genres = [] if row["genres"] == "(no genres listed)" else row["genres"].split("|")
        if row["movieId"] in films:
            raise PrepareError(
                f"{path}:{line}: film {row['movieId']} came before; keep one of the lines"
            )
        films[row["movieId"]] = dict(
            id=row["movieId"], title=to_one_line(row["title"]), text=" ".join(genres), genres=genres
        )
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
        users.setdefault(user, []).append(
            Rating(
                film,
                parse_number(path, line, "rating", row["rating"]),
                parse_number(path, line, "timestamp", row["timestamp"], int),
            )
        )
    # a stable sort
    return {user: sorted(ratings, key=lambda r: r.time) for user, ratings in users.items()}


def make_sequences(
    films: dict[str, dict], users: dict[str, list[Rating]], most: int | None
) -> dict[str, Split]:
    """Cut windows over films in time order. most: of each user only so many windows, the latest."""

    def window(user, name, seen, end):
        past = seen[max(0, end - HISTORY) : end]
        row = dict(
            id=make_example_id(user, name), text=films[past[-1]]["title"], history=past, user=user
        )
        return row, [(seen[end], 1.0)]

    train = Split()
    transductive = Split()
    inductive = Split()
    for user, ratings in users.items():
        apart = is_test(user)
        seen = [r.film for r in ratings if is_test(r.film) == apart]
        last = len(seen) - (0 if apart else 1)  # windows end before it
        for end in range(max(1, last - most if most else 1), last):
            (inductive if apart else train).add(
                *window(user, f"{'cold' if apart else 'w'}{end}", seen, end)
            )
        if not apart and last >= 1:
            transductive.add(*window(user, "last", seen, last))
    return dict(train=train, test_transductive=transductive, test_inductive=inductive)


def make_lists(
    films: dict[str, dict], users: dict[str, list[Rating]], most: int | None
) -> tuple[dict[str, Split], Counter]:
    """Make the lists of train and test: ({"train", "test"}, popularity).

    A cut of a user is a place in the ratings with a whole future behind it and at least as much
    before it.
    """
    seen = Counter(
        r.film
        for user, ratings in users.items()
        if not is_validation(user)
        for r in ratings[:-FUTURE]
    )
    names = sorted(films, key=lambda film: (-seen[film], film))  # (D,) the most popular first
    place = {film: i for i, film in enumerate(names)}
    weight = np.array([seen[film] for film in names], float)  # (D,)
    train = Split()
    test = Split()
    for n, (user, ratings) in enumerate(
        tqdm(users.items(), desc="pools", unit=" users", disable=None, leave=False)
    ):
        rated = [place[r.film] for r in ratings]
        cuts = range(len(ratings) - FUTURE, FUTURE - 1, -FUTURE)
        for back, cut in enumerate(cuts[: most + 1] if most else cuts):
            liked = [r.film for r in ratings[cut : cut + FUTURE] if r.stars >= LIKED]
            if not liked:
                continue
            # The smallest of Exp(1) / weight: a draw without replacement in proportion to weight
            # (Efraimidis and Spirakis 2006).
            with np.errstate(divide="ignore"):
                # (D,)
                order = -np.log(draw_uniforms(0, back, np.array([n]), 1, len(names))[0, 0]) / weight
            order[rated] = np.inf
            others = np.argpartition(order, POOL)[:POOL]
            others = others[np.argsort(order[others])][: POOL - len(liked)]
            if not np.isfinite(order[others]).all():
                raise PrepareError(
                    f"user {user[1:]} has rated so many films that none are left for a pool of "
                    f"{POOL}"
                )
            pool = sorted([place[film] for film in liked] + others.tolist())
            text = describe_user(films, ratings[:cut])
            row = dict(
                id=make_example_id(user, f"cut{cut}"),
                text=text,
                profile=text,
                history=[
                    [r.film, format_day(r.time)] for r in ratings[max(0, cut - HISTORY) : cut]
                ],
                candidates=[names[i] for i in pool],
                user=user,
            )
            (train if back else test).add(row, [(film, 1.0) for film in liked])
    return dict(train=train, test=test), seen


def describe_user(films: dict[str, dict], past: list[Rating]) -> str:
    """Say in two sentences what is known of the user before the cut.

    MovieLens has no demographics.
    """
    liked = [r for r in past if r.stars >= LIKED]
    genres = Counter(genre for r in liked or past for genre in films[r.film]["genres"])
    favourite = sorted(genres, key=lambda genre: (-genres[genre], genre))[:3]
    return (
        f"Has rated {len(past)} films since {format_day(past[0].time)}, "
        f"{len(liked)} of them 4 stars or more."
        + (f" Favourite genres: {', '.join(favourite)}." if favourite else "")
    )


def format_day(time: int) -> str:
    """Format a rating's day."""
    return datetime.fromtimestamp(time, UTC).date().isoformat()


def prepare(args: Namespace, out: Path) -> None:
    """Write both data sets into `folder`."""
    most = args.max_windows_per_user
    paths = [find_file(args.source, "movies.csv"), find_file(args.source, "ratings.csv")]
    films = read_films(paths[0])
    users = read_ratings(paths[1], films)
    about = dict(
        source=[dict(name=path.name, **fingerprint_file(path)) for path in paths],
        options=dict(max_windows_per_user=most),
        key=by_interaction,
    )

    splits = make_sequences(films, users, most)
    known = {
        film
        for row in splits["train"].rows
        for film in (*row["history"], splits["train"].targets[row["id"]][0][0])
    }
    unseen = sum(
        target[0][0] not in known for target in splits["test_transductive"].targets.values()
    )
    seen = count_popularity(splits["train"])
    write_data_set(
        out / "sequential",
        iterate_corpus(films, seen),
        splits,
        counts=dict(users=len(users), transductive_targets_not_in_train=unseen),
        **about,
        also=lambda: check_inductive(splits["train"], splits["test_inductive"], "test_inductive"),
    )

    splits, seen = make_lists(films, users, most)
    write_data_set(
        out / "list",
        iterate_corpus(films, seen),
        splits,
        counts=dict(users=len(users)),
        **about,
        also=lambda: check_pools(splits, seen),
    )


def iterate_corpus(films: dict[str, dict], seen: Counter):
    """Yield the corpus rows with their popularity."""
    return (row | dict(popularity=seen[id]) for id, row in films.items())


def check_pools(splits: dict[str, Split], seen: Counter) -> list[str]:
    """Check the pools and return the names of the checks.

    They have the right size, each film once, most popular first, nothing of the history in them,
    every target in them.
    """
    for name, split in splits.items():
        for row in split.rows:
            pool = row["candidates"]
            past = {film for film, _ in row["history"]}
            if (
                len(pool) != POOL
                or len(set(pool)) != POOL
                or past & set(pool)
                or not {film for film, _ in split.targets[row["id"]]} <= set(pool)
            ):
                raise PrepareError(
                    f"{name}: the pool of {row['id']!r} is not {POOL} films, "
                    "lacks a target or shows the history"
                )
            if any(seen[a] < seen[b] for a, b in pairwise(pool)):
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
