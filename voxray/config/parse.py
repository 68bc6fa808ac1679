"""Settings from defaults < YAML file < flags, validated together before Ray or torch is imported.

A job's settings are one frozen pydantic model: field name = flag = YAML key, and the docstring under a field is its
help text. ``Flag`` metadata in a field's annotation holds what pydantic does not model: aliases, and whether a value is
a path.

The command line is scanned here and not by a library. pydantic-settings, cyclopts, tyro and jsonargparse were tried;
each loses something this module guarantees: every bad setting reported in one run, dashes or underscores in any flag,
``--no_x`` switches, no abbreviations, suggestions for misspelled flags, and nothing read from environment variables.
"""

import difflib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, NoReturn, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from voxray.config.flags import flag_metadata, is_switch
from voxray.config.help import help_text, reference_page
from voxray.config.input_files import pointer_errors, relative_output_errors, unique_files, url_errors
from voxray.config.other_names import explain_other_name
from voxray.config.own_tasks import load_own_tasks
from voxray.config.schema import yaml_schema
from voxray.core.errors import MAX_VALUE_CHARS, SettingsError, is_utf8_text, print_page, quoted_line
from voxray.core.project_files import PROJECT_FILES
from voxray.core.yaml_file import read_yaml

CONFIGS = PROJECT_FILES / "jobs" / "configs"
DEMO_ASSETS = PROJECT_FILES / "tests" / "assets"
CHECK = {"--check_flags", "--check-flags"}
HELP = {"--help", "-h", "--help-all", "--help_all"}
SCHEMA = "--schema"
REFERENCE = "--reference"
SUBMITTED_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets this environment variable in the processes that ``ray job submit`` starts."""


def split_commas(value: Any) -> Any:
    """Split a string at its commas, without blanks and empty parts; return any other value unchanged."""
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def convert(function: Callable[[Any], Any]) -> BeforeValidator:
    """Validator that converts a raw value from the command line or YAML.

    Args:
        function: Raises ValueError for a value that it cannot convert. Errors of other types, because YAML gave a value
            of a type that it does not expect, become a ValueError.
    """

    def checked(value: Any) -> Any:
        try:
            return function(value)
        except (TypeError, AttributeError, LookupError, ArithmeticError):
            raise ValueError("has the wrong type") from None

    return BeforeValidator(checked)


CommaStrings = Annotated[tuple[str, ...], convert(split_commas)]
"""``a,b,c`` on the command line; a list or the same string in YAML."""


InputFiles = Annotated[CommaStrings, AfterValidator(unique_files)]
"""``CommaStrings`` of files; each file counts once, whatever its names."""


class Settings(BaseModel):
    """Base of every job's settings: frozen, no unknown keys, field docstrings kept for ``--help``."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
    config_aliases: ClassVar[tuple[str, ...]] = ()
    """Older names of --config."""
    url_flags: ClassVar[tuple[str, ...]] = ("features_dir",)
    """Flags for paths that also take a URL, such as s3://bucket/voxray."""
    task_folders: ClassVar[tuple[str, ...]] = ()
    """Flags for folders that may have recorded own tasks."""

    @classmethod
    def translate_yaml(
        cls, loaded: dict[Any, Any], path: Path, flags: Mapping[str, Any]
    ) -> tuple[dict[Any, Any], list[str]]:
        """Translate the keys of a YAML file to this job's flags. Jobs that also read older file formats override it.

        Args:
            loaded: Keys and values of the file.
            path: The file, for messages.
            flags: Values from the command line, by field.
        Returns:
            {flag: value}, and one line for each error in the file.
        """
        return loaded, []


S = TypeVar("S", bound=Settings)


def parse(model: type[S], argv: Sequence[str] | None, *, job: str, about: str, demo: str, positional: str = "") -> S:
    """Read one job's settings.

    Args:
        model: The settings class.
        argv: Arguments without the program's name; None reads ``sys.argv``.
        job: Name of the job, for messages.
        about: Description of the job, for ``--help``.
        demo: File in ``jobs/configs`` that is used when there are no arguments at all.
        positional: Field that takes the arguments before the first flag; "" for none.
    Raises:
        SystemExit: Status 0 after ``--help``, ``--schema`` and ``--reference``, and after ``--check_flags`` if all is
            valid. Status 2 after printing one line for every bad setting.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if CHECK & set(argv):
        words = [word for word in argv if word not in CHECK]
        settings = parse(model, words, job=job, about=about, demo=demo, positional=positional)
        if SUBMITTED_JOB_VARIABLE in os.environ and (errors := relative_output_errors(settings)):
            _exit_with(job, errors)
        print(f"{job}: the flags are valid", flush=True)
        raise SystemExit(0)
    if argv == [SCHEMA]:
        print_page(json.dumps(yaml_schema(model), ensure_ascii=False, indent=2))
        raise SystemExit(0)
    if argv == [REFERENCE]:
        print_page(reference_page(model, job=job, about=about).removesuffix("\n"))
        raise SystemExit(0)
    if HELP & set(argv):
        everything = bool({"--help-all", "--help_all"} & set(argv))
        print_page(help_text(model, job=job, about=about, demo=demo, positional=positional, everything=everything))
        raise SystemExit(0)
    if not argv:
        print(f"{job}: no flags given, so this runs the demo recipe (jobs/configs/{demo})", flush=True)
        values, errors = _read_yaml(CONFIGS / demo, model, {})
        values = {name: _relative_to_project(model, name, value) for name, value in values.items()}
        if SUBMITTED_JOB_VARIABLE in os.environ and "storage_path" in model.model_fields:
            values["storage_path"] = str(Path.home() / "voxray")  # Ray deletes the current directory after the job
            print(f"{job}: in a submitted job its output goes to {values['storage_path']}", flush=True)
        return _validated(model, values, {}, errors, job)
    first_flag = next((index for index, token in enumerate(argv) if token.startswith("--")), len(argv))
    num_positional = first_flag if positional else 0
    flags, config_path, errors = _scan(model, argv[num_positional:])
    if num_positional:
        _set(model, flags, positional, tuple(argv[:num_positional]), f"--{positional}", errors)
    values = {}
    if config_path is not None:
        values, yaml_errors = _read_yaml(_recipe(config_path), model, flags)
        errors += yaml_errors
    return _validated(model, values, flags, errors, job, config_path)


def _recipe(path: str) -> Path:
    """The file of --config. A name such as jobs/configs/tune.yaml means the project's recipe in any folder."""
    return PROJECT_FILES / path if not os.path.exists(path) and (PROJECT_FILES / path).is_file() else Path(path)


def flag_names(model: type[Settings]) -> dict[str, str]:
    """Map every accepted name (fields and aliases, with underscores) to its field."""
    names = {name: name for name in model.model_fields}
    for name, field in model.model_fields.items():
        for alias in flag_metadata(field).aliases:
            names[alias.replace("-", "_")] = name
    return names


def _scan(model: type[Settings], argv: list[str]) -> tuple[dict[str, Any], str | None, list[str]]:
    """Split argv into {field: raw value}, the --config path and one line per error."""
    names, values, errors, config_path = flag_names(model), {}, [], None
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        if not token.startswith("--"):
            errors.append(f"{token}: not a flag; every value follows its --flag")
            continue
        flag, has_value, value = token[2:].partition("=")
        key = flag.replace("-", "_")
        name, negated = names.get(key), False
        if name is None and key.startswith("no_") and key[3:] in names:
            name, negated = names[key[3:]], True
            if not is_switch(model.model_fields[name]):
                errors.append(f"--{flag}: only switches have a --no_ form")
                continue
        if name is None and key not in ("config", *model.config_aliases):
            errors.append(f"--{flag}: unknown flag{_suggestion(key, names)}")
            if not has_value and tokens and not tokens[0].startswith("--"):
                tokens.pop(0)  # its value
        elif name is None or not is_switch(model.model_fields[name]):
            if not has_value:
                if not tokens or tokens[0].startswith("--"):
                    errors.append(f"--{flag}: needs a value")
                    continue
                value = tokens.pop(0)
            if name is None:
                if config_path not in (None, value):
                    errors.append(f"--config: given twice, as {config_path!r} and {value!r}")
                config_path = value
            else:
                _set(model, values, name, value, f"--{flag}", errors)
        else:
            if not has_value and tokens and not tokens[0].startswith("--"):
                has_value, value = "=", tokens.pop(0)
            if has_value and value.lower() not in {"true", "false"}:
                errors.append(f"--{flag}: a switch takes true or false, not {value!r}")
                continue
            is_on = (value.lower() == "true" if has_value else True) != negated
            _set(model, values, name, is_on, f"--{flag}", errors)
    return values, config_path, errors


def _set(model: type[Settings], values: dict[str, Any], name: str, value: Any, label: str, errors: list[str]) -> None:
    """Set ``values[name]``; setting it twice is an error unless both values are equal once validated."""
    if name in values and not _same(model, name, values[name], value):
        errors.append(f"{label}: given twice, as {values[name]!r} and {value!r}")
    values[name] = value


def _same(model: type[Settings], name: str, first: Any, second: Any) -> bool:
    """Whether a field's validator turns both values into the same one, such as Korean and ko."""
    if first == second:
        return True
    validate = field_adapter(model.model_fields[name]).validate_python
    try:
        return validate(first) == validate(second)
    except ValidationError:
        return False


def field_adapter(field: FieldInfo) -> TypeAdapter[Any]:
    """A ``TypeAdapter`` that validates one value of the field on its own."""
    annotation: Any = field.annotation
    if field.metadata:
        annotation = Annotated.__class_getitem__((annotation, *field.metadata))  # type: ignore[attr-defined]
    return TypeAdapter(annotation)


def _read_yaml(path: Path, model: type[Settings], flags: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Read {field: raw value} from a YAML file, and one line per error; ``flags`` are those of the command line."""
    try:
        loaded = read_yaml(path)
    except ValueError as error:
        return {}, [f"--config {path}: {error}"]
    names, values = flag_names(model), {}
    loaded, errors = model.translate_yaml(loaded, path, flags)
    for key, value in loaded.items():
        name = names.get(str(key).replace("-", "_"))
        if name is None:
            errors.append(f"{path}: {key}: unknown key{_suggestion(str(key), names, '')}")
        elif isinstance(value, bool) and not is_switch(model.model_fields[name]):
            errors.append(
                f"{path}: {key}: is not true or false, but YAML reads this value as {value}; quote it if it is text"
            )
        else:
            _set(model, values, name, value, f"{path}: {key}", errors)
    return values, errors


def _validated(
    model: type[S],
    values: dict[str, Any],
    flags: dict[str, Any],
    errors: list[str],
    job: str,
    config_path: str | None = None,
) -> S:
    """Validate the merged values, where flags win over the file's; print every error and exit with status 2 if any."""
    settings, faults = _validate(model, values, flags, config_path)
    if settings is None or faults or errors:
        _exit_with(job, [*errors, *faults])
    return _ready(settings)


def settings_from(model: type[S], values: Mapping[str, Any]) -> S:
    """Settings from Python values, with the checks of the command line.

    Args:
        values: {field or one of its older names: value}.
    Raises:
        SettingsError: A name or a value is wrong. One line has all errors.
    """
    names = flag_names(model)
    errors = [f"{name}: unknown setting{_suggestion(name, names, '')}" for name in values if name not in names]
    fields = {names[name]: value for name, value in values.items() if name in names}
    settings, faults = _validate(model, fields, fields, None)
    if settings is None or faults or errors:
        raise SettingsError("; ".join(dict.fromkeys(map(quoted_line, [*errors, *faults]))))
    return _ready(settings)


def _validate(
    model: type[S], values: dict[str, Any], flags: dict[str, Any], config_path: str | None
) -> tuple[S | None, list[str]]:
    """The settings, or None if they are invalid, and one line per error."""
    settings: S | None = None
    merged = {**values, **flags}
    errors = [
        f"{f'--{name}' if name in flags else f'{config_path}: {name}'}: holds half of a surrogate pair"
        for name, value in merged.items()
        if not _has_utf8_form(value)
    ]
    errors = errors or load_own_tasks(merged, model.task_folders)
    if errors:
        return None, errors
    try:
        settings = model.model_validate(merged)
    except ValidationError as error:
        for item in error.errors():
            name = str(item["loc"][0]) if item["loc"] else ""
            where = f"--{name}" if name in flags or name not in values else f"{config_path}: {name}"
            messages = item["msg"].removeprefix("Value error, ").split("\n")  # a validator may report several errors
            got = (
                f" (got {shortened(item['input'])})"
                if name and item["type"] != "missing" and len(messages) == 1
                else ""
            )
            errors += [f"{where}: {message}{got}" if name else message for message in messages]
    if settings is not None:
        paths = [name for name, field in model.model_fields.items() if flag_metadata(field).path in {"input", "model"}]
        errors += pointer_errors({name: getattr(settings, name) for name in paths})
        errors += url_errors(settings, model.url_flags)
    return settings, errors


def _has_utf8_form(value: Any) -> bool:
    """Whether all texts in a value, which may be a list or a mapping, can be written as UTF-8."""
    try:
        return is_utf8_text(json.dumps(value, ensure_ascii=False, default=str))
    except (TypeError, ValueError):  # not JSON, such as a mapping with keys of other types
        return True


def _ready(settings: S) -> S:
    """Warn about settings without effect; return the settings with absolute paths."""
    for name in settings.model_fields_set:
        reason = flag_metadata(type(settings).model_fields[name]).no_effect
        if reason:
            print(f"warning: --{name} has no effect: {reason}", file=sys.stderr, flush=True)
    return with_absolute_inputs(settings)


def shortened(value: Any) -> str:
    """A value as messages show it."""
    text = repr(value)
    return text if len(text) <= MAX_VALUE_CHARS else f"{text[:MAX_VALUE_CHARS]}…"


def _exit_with(job: str, errors: list[str]) -> NoReturn:
    for line in dict.fromkeys(errors):
        print(f"error: {quoted_line(line)}", file=sys.stderr)
    print(f"{job}: {len(set(errors))} bad setting(s); --help-all lists them all", file=sys.stderr, flush=True)
    raise SystemExit(2)


def with_absolute_inputs(settings: S) -> S:
    """Make relative input paths absolute: Ray's workers run in another current directory than the user's shell."""
    changed = {}
    for name, field in type(settings).model_fields.items():
        kind, value = flag_metadata(field).path, getattr(settings, name)
        if kind in {"input", "model"} and value:
            absolute = _absolute_input if kind == "input" else _absolute_model
            changed[name] = tuple(map(absolute, value)) if isinstance(value, tuple) else absolute(value)
    # model_copy would add these fields to model_fields_set, although the user may have left some at their defaults
    return type(settings).model_construct(settings.model_fields_set, **{**dict(settings), **changed})


def _absolute_input(value: str) -> str:
    return str(Path(os.path.expanduser(value)).absolute())


def _absolute_model(value: str) -> str:
    folder = Path(os.path.expanduser(value))
    return str(folder.absolute()) if os.path.isdir(folder) else value


def _relative_to_project(model: type[Settings], name: str, value: Any) -> Any:
    """Resolve paths of a demo recipe against the project's files, so that it works from any current directory."""
    if flag_metadata(model.model_fields[name]).path not in {"input", "model"} or not value:
        return value
    return ",".join(
        str(PROJECT_FILES / part) if os.path.exists(PROJECT_FILES / part) else part for part in split_commas(value)
    )


def _suggestion(key: str, names: Mapping[str, str], dashes: str = "--") -> str:
    """The end of the message about an unknown name: what it is called here, or the nearest spelling."""
    answer = explain_other_name(key, names, dashes)
    if answer is not None:
        return answer
    close = difflib.get_close_matches(key, [*names, "config"], n=1)
    return f"; did you mean {dashes}{names.get(close[0], close[0])}?" if close else ""
