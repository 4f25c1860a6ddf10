"""What was seen of a run's data before training: a short table, and what is doubtful, each with what to do about it."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np

from loraplus.tasks.config import CUT, DROP, SPLIT
from loraplus.tasks.splits import canonical
from loraplus.tasks.streamed import Labels, digest
from loraplus.tasks.tabular import GUESSED, Table

_LOG = logging.getLogger(__name__)
MOST_LOOKED_AT = 1_000_000
"""Most rows that are searched for repeated texts; only huge tables have more."""
_MOST_SHOWN = 6
_WORDS_OF_A_ROW = 4
_SHORT_RUN = "all would take over a fifth of so short a run"
_MANY_CUT, _UNEVEN, _FEW_HELD_OUT = 0.05, 0.9, 50


@dataclass(frozen=True)
class Seen:
    """What was seen.

    Args:
        rows: of the table: {what: what was seen of it}.
        doubts: sentences; each says what is doubtful and what to do.
    """

    rows: Mapping[str, str] = field(default_factory=dict)
    doubts: tuple[str, ...] = ()

    def with_(self, doubts: Iterable[str] = (), **rows: str) -> Seen:
        """This with more of both."""
        return replace(self, rows={**self.rows, **rows}, doubts=(*self.doubts, *doubts))

    def tell(self) -> None:
        """Logs every doubt as a warning."""
        for doubt in self.doubts:
            _LOG.warning("%s", doubt)

    def to_dict(self) -> dict[str, Any]:
        """{"rows", "doubts"}"""
        return asdict(self)


@dataclass(frozen=True)
class Repeats:
    """Texts that a table holds more than once, whatever their case and spacing.

    Args:
        looked_at: rows.
        repeated: rows beyond the first of each text.
        contradicted: texts with two labels or more.
        first: two rows of such a text, the first of all.
    """

    looked_at: int
    repeated: int
    contradicted: int = 0
    first: tuple[int, int] | None = None


def repeats(texts: Iterable[str], codes: np.ndarray | None = None) -> Repeats:
    """Counts repeated texts, and those that have two labels.

    Args:
        texts: one a row; `MOST_LOOKED_AT` of them are looked at.
        codes: labels as numbers; None where there are none.

    Example:
        >>> repeats(["a film", "A  film", "b"], np.asarray([0, 1, 0]))
        Repeats(looked_at=3, repeated=1, contradicted=1, first=(0, 1))
    """
    hashes = np.fromiter(
        (int.from_bytes(digest(canonical(text))[:8]) for text in islice(texts, MOST_LOOKED_AT)), np.uint64
    )
    order = np.argsort(hashes, kind="stable")
    same = hashes[order[1:]] == hashes[order[:-1]]
    if codes is None or not same.any():
        return Repeats(len(hashes), int(same.sum()))
    differs = same & (codes[order[1:]] != codes[order[:-1]])
    groups = np.cumsum(np.concatenate([[True], ~same]))  # of rows in their order, one number a text
    pairs = np.flatnonzero(differs)
    if not len(pairs):
        return Repeats(len(hashes), int(same.sum()))
    earliest = pairs[np.argmin(order[pairs + 1])]
    first = int(order[earliest]), int(order[earliest + 1])
    return Repeats(len(hashes), int(same.sum()), len(np.unique(groups[pairs])), first)


def near_equal(labels: Iterable[str]) -> list[list[str]]:
    """Labels that differ in case, in what joins their words, or in marks at their end only.

    Example:
        >>> near_equal(["Democratic", "DEMOCRATIC", "green", "non-fiction", "non fiction"])
        [['DEMOCRATIC', 'Democratic'], ['non fiction', 'non-fiction']]
    """
    alike: dict[str, list[str]] = defaultdict(list)
    for label in labels:
        folded = unicodedata.normalize("NFKC", label).casefold()
        alike[re.sub(r"(?<=\w)[\s_-]+(?=\w)", "", folded.strip().rstrip(".,:;!")) or label].append(label)
    return [sorted(group) for group in alike.values() if len(group) > 1]


def shown(names: Sequence[str], most: int = _MOST_SHOWN) -> str:
    """Some names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def source_row(table: Table) -> str:
    """How many rows of what, and how it was read."""
    how = f" ({', '.join(table.read_as)})" if table.read_as else ""
    return f"{len(table):,} rows of {table.source}{how}"


def repeats_row(repetition: Repeats, removed: int) -> str:
    """How many texts repeat an earlier one, and how many were removed because held-out data has them."""
    among = f" among the first {repetition.looked_at:,}" if repetition.looked_at == MOST_LOOKED_AT else ""
    return f"{repetition.repeated:,} repeat an earlier one{among}; {removed:,} removed, since held-out data has them"


def split_row(train: int, validation: int, test: int, unused: int = 0, asked: bool = False) -> str:
    """How many examples each part has, and why not all that were kept aside are used to validate.

    Args:
        train, validation, test: examples of each part.
        unused: kept aside for validation beside those.
        asked: whether --max-eval-samples says so.

    Example:
        >>> split_row(360, 32, 0, unused=8, asked=True)
        '360 to train on, 32 of 40 to validate (as --max-eval-samples says)'
    """
    aside = validation + unused
    reason = "as --max-eval-samples says" if asked else f"{_SHORT_RUN}; --max-eval-samples {aside} takes all"
    validated, why = (f"{validation:,} of {aside:,}", f" ({reason})") if unused else (f"{validation:,}", "")
    return f"{train:,} to train on, {validated} to validate{f', {test:,} to test' if test else ''}{why}"


def longer_ones(facts: Mapping[str, Any]) -> str:
    """How many examples of a language model are longer than the length, and what becomes of them.

    Args:
        facts: of the data, with longer_than_context, long_examples and tokens_cut.

    Example:
        >>> longer_ones({"longer_than_context": 2, "long_examples": "cut", "tokens_cut": 1200})
        '2 longer ones cut, 1,200 tokens lost'
        >>> longer_ones({"longer_than_context": 0})
        '0 longer ones'
    """
    longer = facts["longer_than_context"]
    count = f"{longer:,} longer one{'' if longer == 1 else 's'}"
    if not longer:
        return count
    done = {CUT: f"cut, {facts['tokens_cut']:,} tokens lost", DROP: "dropped", SPLIT: "split into parts, nothing lost"}
    return f"{count} {done[facts['long_examples']]}"


def length_row(max_length: int, asked: bool, longest: int, covers: str) -> str:
    """The length in tokens, and why."""
    why = "as --max-length says" if asked else covers
    return f"{max_length} tokens, {why}; the longest has {longest}"


def doubts_of_table(table: Table, text_column: str, label_columns: Sequence[str], labels: Iterable[str]) -> list[str]:
    """What the table itself makes doubtful: a header that reads like a row, an encoding that was guessed."""
    doubts = []
    names = list(table.columns)
    named_like_labels = set(label_columns) & set(labels)
    numbers = [name for name in names if re.fullmatch(r"[+-]?\d+([.,]\d+)?", name)]
    is_sentence = len(text_column.split()) >= _WORDS_OF_A_ROW and not text_column.endswith("?")  # a survey's question
    if named_like_labels or numbers or is_sentence:
        doubts.append(
            f"the first row of {table.source} was taken for column names ({shown(list(map(repr, names)))}), and reads "
            "like one of the others; put a row of names above it"
        )
    return doubts + doubts_of_encoding(table)


def doubts_of_encoding(table: Table) -> list[str]:
    """An encoding that was guessed, with a text that shows it."""
    guessed = next((name for name in table.read_as if name.endswith(GUESSED)), None)
    if guessed is None:
        return []
    cells = (str(cell) for values in table.columns.values() for cell in values)
    sample = next((text for text in cells if not text.isascii()), "")
    return [
        f"{table.source} is read as {guessed.removesuffix(GUESSED)}, which is a guess: {_quoted(sample)}; if that is "
        "garbled, name the encoding with --encoding"
    ]


def doubts_of_labels(labels: Labels, total: int) -> list[str]:
    """What the classes make doubtful: near-equal names, single examples, one that has nearly all, too many of them."""
    counts = labels.counts()
    doubts = []
    for group in near_equal(counts):
        written = ", ".join(f"{label!r} ({counts[label]})" for label in group)
        doubts.append(f"labels that are nearly equal count as different classes: {written}; write them alike")
    if single := [label for label, count in counts.items() if count == 1]:
        doubts.append(
            f"classes with one example: {shown(list(map(repr, single)))}; they are never validated, so add examples or "
            "remove them"
        )
    label, most = counts.most_common(1)[0]
    if most / total >= _UNEVEN:
        doubts.append(
            f"{100 * most / total:.1f}% of the rows are of the class {label!r}, so accuracy says little; see macro-F1"
        )
    if len(counts) > max(20, total / 5):
        numbers = all(re.fullmatch(r"[+-]?\d+", label) for label in counts)
        advice = "--task regression is for numbers" if numbers else "is --label-column the right one?"
        doubts.append(f"{len(counts)} classes among {total} rows leave few examples for each; {advice}")
    for separator in "|;":
        parts = {part.strip() for label in counts if separator in label for part in label.split(separator)}
        if parts & counts.keys():
            doubts.append(
                f"labels such as {next(label for label in counts if separator in label)!r} seem to be several; "
                "--task multi-label takes them apart"
            )
            break
    return doubts


def doubt_of_contradictions(
    table: Table, repetition: Repeats, label_of: Callable[[int], str], texts: Sequence[str]
) -> list[str]:
    """The same text with two labels, with the first two places of it."""
    if repetition.first is None:
        return []
    one, other = repetition.first
    many = f"{repetition.contradicted:,} text{' stands' if repetition.contradicted == 1 else 's stand'}"
    return [
        f"{many} there with several labels, such as {_quoted(texts[one])} ({table.row_name(one)}: {label_of(one)}, "
        f"{table.row_name(other)}: {label_of(other)}); decide on one each"
    ]


def doubts_of_size(
    cut: int, examples: int, held_out: int, asked: bool, of_labels: bool = True, unused: int = 0
) -> list[str]:
    """What the sizes make doubtful: many texts cut, few to validate on.

    Args:
        cut: training texts that lose their end.
        examples: to train on.
        held_out: to validate.
        asked: whether the length is --max-length.
        of_labels: answers are right or wrong.
        unused: examples kept aside and not used to validate.
    """
    doubts = []
    if cut > _MANY_CUT * examples:
        advice = "raise --max-length" if asked else "give a larger --max-length if the model takes it"
        doubts.append(f"{100 * cut / examples:.0f}% of the training texts lose their end; {advice}")
    if held_out < _FEW_HELD_OUT:
        half = min(50, 98 / held_out**0.5)  # 1.96·√(p(1 − p)/n) at p = 1/2, in points
        tell = f"an accuracy to about ±{half:.0f} points" if of_labels else "little of how far off the numbers are"
        more = "take more with --max-eval-samples" if unused else "name more with --eval-data or --eval-fraction"
        doubts.append(f"{held_out} validation examples tell {tell}; {more}")
    return doubts


def _quoted(text: str, longest: int = 60) -> str:
    line = " ".join(text.split())
    return f"“{line if len(line) <= longest else line[: longest - 1] + '…'}”"
