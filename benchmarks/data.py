"""The data sets of the benchmarks, from the public repositories that hold them: what `FARSS_DATA` names.

python benchmarks/data.py data
export FARSS_DATA=$PWD/data

Every file is one commit's, and its rows are held to a digest: they are the rows that the results were measured with, or nothing is written.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import io
import json
import sys
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def lines(text: str) -> list[Row]:
    """JSON lines."""
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def columns(text: str) -> list[Row]:
    """CSV with a header."""
    return list(csv.DictReader(io.StringIO(text, newline="")))


def paragraphs(text: str) -> list[Row]:
    """Plain text, a paragraph a line; blank lines are left out."""
    return [{"text": line} for line in text.split("\n") if line.strip()]


@dataclass(frozen=True)
class Source:
    """Where a file comes from."""

    repository: str
    commit: str
    paths: tuple[str, ...]
    """One after the other."""
    read: Callable[[str], list[Row]]
    digest: str
    """SHA-256 of the rows (`digest_of`)."""


SOURCES = {
    "banking77/train.jsonl": Source(
        "PolyAI-LDN/task-specific-datasets",
        "57ec275d8078",
        ("banking_data/train.csv",),
        columns,
        "bd2ee62f93953d9ceff1e54072a4a7b245b6ffd494c6766c40258bff39b65359",
    ),
    "banking77/test.jsonl": Source(
        "PolyAI-LDN/task-specific-datasets",
        "57ec275d8078",
        ("banking_data/test.csv",),
        columns,
        "329a0e0700d967cc8f743c4a3d4f1bdd16ff38ebb3e1c546c4721d97b5a4c43a",
    ),
    "gsm8k/train.jsonl.gz": Source(
        "openai/grade-school-math",
        "3101c7d50724",
        ("grade_school_math/data/train.jsonl",),
        lines,
        "7a271119f5d02422ceaae3ede62538511c70621a12d9d653c759444a43e8acc7",
    ),
    "gsm8k/test.jsonl": Source(
        "openai/grade-school-math",
        "3101c7d50724",
        ("grade_school_math/data/test.jsonl",),
        lines,
        "50f6a997964118a1db2a9abdd1f5a24d58d3e2345ee4c5724c6d3387c9652415",
    ),
    "nq_open/dev.jsonl": Source(
        "google-research-datasets/natural-questions",
        "fb26a3073b1f",
        ("nq_open/NQ-open.dev.jsonl",),
        lines,
        "e0f645552ecc8ccc2c31fa381058f07ff99e623610f941f663700399521cc627",
    ),
    "triviaqa/dev_1k.jsonl": Source(
        "GaurisankarJ/reason_over_search",
        "45495b576c76",
        ("data_subsample/triviaqa/test.jsonl",),
        lines,
        "69d8c965481acd727469e630b8757a0b8e28c8f971a298434cdf3337e907af36",
    ),
    "webqs/train.jsonl": Source(
        "brmson/dataset-factoid-webquestions",
        "668890853388",
        ("main/trainmodel.json", "main/val.json", "main/devtest.json"),
        json.loads,
        "7f507d1dfa63fff60cd369eafc52d0a9cf79da53b180bfcfb6d920cc2e5a523a",
    ),
    "webqs/test.jsonl": Source(
        "brmson/dataset-factoid-webquestions",
        "668890853388",
        ("main/test.json",),
        json.loads,
        "8c46c541ab8c03d4a8c9125b7429db4b6f19981592b71f1244a132ebcc21afab",
    ),
    "wikitext2/valid.jsonl.gz": Source(
        "pytorch/examples",
        "77f55b912142",
        ("word_language_model/data/wikitext-2/valid.txt",),
        paragraphs,
        "d0e5fc614ae365075b082784ff446598292e7ee3253f9b06cff9944af006ac84",
    ),
    "wikitext2/test.jsonl.gz": Source(
        "pytorch/examples",
        "77f55b912142",
        ("word_language_model/data/wikitext-2/test.txt",),
        paragraphs,
        "0e2d55cc6ef159ed43f22536b92c4e31d2d975178835b9753481dde6349df407",
    ),
}


def digest_of(rows: list[Row]) -> str:
    """SHA-256 of what the rows hold, whatever the JSON was formatted like."""
    text = "\n".join(json.dumps(row, sort_keys=True) for row in rows)
    return hashlib.sha256(text.encode()).hexdigest()


def fetch(source: Source) -> list[Row]:
    """The rows of a source."""
    rows: list[Row] = []
    for path in source.paths:
        with urllib.request.urlopen(f"https://github.com/{source.repository}/raw/{source.commit}/{path}", timeout=60) as answer:
            rows += source.read(answer.read().decode("utf-8"))
    return rows


def write(rows: list[Row], target: Path) -> None:
    """JSON lines, compressed where the name says so."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(gzip.compress(text, mtime=0) if target.suffix == ".gz" else text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for name, source in SOURCES.items():
        if (folder / name).is_file():
            print(f"{name} is there")
            continue
        try:
            rows = fetch(source)
        except OSError as error:
            sys.exit(f"{name} was not fetched from {source.repository}: {error}")
        if digest_of(rows) != source.digest:
            sys.exit(f"{name} from {source.repository} at {source.commit} holds other rows than those of the results; it was not written")
        write(rows, folder / name)
        print(f"{name}: {len(rows):,} rows from {source.repository}")


if __name__ == "__main__":
    main()
