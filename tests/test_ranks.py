"""The launcher of the two-process tests: it ends whatever the processes do, and says what they said."""

from __future__ import annotations

import os
import time

import pytest
import ranks
import torch


def one_fails() -> None:
    if torch.distributed.get_rank() == 1:
        raise ValueError("rank one is out")
    torch.distributed.barrier()


def own_rank() -> int:
    return torch.distributed.get_rank()


def never_ends() -> None:
    time.sleep(1000)


def leaves_a_thread_running() -> int:
    import threading

    threading.Thread(target=time.sleep, args=(1000,)).start()  # not a daemon: Python itself would wait for it
    return os.getpid()


def test_results_come_in_the_order_of_the_ranks(tmp_path):
    assert ranks.run(own_rank, tmp_path) == [0, 1]


def test_a_rank_that_fails_ends_the_others_and_is_quoted(tmp_path):
    with pytest.raises(AssertionError, match="rank one is out"):
        ranks.run(one_fails, tmp_path)


def test_ranks_that_do_not_end_are_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(ranks.wait_for, "__defaults__", (None, 15))
    started = time.monotonic()
    with pytest.raises(AssertionError, match="not done after 15 s"):
        ranks.run(never_ends, tmp_path, ranks=1)
    assert time.monotonic() - started < 60


def test_what_a_library_leaves_running_does_not_keep_a_rank_alive(tmp_path):
    (pid,) = ranks.run(leaves_a_thread_running, tmp_path, ranks=1)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
