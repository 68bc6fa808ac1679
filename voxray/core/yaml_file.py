"""Reads YAML settings."""

import re
from pathlib import Path
from typing import Any

import yaml

from voxray.core.errors import one_line

MAX_BYTES, MAX_VALUES = 16 << 20, 100_000


def _num_values(node: yaml.Node, counts: dict[int, int]) -> int:
    """Number of values below a node. An alias counts each time, since messages and checks walk through all of them."""
    if id(node) not in counts:
        counts[id(node)] = 0  # a node that contains itself
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
        counts[id(node)] = 1 + sum(_num_values(part, counts) for part in parts)
    return counts[id(node)]


def _refuse_repeated_keys(node: yaml.Node, visited: set[int]) -> None:
    """Refuse a mapping with a key twice, of which PyYAML takes the last one without a word.

    Raises:
        ValueError: The message names the line and the key.
    """
    if id(node) in visited or not isinstance(node, yaml.CollectionNode):
        return
    visited.add(id(node))
    keys: set[tuple[str, str]] = set()
    for child in node.value:
        pair = child if isinstance(child, tuple) else (child,)
        if isinstance(child, tuple) and isinstance(child[0], yaml.ScalarNode) and child[0].value != "<<":
            key = (child[0].tag, child[0].value)
            if key in keys:
                raise ValueError(f"line {child[0].start_mark.line + 1}: the key {child[0].value} is there twice")
            keys.add(key)
        for part in pair:
            _refuse_repeated_keys(part, visited)


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
        if not path.is_dir() and not path.is_file() and path.exists():
            raise ValueError("not a regular file")
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"over {MAX_BYTES >> 20} MiB, which is no file of settings")
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
        loader = _SafeLoader(text)
        node = loader.get_single_node()
        if node is not None and _num_values(node, {}) > MAX_VALUES:
            raise ValueError(f"over {MAX_VALUES:,} values, counting what aliases repeat")
        if node is not None:
            _refuse_repeated_keys(node, set())
        return None if node is None else loader.construct_document(node)
    # PyYAML raises the last four for dates that do not exist, wrong tags and very deep nesting.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(one_line(error)) from None
