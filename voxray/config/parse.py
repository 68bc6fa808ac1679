"""Settings from defaults < YAML file < flags, checked all at once, before Ray or torch is imported.

A job's settings are one frozen pydantic model: field name = flag = YAML key, the docstring under a field is its help.
``Flag`` notes in a field's annotation carry what pydantic has no word for: old spellings, and whether a value is a
path.
"""

import difflib
import os
import re
import sys
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NoReturn, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from voxray.core.errors import one_line

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = REPOSITORY / "jobs" / "configs"
DEMO_ASSETS = REPOSITORY / "tests" / "assets"
SUBMITTED_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray in the processes that ``ray job submit`` starts."""


@dataclass(frozen=True)
class Flag:
    """What a settings field needs beside its type.

    Attributes:
        aliases: Old spellings accepted for the flag and the YAML key.
        path: ``input`` is made absolute against the current directory; ``model`` likewise if it is a folder on disk
            (else it is a hub id); ``output`` is left for ``launch`` to anchor, which knows where the job runs.
        no_effect: Accepted so that old commands run; setting it warns with this reason.
    """

    aliases: tuple[str, ...] = ()
    path: Literal["input", "model", "output"] | None = None
    no_effect: str = ""


def _split(value: Any) -> Any:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


CommaStrings = Annotated[tuple[str, ...], BeforeValidator(_split)]
"""``a,b,c`` on the command line, a list or the same string in YAML."""


class Settings(BaseModel):
    """Base of every job's settings: frozen, no unknown keys, field docstrings kept for ``--help``."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
    config_spellings: ClassVar[tuple[str, ...]] = ()
    """Old spellings of --config."""

    @classmethod
    def of_file(cls, loaded: dict[Any, Any], path: Path, given: Mapping[str, Any]) -> tuple[dict[Any, Any], list[str]]:
        """Keys and values of a YAML file as flags, and what is wrong with it; for jobs that read older files too.

        Args:
            given: What flags say, by field.
        """
        return loaded, []


S = TypeVar("S", bound=Settings)


def parse(model: type[S], argv: Sequence[str] | None, *, job: str, about: str, demo: str, words: str = "") -> S:
    """Read one job's settings.

    Args:
        model: The settings class.
        argv: Arguments without the program's name; None reads ``sys.argv``.
        job: Name of the job, for messages.
        about: One sentence for ``--help``.
        demo: File name in ``jobs/configs`` used when no flag is given at all.
        words: Field that takes the words before the first flag; "" takes none.
    Raises:
        SystemExit: status 0 after ``--help``; status 2 with every bad field named, one line each.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--help" in argv or "-h" in argv:
        print(help_text(model, job=job, about=about, demo=demo, words=words))
        raise SystemExit(0)
    if not argv:
        print(f"{job}: no flags given, so this runs the demo recipe (jobs/configs/{demo})", flush=True)
        values, errors = _read_yaml(CONFIGS / demo, model, {})
        values = {name: _from_repository(model, name, value) for name, value in values.items()}
        if SUBMITTED_JOB_VARIABLE in os.environ and "storage_path" in model.model_fields:
            values["storage_path"] = str(Path.home() / "voxray")  # the current directory goes when the job ends
            print(f"{job}: in a submitted job its output goes to {values['storage_path']}", flush=True)
        return _validated(model, values, {}, errors, job)
    num_words = next((at for at, token in enumerate(argv) if token.startswith("--")), len(argv)) if words else 0
    flags, config_path, errors = _scan(model, argv[num_words:])
    if num_words:
        _put(model, flags, words, tuple(argv[:num_words]), f"--{words}", errors)
    values = {}
    if config_path is not None:
        values, yaml_errors = _read_yaml(Path(config_path), model, flags)
        errors += yaml_errors
    return _validated(model, values, flags, errors, job, config_path)


def flag_names(model: type[Settings]) -> dict[str, str]:
    """Map every accepted spelling (field names and aliases, with underscores) to its field."""
    names = {name: name for name in model.model_fields}
    for name, field in model.model_fields.items():
        for alias in flag_metadata(field).aliases:
            names[alias.replace("-", "_")] = name
    return names


def flag_metadata(field: FieldInfo) -> Flag:
    """The field's ``Flag`` note, or an empty one."""
    return next((note for note in field.metadata if isinstance(note, Flag)), Flag())


def _scan(model: type[Settings], argv: list[str]) -> tuple[dict[str, Any], str | None, list[str]]:
    """Split argv into {field: raw value}, the --config path and the errors found on the way."""
    names, values, errors, config_path = flag_names(model), {}, [], None
    queue = list(argv)
    while queue:
        token = queue.pop(0)
        if not token.startswith("--"):
            errors.append(f"{token}: not a flag; every value follows its --flag")
            continue
        spelled, has_value, value = token[2:].partition("=")
        key = spelled.replace("-", "_")
        name, negated = names.get(key), False
        if name is None and key.startswith("no_") and key[3:] in names:
            name, negated = names[key[3:]], True
            if not _is_bool(model.model_fields[name]):
                errors.append(f"--{spelled}: only switches have a --no_ form")
                continue
        if name is None and key not in ("config", *model.config_spellings):
            errors.append(f"--{spelled}: unknown flag{_suggestion(key, names)}")
        elif name is None or not _is_bool(model.model_fields[name]):
            if not has_value:
                if not queue or queue[0].startswith("--"):
                    errors.append(f"--{spelled}: needs a value")
                    continue
                value = queue.pop(0)
            if name is None:
                if config_path not in (None, value):
                    errors.append(f"--config: given twice, as {config_path!r} and {value!r}")
                config_path = value
            else:
                _put(model, values, name, value, f"--{spelled}", errors)
        else:
            if not has_value and queue and queue[0].lower() in {"true", "false"}:
                has_value, value = "=", queue.pop(0)
            if has_value and value.lower() not in {"true", "false"}:
                errors.append(f"--{spelled}: a switch takes true or false, not {value!r}")
                continue
            is_on = (value.lower() == "true" if has_value else True) != negated
            _put(model, values, name, is_on, f"--{spelled}", errors)
    return values, config_path, errors


def _put(model: type[Settings], values: dict[str, Any], name: str, value: Any, spelled: str, errors: list[str]) -> None:
    """Keep one value; the last of a repeated flag wins only if it says the same thing."""
    if name in values and not _same(model, name, values[name], value):
        errors.append(f"{spelled}: given twice, as {values[name]!r} and {value!r}")
    values[name] = value


def _same(model: type[Settings], name: str, first: Any, second: Any) -> bool:
    """Whether two spellings of a value mean the same, such as Korean and ko."""
    if first == second:
        return True
    read = field_adapter(model.model_fields[name]).validate_python
    try:
        return read(first) == read(second)
    except ValidationError:
        return False


def field_adapter(field: FieldInfo) -> TypeAdapter[Any]:
    """What reads one value of a field, by itself."""
    kind: Any = field.annotation
    if field.metadata:
        kind = typing.Annotated.__class_getitem__((kind, *field.metadata))  # type: ignore[attr-defined]
    return TypeAdapter(kind)


def _without_base_60(tag: str, pattern: re.Pattern[str]) -> re.Pattern[str]:
    """The pattern of a YAML number, refusing colons; other patterns as they are."""
    if tag.rpartition(":")[2] not in {"int", "float"}:
        return pattern
    return re.compile(rf"(?!.*:)(?:{pattern.pattern})", pattern.flags)


class _SafeLoader(yaml.SafeLoader):
    """YAML without numbers to base 60: ``num_workers: 1:4`` is a range, not 64."""


_SafeLoader.yaml_implicit_resolvers = {
    first: [(tag, _without_base_60(tag, pattern)) for tag, pattern in resolvers]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(path: Path) -> dict[Any, Any]:
    """Read a YAML file of keys and values.

    Raises:
        ValueError: It cannot be read, or holds something else; one line.
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
    """What a text says in YAML.

    Raises:
        ValueError: It is none; one line.
    """
    try:
        return _SafeLoader(text).get_single_data()
    # The last four are what PyYAML lets through for dates that do not exist, wrong tags and very deep nesting.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(one_line(error)) from None


def _read_yaml(path: Path, model: type[Settings], given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    try:
        loaded = read_yaml(path)
    except ValueError as error:
        return {}, [f"--config {path}: {error}"]
    names, values = flag_names(model), {}
    loaded, errors = model.of_file(loaded, path, given)
    for key, value in loaded.items():
        name = names.get(str(key).replace("-", "_"))
        if name is None:
            errors.append(f"{path}: {key}: unknown key{_suggestion(str(key), names)}")
        elif isinstance(value, bool) and not _is_bool(model.model_fields[name]):
            errors.append(f"{path}: {key}: is no switch, but YAML reads this value as {value}; quote it if it is text")
        else:
            _put(model, values, name, value, f"{path}: {key}", errors)
    return values, errors


def _validated(
    model: type[S],
    values: dict[str, Any],
    flags: dict[str, Any],
    errors: list[str],
    job: str,
    config_path: str | None = None,
) -> S:
    settings = None
    try:
        settings = model.model_validate({**values, **flags})
    except ValidationError as error:
        for item in error.errors():
            name = str(item["loc"][0]) if item["loc"] else ""
            where = f"--{name}" if name in flags or name not in values else f"{config_path}: {name}"
            messages = item["msg"].removeprefix("Value error, ").split("\n")  # a validator may find several faults
            given = f" (got {item['input']!r})" if name and item["type"] != "missing" and len(messages) == 1 else ""
            errors += [f"{where}: {message}{given}" if name else message for message in messages]
    if settings is None or errors:
        _refuse(job, errors)
    for name in settings.model_fields_set:
        reason = flag_metadata(model.model_fields[name]).no_effect
        if reason:
            print(f"warning: --{name} has no effect: {reason}", file=sys.stderr, flush=True)
    return with_absolute_inputs(settings)


def _refuse(job: str, errors: list[str]) -> NoReturn:
    for line in dict.fromkeys(errors):
        print(f"error: {line}", file=sys.stderr)
    print(f"{job}: {len(set(errors))} bad setting(s); --help lists them all", file=sys.stderr, flush=True)
    raise SystemExit(2)


def with_absolute_inputs(settings: S) -> S:
    """Make relative inputs absolute: Ray's workers have other current directories than the person who typed them."""
    changed = {}
    for name, field in type(settings).model_fields.items():
        kind, value = flag_metadata(field).path, getattr(settings, name)
        if kind in {"input", "model"} and value:
            make = _absolute_input if kind == "input" else _absolute_model
            changed[name] = tuple(map(make, value)) if isinstance(value, tuple) else make(value)
    # model_copy would count these fields as set by the user, who may have left some to their defaults
    return type(settings).model_construct(settings.model_fields_set, **{**dict(settings), **changed})


def _absolute_input(value: str) -> str:
    return value if "://" in value else str(Path(os.path.expanduser(value)).absolute())


def _absolute_model(value: str) -> str:
    folder = Path(os.path.expanduser(value))
    return str(folder.absolute()) if folder.is_dir() else value


def _from_repository(model: type[Settings], name: str, value: Any) -> Any:
    """Demo recipes name the assets relative to the repository, wherever the job is started from."""
    if flag_metadata(model.model_fields[name]).path not in {"input", "model"} or not value:
        return value
    parts = _split(value) if isinstance(value, str) else tuple(value)
    found = [str(REPOSITORY / part) if (REPOSITORY / part).exists() else part for part in parts]
    return ",".join(found)


def _suggestion(key: str, names: dict[str, str]) -> str:
    close = difflib.get_close_matches(key, [*names, "config"], n=1)
    return f"; did you mean --{close[0]}?" if close else ""


def _is_bool(field: FieldInfo) -> bool:
    return field.annotation is bool


def help_text(model: type[Settings], *, job: str, about: str, demo: str, words: str = "") -> str:
    """The text of ``--help``: each field with its type, default, old spellings and docstring."""
    first = f" [{words.upper()} ...]" if words else ""
    lines = [f"python jobs/{job}.py{first} [--config FILE.yaml] [flags]", "", about, ""]
    lines += [f"Defaults < YAML < flags. With no flags at all it runs the demo recipe, jobs/configs/{demo}.", ""]
    for name, field in model.model_fields.items():
        spelled = f"--{name} / --no_{name}" if _is_bool(field) else f"--{name} {_type_name(field.annotation)}"
        default = "required" if field.is_required() else f"default {_shown(field.default)}"
        note = flag_metadata(field)
        lines.append(f"  {spelled}  ({default})")
        text = " ".join((field.description or "").split())
        if note.aliases:
            text += f" Also: {', '.join('--' + alias for alias in note.aliases)}."
        if note.no_effect:
            text += f" Accepted, no effect: {note.no_effect}."
        lines += textwrap.wrap(text, 112, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def _type_name(annotation: Any) -> str:
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return "|".join(map(str, typing.get_args(annotation)))
    if origin in {typing.Union, types.UnionType}:
        return "|".join(_type_name(part) for part in typing.get_args(annotation) if part is not type(None))
    if origin is tuple:
        return f"{_type_name(typing.get_args(annotation)[0])},..."
    if origin is Annotated:
        return _type_name(typing.get_args(annotation)[0])
    return {"int": "N", "float": "X", "str": "TEXT"}.get(getattr(annotation, "__name__", ""), "VALUE")


def _shown(value: Any) -> str:
    if value is None or value in ("", (), {}):
        return "none"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
