"""Bad input found by coverage: the readers that are Python throughout, under atheris (`pip install atheris`).

    python benchmarks/faults/guided.py -atheris_runs=100000

atheris keeps the inputs that reach new lines and changes those. What a reader raises beside an error of loraplus ends
the run, with the input in a file; all arguments are libFuzzer's. `bad_input.py` has all readers.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["yaml", "loraplus.tasks"]):
    from loraplus.cli.options import load_yaml
    from loraplus.errors import LONGEST_MESSAGE, LoraPlusError
    from loraplus.files.single import read_json
    from loraplus.tasks.columns import labelled_texts
    from loraplus.tasks.conversations import read_examples
    from loraplus.tasks.table import read_table

WORK = Path(tempfile.mkdtemp(prefix="guided-"))
READERS = (
    ("d.csv", lambda path: labelled_texts(read_table(path))),
    ("d.tsv", lambda path: labelled_texts(read_table(path))),
    ("d.jsonl", lambda path: labelled_texts(read_table(path))),
    ("d.json", lambda path: read_examples(read_table(path), "sft")),
    ("chats.jsonl", lambda path: read_examples(read_table(path), "sft")),
    ("c.yaml", lambda path: load_yaml(path, {"lr", "model", "data", "output"})),
    ("facts.json", read_json),
)


def one_input(data: bytes) -> None:
    """The first byte chooses the reader, the rest is the file."""
    name, read = READERS[data[0] % len(READERS) if data else 0]
    path = WORK / name
    path.write_bytes(data[1:])
    try:
        read(str(path))
    except LoraPlusError as error:
        message = str(error)
        if len(message) > LONGEST_MESSAGE or len(message.splitlines()) != 1:
            raise RuntimeError(f"a message of {len(message)} characters") from error


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
