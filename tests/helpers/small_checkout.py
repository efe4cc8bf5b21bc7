"""Write a checkout in small: the scripts and configs of experiments/ as they are, with data of a
few lines in place of the bundled sets, in the same formats.

The tiny policy of tiny_world answers with colours and things, so films and products are called so.
"""

import csv
import gzip
import json
import random
import shutil
from pathlib import Path

from helpers.tiny_world import COLOURS, MORE, THINGS

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = ("data", "policy", "benchmarks", "walkthrough", "__pycache__")

NUM_FILMS = 240
NUM_QUERIES = 80
NUM_TEST_QUERIES = 12
NUM_RATED_FILMS = 60
NUM_USERS = 24
RATINGS_OF_USER = 30


def write_small_checkout(folder: Path) -> Path:
    """Write the checkout into `folder` and return it."""
    shutil.copytree(
        ROOT / "experiments", folder / "experiments", ignore=shutil.ignore_patterns(*LEFT_OUT)
    )
    shutil.copy(ROOT / "setup.py", folder)
    data = folder / "experiments/data"
    write_films(data / "msrd")
    write_products(data / "esci_small")
    write_ratings(data / "ml_latest_small")
    return folder


def name_item(number: int) -> str:
    """Name a film or a product: a colour and a thing."""
    color = COLOURS[number % len(COLOURS)]
    thing = THINGS[number // len(COLOURS) % len(THINGS)]
    return f"{color} {thing}"


def write_films(folder: Path) -> None:
    """Write films whose plots no other field repeats, but for every third one's director."""
    folder.mkdir(parents=True)
    rows = []
    for number in range(NUM_FILMS):
        rng = random.Random(number)
        words = [f"word{rng.randrange(400)}" for _ in range(30)]
        if number % 3 == 0:
            words[5] = f"Lee{number}"
        text = f"{' '.join(words)} Director: Ann Lee{number} Actors: Bo Genres: drama Tags: 1999"
        rows.append(dict(id=f"f{number}", title=name_item(number).title(), text=text))
    write_jsonl_gz(folder / "corpus.jsonl.gz", rows)


def write_products(folder: Path) -> None:
    """Write products, and queries for all products of a colour."""
    folder.mkdir(parents=True)
    products = []
    for number in range(len(COLOURS) * len(THINGS)):
        text = f"a {MORE[number % len(MORE)]} product for my house"
        products.append(
            dict(id=f"p{number}", title=name_item(number), text=text, category=["Home", "All"])
        )
    write_jsonl_gz(folder / "corpus.jsonl.gz", products)

    for split, count in (("train", NUM_QUERIES), ("test", NUM_TEST_QUERIES)):
        queries = []
        qrels = []
        for number in range(count):
            query = f"{split}{number}"
            place = number % len(COLOURS)
            queries.append(dict(id=query, text=f"{COLOURS[place]} {split} {number}"))
            for product in range(place, len(products), len(COLOURS)):
                qrels.append(f"{query}\tp{product}\t{1 + product % 3}\n")
        lines = [json.dumps(query) + "\n" for query in queries]
        (folder / f"{split}.queries.jsonl").write_text("".join(lines))
        (folder / f"{split}.qrels.tsv").write_text("".join(qrels))


def write_ratings(folder: Path) -> None:
    """Write films and users who rate some of them, an hour apart."""
    folder.mkdir(parents=True)
    with open(folder / "movies.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["movieId", "title", "genres"])
        for number in range(NUM_RATED_FILMS):
            genres = ("Drama|War", "Comedy", "Drama|Comedy")[number % 3]
            writer.writerow([number, f"{name_item(number).title()} {number} (1999)", genres])
    with gzip.open(folder / "ratings.csv.gz", "wt", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["userId", "movieId", "rating", "timestamp"])
        for user in range(NUM_USERS):
            rng = random.Random(user)
            rated = rng.sample(range(NUM_RATED_FILMS), RATINGS_OF_USER)
            for place, film in enumerate(rated):
                stars = 3 + 0.5 * rng.randrange(5)
                writer.writerow([user, film, stars, 10**9 + 3600 * place])


def write_jsonl_gz(path: Path, rows: list[dict]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
