"""Names of splits, as corpora write them."""

import re
import unicodedata

TRAIN_NAMES = {"train", "training", "학습", "학습용", "훈련", "훈련용"}
VALIDATION_NAMES = {"dev", "val", "valid", "validation", "eval", "검증", "검증용", "개발", "개발용"}
TEST_NAMES = {"test", "testing", "시험", "시험용", "테스트", "평가", "평가용"}
SPLITS = {"test": TEST_NAMES, "validation": VALIDATION_NAMES, "train": TRAIN_NAMES}
"""{split: its names}, in the order in which they count: ``train_dev`` is a validation split."""


def find_split(name: str) -> str:
    """``train``, ``validation`` or ``test`` if a word of the name means it (``test-clean``, ``시험``), else ""."""
    words = set(re.split(r"[\W\d_]+", unicodedata.normalize("NFC", name).lower()))
    return next((split for split, names in SPLITS.items() if names & words), "")
