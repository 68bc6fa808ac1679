"""Split checked rows into training and validation, and detect leaks between them.

Uses only hashes and group names, a few dozen bytes per row, so a million rows fit into memory easily.
"""

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from voxray.corpora.splits import find_split


class Splittable(Protocol):
    """Attributes of a row that a split needs (see ``CheckedRow``)."""

    reason: str
    audio_hash: str
    leak_text: str
    group: str
    split: str


@dataclass
class Leaks:
    """Overlap of training with the held-out rows (validation, and test if there is one).

    Attributes:
        audio: Training rows whose decoded audio is also held out.
        text: Training rows whose normalised texts are also held out.
        speaker: Speakers and sessions on both sides.
    """

    audio: int = 0
    text: int = 0
    speaker: int = 0

    def __bool__(self) -> bool:
        return bool(self.audio or self.text or self.speaker)

    def __str__(self) -> str:
        return f"{self.audio} training rows by audio, {self.text} by text, {self.speaker} speakers or sessions"


@dataclass
class Split:
    """Assignment of all rows to training, validation and test.

    Attributes:
        groups: Validation groups drawn from the training rows, if the corpus has no validation rows of its own.
        with_validation: Whether the corpus' own validation rows are used.
        with_test: Whether its own test rows are used.
        audio, text, speakers: Hashes and groups of the held-out rows.
    """

    groups: set[str] = field(default_factory=set)
    with_validation: bool = False
    with_test: bool = False
    audio: set[str] = field(default_factory=set)
    text: set[str] = field(default_factory=set)
    speakers: set[str] = field(default_factory=set)

    def side(self, row: Splittable) -> str:
        """``train``, ``val``, ``test``, or ``other`` for a split of the corpus that is not used.

        A row without a split is for training. A row of another split than train never is.
        """
        if _is_for_training(row):
            return "val" if row.group in self.groups else "train"
        used = {"validation": "val"} if self.with_validation else {}
        used |= {"test": "test"} if self.with_test else {}
        return used.get(find_split(row.split), "other")

    @property
    def held_out(self) -> str:
        """Name of the held-out rows in messages."""
        return "validation or test" if self.with_test else "validation"

    def leak(self, row: Splittable) -> str:
        """How a training row leaks: ``audio``, ``text``, ``speaker`` or ""."""
        if row.audio_hash and row.audio_hash in self.audio:
            return "audio"
        if row.leak_text and row.leak_text in self.text:
            return "text"
        return "speaker" if row.group in self.speakers else ""


def choose_split(
    rows: Iterable[Splittable], val_share: float, seed: int, *, with_validation: bool, with_test: bool = False
) -> Split:
    """Choose the validation rows: the corpus' own ones, else whole groups of the training rows, drawn at random.

    Args:
        rows: All rows, in order.
        val_share: Share of the training rows for validation, filled with whole groups.
        with_validation: Whether there is a validation output.
        with_test: Whether there is a test output, for the corpus' own test rows.
    """
    sizes: Counter[str] = Counter()
    has_validation = False
    for row in rows:
        if not row.reason:
            sizes[row.group] += _is_for_training(row)
            has_validation |= find_split(row.split) == "validation"
    sizes = +sizes  # without groups that have no training row
    if not with_validation or has_validation:
        return Split(with_validation=with_validation, with_test=with_test)
    target, groups, count = val_share * sum(sizes.values()), set(), 0
    order = sorted(sizes)
    random.Random(seed).shuffle(order)
    for group in order:
        # Add a group if that brings the count closer to the target. One large speaker must not exceed it by far.
        if count < target and abs(count + sizes[group] - target) <= abs(count - target):
            groups.add(group)
            count += sizes[group]
    if not groups and len(order) > 1:  # the share is smaller than every group
        groups.add(min(order, key=lambda group: sizes[group]))
    return Split(groups=groups, with_validation=True, with_test=with_test)


def _is_for_training(row: Splittable) -> bool:
    return not row.split.strip() or find_split(row.split) == "train"


def record_held_out(split: Split, rows: Iterable[Splittable], *, texts: bool = True) -> None:
    """Add the hashes and groups of validation and test rows to the split.

    Args:
        texts: Whether equal texts are leaks; they are none in a corpus in which several speakers read the same script.
    """
    for row in rows:
        if not row.reason and split.side(row) in {"val", "test"}:
            if texts and row.leak_text:
                split.text.add(row.leak_text)
            if row.audio_hash:
                split.audio.add(row.audio_hash)
            if not row.group.startswith("text:"):
                split.speakers.add(row.group)


def count_leaks(split: Split, rows: Iterable[Splittable]) -> Leaks:
    """Count the overlap of training with the held-out rows."""
    leaks, speakers = Leaks(), set()
    for row in rows:
        if row.reason or split.side(row) != "train":
            continue
        leaks.audio += bool(row.audio_hash) and row.audio_hash in split.audio
        leaks.text += bool(row.leak_text) and row.leak_text in split.text
        if row.group in split.speakers:
            speakers.add(row.group)
    leaks.speaker = len(speakers)
    return leaks
