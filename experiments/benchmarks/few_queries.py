"""A small test split of the quickstart's, for dry runs."""

import gzip
import json
from pathlib import Path

DATA = Path(__file__).resolve().parents[1] / "data/msrd"


def write_few_queries(folder: Path, count: int = 20) -> list[str]:
    """Write the first queries of the quickstart's test split and their judgements into `folder`.

    Returns the settings that name the two files.
    """
    queries = (DATA / "test.queries.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    ids = {json.loads(query)["id"] for query in queries}
    qrels = []
    with gzip.open(DATA / "test.qrels.tsv.gz", "rt", encoding="utf-8") as file:
        for line in file:
            if line.split("\t")[0] in ids:
                qrels.append(line)

    queries_path = folder / "few.queries.jsonl"
    queries_path.write_text("\n".join(queries) + "\n", encoding="utf-8")
    qrels_path = folder / "few.qrels.tsv"
    qrels_path.write_text("".join(qrels), encoding="utf-8")
    return [f"data.test_queries={queries_path}", f"data.test_qrels={qrels_path}"]
