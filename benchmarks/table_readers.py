"""Our readers of tables beside those of `datasets`: time, memory, and what becomes of files with a defect.

    python benchmarks/table_readers.py [--rows 500000]

Each way runs in a process of its own, with an empty cache.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WORDS = "alpha beta gamma delta film good bad the of".split()
DEFECTS = {
    "a quote that is never closed": ("d.csv", b'text,label\na,1\n"b,2\nc,3\n'),
    "a field too few": ("d.csv", b"text,label\na,1\nb\n"),
    "a byte that is no UTF-8": ("d.csv", b"text,label\na,1\n\xff\xfe,2\n"),
    "a label 01": ("d.csv", b"text,label\na,01\nb,1\n"),
    "half a line of JSON": ("d.jsonl", b'{"text": 1}\n{"text":\n'),
    "JSON 5,000 deep": ("d.jsonl", b'{"text": ' + b"[" * 5000 + b"]" * 5000 + b"}\n"),
}


def write_tables(folder: Path, rows: int) -> None:
    random.seed(0)
    with (folder / "rows.csv").open("w", newline="") as table, (folder / "rows.jsonl").open("w") as lines:
        writer = csv.writer(table)
        writer.writerow(["text", "label"])
        for number in range(rows):
            text = " ".join(random.choices(WORDS, k=20))
            writer.writerow([text, number % 2])
            lines.write(json.dumps({"text": text, "label": number % 2}) + "\n")
    for number, (name, content) in enumerate(DEFECTS.values()):
        (folder / f"{number}-{name}").write_bytes(content)


def reader(way: str, cache: str) -> Callable[[Path], Any]:
    """A function that takes a file and returns {column: values}."""
    if way == "ours":
        from loraplus.tasks.table import read_table

        return lambda path: read_table(str(path)).columns
    os.environ["HF_DATASETS_CACHE"] = cache
    import datasets

    datasets.disable_progress_bars()
    logging.disable(logging.CRITICAL)
    kinds = {".csv": "csv", ".jsonl": "json"}
    return lambda path: datasets.load_dataset(kinds[path.suffix], data_files=str(path), split="train")


def measure(way: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as cache:
        started = time.perf_counter()
        read = reader(way, cache)
        print(f"{way}: import {time.perf_counter() - started:.1f} s")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for name in ("rows.csv", "rows.jsonl"):
            started = time.perf_counter()
            columns = read(folder / name)
            took, started = time.perf_counter() - started, time.perf_counter()
            characters = sum(map(len, columns["text"]))
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
            passed = time.perf_counter() - started
            print(f"  {name}: read {took:.1f} s, pass over {characters:,} characters {passed:.1f} s, {grown:.0f} MB")
        for number, (what, (name, _)) in enumerate(DEFECTS.items()):
            try:
                columns = read(folder / f"{number}-{name}")
                outcome = f"read as { ({key: list(columns[key]) for key in ('text', 'label')}) }"
            except Exception as error:
                cause = error.__cause__ or error
                outcome = f"{type(error).__name__}: {str(cause).splitlines()[0][:100]}"
            print(f"  {what}: {outcome}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--way", choices=("ours", "datasets"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        measure(options.way, options.folder)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_tables(Path(folder), options.rows)
        for way in ("ours", "datasets"):
            subprocess.run([sys.executable, __file__, "--way", way, "--folder", folder], check=True)


if __name__ == "__main__":
    main()
