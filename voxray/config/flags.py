"""What a settings field says beside its type."""

from dataclasses import dataclass
from typing import Literal

from pydantic.fields import FieldInfo


@dataclass(frozen=True)
class Flag:
    """Metadata of a settings field beside its type.

    Attributes:
        aliases: Older names accepted for the flag and the YAML key.
        path: ``input`` is made absolute against the current directory. ``model`` likewise if it is a folder on disk;
            otherwise it is a hub id. ``output`` stays relative: the job resolves it, since it knows where it runs.
        no_effect: Why the flag has no effect. It is accepted so that old commands run; setting it prints this reason.
    """

    aliases: tuple[str, ...] = ()
    path: Literal["input", "model", "output"] | None = None
    no_effect: str = ""


def flag_metadata(field: FieldInfo) -> Flag:
    """The field's ``Flag``, or an empty one."""
    return next((item for item in field.metadata if isinstance(item, Flag)), Flag())


def is_switch(field: FieldInfo) -> bool:
    """Whether the flag takes no value: ``--name`` and ``--no_name``."""
    return field.annotation is bool
