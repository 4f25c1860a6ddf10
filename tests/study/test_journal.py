"""One bad line costs at most the run it tells of; a study that is gone is never started over in silence."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from loraplus.errors import InputError, LoraPlusWarning
from loraplus.study.records import CurvePoint, Record, Trial
from loraplus.study.runner import has_begun
from loraplus.study.storage import open_study
from loraplus.study.store import StudyStore

TRIALS = [Trial(phase, arm, 2.5e-4, ratio, seed) for phase in ("tuning", "final") for seed in range(2)
          for arm, ratio in (("lora", 1.0), ("loraplus", 16.0))]  # fmt: skip
RECORDS = {
    trial.key: Record(trial, "done", 20, 0.4 + number / 100, 0.9, 0.1, (CurvePoint(10, 0.6, 0.7),), (0.1,), (True,))
    for number, trial in enumerate(TRIALS)
}
DIVERGED = Record(Trial("tuning", "lora", 0.1, 1.0, 0), "diverged", 3, math.inf, 0.0, 0.1)
RECORDS[DIVERGED.trial.key] = DIVERGED


def two_at_a_time(location: Path | str, name: str = "s", shared: bool = False) -> list[bytes]:
    """A study whose runs overlap in pairs; its lines."""
    store = StudyStore.open(location, name, shared=shared)
    store.check_data({"train_examples": 80})
    records = list(RECORDS.values())
    for pair in zip(records[::2], [*records[1::2], None], strict=True):
        for record in filter(None, pair):
            assert store.start(record.trial)
        for record in filter(None, pair):
            store.progress(record.trial, 10, 0.6)
            store.finish(record)
    return Path(location).read_bytes().splitlines(keepends=True) if "://" not in str(location) else []


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "study.journal"


def opened(journal: Path, name: str = "s") -> tuple[dict[str, Record], list[str]]:
    """Records, and what was said."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        store = StudyStore.open(journal, name, begun=True)
        store.check_data({"train_examples": 80})
    # What an earlier test left open is told when it is collected, which may be now.
    said = [warning for warning in said if not issubclass(warning.category, ResourceWarning)]
    assert [str(warning) for warning in said if not issubclass(warning.category, LoraPlusWarning)] == []
    return store.records(), [str(warning.message) for warning in said]


def run_of(line: bytes) -> str | None:
    """The run whose outcome a line holds."""
    record = json.loads(line).get("user_attr", {}).get("record")
    return Record.from_dict(record).trial.key if record else None


DAMAGE = {
    "cut": lambda line: line[: len(line) // 2] + b"\n",
    "garbage": lambda line: b"garbage\n",
    "not UTF-8": lambda line: b'{"op_code":\xff\xfe}\n',
    "a list": lambda line: b"[1, 2]\n",
    "null": lambda line: b"null\n",
    "no operation code": lambda line: b"{}\n",
    "an operation that is none": lambda line: json.dumps({**json.loads(line), "op_code": 99}).encode() + b"\n",
    "a trial that is not there": lambda line: json.dumps({**json.loads(line), "trial_id": 77}).encode() + b"\n",
    "nested": lambda line: b"[" * 100_000 + b"\n",
    "zeros": lambda line: b"\0" * len(line[:-1]) + b"\n",
    "glued to the next": lambda line: line[:-9],
    "missing": lambda line: b"",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_one_bad_line_anywhere_costs_at_most_the_run_whose_outcome_it_holds(journal: Path, damage: str):
    lines = two_at_a_time(journal)
    for place in range(len(lines) - 1):
        if damage == "a trial that is not there" and b"trial_id" not in lines[place]:
            continue
        bad = DAMAGE[damage](lines[place])
        content = b"".join([*lines[:place], bad, *lines[place + 1 :]])
        if place == len(lines) - 2:  # the last line is one that a kill may have cut
            content += lines[-1]
        for name in journal.parent.iterdir():
            name.unlink()
        journal.write_bytes(content)
        found, said = opened(journal)
        gone = {run_of(lines[place])} | ({run_of(lines[place + 1])} if damage == "glued to the next" else set())
        if damage == "a trial that is not there":  # the outcome tells its run
            gone = set()
        assert found == {key: record for key, record in RECORDS.items() if key not in gone}, place
        if bad:
            (line,) = said
            assert f"{journal}: line {place + 1} is damaged" in line and "\n" not in line and len(line) < 700
            assert (journal.parent / "study.journal.damaged").read_bytes() == content
        assert opened(journal) == (found, []), "whole from then on"


def test_a_mended_study_goes_on(journal: Path):
    lines = two_at_a_time(journal)
    journal.write_bytes(b"".join([*lines[:1], b"x\n", *lines[3:]]))
    with pytest.warns(LoraPlusWarning, match=r"line 2 is damaged .*9 finished runs stand.*study\.journal\.damaged"):
        store = StudyStore.open(journal, "s")
    more = replace(DIVERGED, trial=replace(DIVERGED.trial, seed=9))
    assert store.start(more.trial)
    store.finish(more)
    assert StudyStore.open(journal, "s").records() == {**RECORDS, more.trial.key: more}


def test_many_bad_lines_at_random_lose_only_outcomes_that_they_hold_and_mix_up_none(journal: Path):
    lines = two_at_a_time(journal)
    for seed in range(60):
        draw = random.Random(seed)
        content = list(lines)
        for place in draw.sample(range(len(lines)), draw.randint(2, 8)):
            content[place] = DAMAGE[draw.choice(["cut", "garbage", "null", "not UTF-8"])](lines[place])
        journal.write_bytes(b"".join(content))
        whole = {run_of(line) for line, now in zip(lines, content, strict=True) if line == now} - {None}
        found, _ = opened(journal)
        assert found == {key: RECORDS[key] for key in found}, seed
        assert set(found) == whole, seed


@pytest.mark.parametrize(
    ("old", "new"),
    [(b'"arm":"lora"', b'"arm":"nosuch"'), (b'"eval_loss":0.4,', b'"eval_loss":0.3,'), (b'"done"', b'"gone"')],
)
def test_an_outcome_that_was_changed_is_no_outcome(journal: Path, old: bytes, new: bytes):
    lines = two_at_a_time(journal)
    (place,) = [n for n, line in enumerate(lines) if run_of(line) == TRIALS[0].key]
    journal.write_bytes(b"".join([*lines[:place], lines[place].replace(old, new, 1), *lines[place + 1 :]]))
    found, (said,) = opened(journal)
    assert found == {key: record for key, record in RECORDS.items() if key != TRIALS[0].key}
    assert f"line {place + 1} is damaged" in said


def test_two_studies_in_one_damaged_journal_keep_their_own_outcomes(journal: Path):
    two_at_a_time(journal, "s")
    lines = two_at_a_time(journal, "t")
    for place in range(1, len(lines) - 1, 7):
        if b'"study_name"' in lines[place]:
            continue
        journal.write_bytes(b"".join([*lines[:place], b"x\n", *lines[place + 1 :]]))
        gone = run_of(lines[place])
        found, others = opened(journal, "s")[0], opened(journal, "t")[0]
        assert len(found) + len(others) == 2 * len(RECORDS) - (gone is not None), place
        assert all(RECORDS[key] == record for key, record in [*found.items(), *others.items()])


def test_a_deleted_study_stays_away_and_one_of_another_program_is_refused(journal: Path):
    two_at_a_time(journal, "s")
    storage = open_study(journal, "s")._storage
    storage.delete_study(storage.get_study_id_from_name("s"))
    del storage  # and with it its hold on the file
    lines = two_at_a_time(journal, "t")
    journal.write_bytes(b"".join([*lines[:-4], b"x\n", *lines[-3:]]))
    assert set(opened(journal, "t")[0]) <= set(RECORDS) and StudyStore.open(journal, "s").records() == {}
    open_study(journal, "another program's").ask()
    content = journal.read_bytes() + b"x\n" + journal.read_bytes().splitlines(keepends=True)[-1]
    journal.write_bytes(content)
    with pytest.raises(InputError, match="holds the study .another program's. of another program"):
        StudyStore.open(journal, "t")
    assert journal.read_bytes() == content


def test_lost_names_of_several_studies_are_refused_and_nothing_is_touched(journal: Path):
    two_at_a_time(journal, "s")
    lines = two_at_a_time(journal, "t")
    content = b"".join([b"x\n", *lines[1:]])
    journal.write_bytes(content)
    with pytest.raises(InputError, match="lines that name its studies are lost .such as line 1."):
        StudyStore.open(journal, "s")
    assert journal.read_bytes() == content


def test_a_damaged_journal_that_another_process_has_open_is_left_alone(journal: Path):
    lines = two_at_a_time(journal)
    script = f"""
from loraplus.study.store import StudyStore
store = StudyStore.open({str(journal)!r}, "s", shared=True)
print("open", flush=True)
input()
"""
    other = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "open\n"
    content = b"".join([*lines[:3], b"x\n", *lines[4:]])
    journal.write_bytes(content)
    with pytest.raises(InputError, match="line 4 is damaged .*another process has it open; wait for it to end"):
        StudyStore.open(journal, "s")
    assert journal.read_bytes() == content
    other.communicate("\n", timeout=60)
    assert len(opened(journal)[0]) >= len(RECORDS) - 1


@pytest.mark.parametrize("left", [None, b"", b"\0" * 5000, b'{"op_code":0'])
def test_a_study_that_has_begun_and_is_gone_is_refused(journal: Path, left: bytes | None):
    two_at_a_time(journal)
    journal.unlink()
    if left is not None:
        journal.write_bytes(left)
    with pytest.raises(InputError) as caught:
        StudyStore.open(journal, "s", begun=True)
    assert str(journal) in str(caught.value) and "\n" not in str(caught.value)
    assert journal.exists() == (left is not None)


def test_a_database_without_the_study_or_damaged_is_refused(tmp_path: Path):
    pytest.importorskip("sqlalchemy")
    url = f"sqlite:///{tmp_path / 'study.db'}"
    with pytest.raises(InputError, match="holds no study 's', though the output folder has seen runs"):
        StudyStore.open(url, "s", begun=True)
    two_at_a_time(url)
    file = tmp_path / "study.db"
    content = bytearray(file.read_bytes())
    draw = random.Random(0)
    for size in (4096, 20_000, len(content) - 100):
        file.write_bytes(content[:size])
        with pytest.raises(InputError, match="cannot open the study sqlite"):
            StudyStore.open(url, "s")
    for start in (0, 5000):
        file.write_bytes(content[:start] + draw.randbytes(8192) + content[start + 8192 :])
        with pytest.raises(InputError) as caught:
            StudyStore.open(url, "s")
        assert "\n" not in str(caught.value)


def test_a_folder_has_begun_once_its_runs_have_a_log_or_results(tmp_path: Path):
    assert not has_begun(tmp_path, "summary.json")
    (tmp_path / "summary.json").touch()
    assert has_begun(tmp_path, "summary.json") and not has_begun(tmp_path)
    (tmp_path / "workers.log").touch()
    assert has_begun(tmp_path)


def test_every_finished_run_is_one_complete_or_failed_trial(journal: Path):
    lines = [json.loads(line) for line in two_at_a_time(journal)]
    ends = Counter(line["trial_id"] for line in lines if line["op_code"] == 6)
    assert set(ends.values()) == {1} and len(ends) == len(RECORDS)
