"""Reads YAML settings."""

import re
from pathlib import Path
from typing import Any

import yaml

from voxray.core.errors import one_line


def _without_base_60(tag: str, pattern: re.Pattern[str]) -> re.Pattern[str]:
    """The pattern of a YAML number, changed to reject colons; other patterns unchanged."""
    if tag.rpartition(":")[2] not in {"int", "float"}:
        return pattern
    return re.compile(rf"(?!.*:)(?:{pattern.pattern})", pattern.flags)


class _SafeLoader(yaml.SafeLoader):
    """YAML without base-60 numbers: ``num_workers: 1:4`` is a range, not 64."""


_SafeLoader.yaml_implicit_resolvers = {
    first: [(tag, _without_base_60(tag, pattern)) for tag, pattern in resolvers]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(path: Path) -> dict[Any, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        ValueError: The file cannot be read or holds something else. The message is one line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(one_line(error)) from None
    loaded = yaml_value(text)
    if not isinstance(loaded, dict):
        raise ValueError(f"holds a {type(loaded).__name__}, not keys and values")
    return loaded


def yaml_value(text: str) -> Any:
    """Parse a YAML document.

    Raises:
        ValueError: The text is not valid YAML. The message is one line.
    """
    try:
        return _SafeLoader(text).get_single_data()
    # PyYAML raises the last four for dates that do not exist, wrong tags and very deep nesting.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(one_line(error)) from None
