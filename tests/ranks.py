"""Runs a function in several processes over gloo, each a plain subprocess, with a time limit that always holds.

`run(function, ...)` starts `python -m ranks` once a rank. A rank writes its result to a file, waits for the others,
takes the process group down and ends with `os._exit`: nothing that a library leaves running can keep it alive. If one
rank fails or the time is over, the others are killed and the test fails with what each had written.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).parent
TIME_LIMIT = 240  # seconds; importing torch and transformers on a busy core takes up to a minute
_TEARDOWN_LIMIT = 10


def run(function: Callable[..., Any], folder: Path, *arguments: str, ranks: int = 2) -> list[Any]:
    """Calls `function(*arguments)`, importable by name, in each rank.

    Args:
        function: sees an initialised process group, and returns what `torch.save` can write.
        folder: for the results and logs.
        *arguments: text.
        ranks: number of processes.

    Returns:
        The results in the order of the ranks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    where = f"{function.__module__}:{function.__qualname__}"
    commands = [
        [sys.executable, "-m", "ranks", where, str(folder), str(rank), str(ranks), *arguments] for rank in range(ranks)
    ]
    env = {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent / "src")]), "OMP_NUM_THREADS": "1"}
    logs = wait_for(commands, folder, env)
    results = [folder / f"{rank}.pt" for rank in range(ranks)]
    assert all(path.is_file() for path in results), "\n".join(logs)
    return [torch.load(path, weights_only=False) for path in results]


def wait_for(
    commands: list[list[str]], folder: Path, env: dict[str, str] | None = None, limit: float = TIME_LIMIT
) -> list[str]:
    """Runs commands side by side until all have ended, one has failed, or the time is over; returns what they wrote."""
    paths = [folder / f"{index}.log" for index in range(len(commands))]
    processes = []
    for command, path in zip(commands, paths, strict=True):
        with path.open("w") as log:
            processes.append(
                subprocess.Popen(
                    command, stdout=log, stderr=subprocess.STDOUT, cwd=folder, env={**os.environ, **(env or {})}
                )
            )
    deadline = time.monotonic() + limit
    try:
        while any(process.poll() is None for process in processes):
            if time.monotonic() > deadline or any(process.poll() not in (None, 0) for process in processes):
                break
            time.sleep(0.05)
        codes = [process.poll() for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
    texts = [path.read_text(errors="replace") for path in paths]
    if any(codes):
        ends = [f"rank {i} ended with {code}:\n{texts[i][-3000:]}" for i, code in enumerate(codes)]
        raise AssertionError("\n".join(ends))
    assert None not in codes, f"not done after {limit} s: " + "\n".join(text[-3000:] for text in texts)
    return texts


def main(where: str, folder: str, rank: str, ranks: str, *arguments: str) -> None:
    torch.set_num_threads(1)
    # DeepSpeed and Accelerate read these.
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_SIZE": ranks}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    store = torch.distributed.FileStore(f"{folder}/store", int(ranks))
    torch.distributed.init_process_group(
        "gloo", store=store, rank=int(rank), world_size=int(ranks), timeout=timedelta(seconds=TIME_LIMIT / 2)
    )
    module, _, name = where.partition(":")
    result = getattr(importlib.import_module(module), name)(*arguments)
    temporary = Path(folder) / f"{rank}.tmp"
    torch.save(result, temporary)
    temporary.rename(Path(folder) / f"{rank}.pt")
    torch.distributed.barrier()
    # gloo's own teardown has been seen not to return; the results are there, so it gets its time and no more.
    teardown = threading.Thread(target=torch.distributed.destroy_process_group, daemon=True)
    teardown.start()
    teardown.join(_TEARDOWN_LIMIT)


if __name__ == "__main__":
    code = 0
    try:
        main(*sys.argv[1:])
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
