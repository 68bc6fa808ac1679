"""The text of ``--help``: flags that are required or common, in groups; ``--help-all`` shows every flag."""

import re
import textwrap
import types
import typing
from typing import Annotated, Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from voxray.config.flags import flag_metadata, is_switch
from voxray.core.project_files import typed_command

WIDTH = 80
GROUPS = {
    "data": ("Feature", "SharedFeature", "ClipLimit", "Variant", "Mask", "Table", "EvaluationData"),
    "model": (
        *("BaseModel", "Model", "SalmonnParts", "SalmonnBase", "SalmonnPrompt", "Compiled"),
        *("Lora", "LoraDir", "Adapter", "Trim"),
    ),
    "training": ("Optimizer", "Batching", "TaskBatching"),
    "validation": (),
    "decoding": ("Sampling",),
    "scores": ("Score",),
    "output": ("Output",),
    "cluster": ("Placement", "Worker", "Strategy"),
}
"""{group: classes of settings without their ending ``Flags``}. Flags of other classes belong to the job itself."""
FIELDS = {
    "data": "train_jsonl val_jsonl input jsonl manifest dataset audio_path question language allow_empty score_only",
    "validation": "preview_rows metric_for_best_model load_best_model_at_end",
    "output": "output_dir output_path storage_path overwrite train_output val_output test_output audio_output",
    "training": "tuning curriculum task_weights",
}
"""{group: fields that belong to it whatever class has them}."""
PREFIXES = {"eval_": "validation", "early_stopping": "validation", "save_": "output", "log_": "output"}
COMMON = (
    "train_jsonl val_jsonl input jsonl manifest audio_path question language model_id lora_dir init_adapter output_dir "
    "output_path train_output val_output overwrite num_workers epochs max_steps per_device_bsz batch_size lr lora_r "
    "quantize bf16 batching grad_accum grad_ckpt eval_steps save_steps num_beams max_new_tokens gen_max_new_tokens "
    "format audio_column text_column speaker_column audio_dir encoding min_sec max_sec leaks terms score_only "
    "dataset address wait port"
)
"""Flags that ``--help`` shows, besides the required ones."""
JOB_GROUP = "other"


def help_text(
    model: type[BaseModel], *, job: str, about: str, demo: str, positional: str = "", everything: bool = False
) -> str:
    """The flags of a job in groups, each with its type, default, docstring and aliases, in 80 columns.

    Args:
        positional: Field that takes the arguments before the first flag; "" for none.
        everything: Show all flags, not only those that are required or common.
    """
    command = typed_command(job)
    arguments = f" [{positional.upper()} ...]" if positional else ""
    lines = [
        f"{command}{arguments} [--config FILE.yaml] [flags]",
        "",
        *_wrapped(about.replace(f"python jobs/{job}.py", command)),
        "",
    ]
    note = f"Defaults < YAML < flags. With no flags at all it runs the demo recipe, jobs/configs/{demo}."
    lines += [*textwrap.wrap(note, WIDTH), ""]
    fields = model.model_fields
    common = {*fields} if everything else {*COMMON.split(), positional}
    groups = flags_in_groups(model, common)
    for title, names in groups.items():
        lines += [f"{title}:", *(line for name in names for line in _flag_lines(name, fields[name])), ""]
    lines.append("--check_flags checks the flags and ends.")
    if hidden := len(fields) - sum(map(len, groups.values())):
        lines.append(f"--help-all shows {hidden} more flags.")
    return "\n".join(lines).rstrip()


def reference_page(model: type[BaseModel], *, job: str, about: str) -> str:
    """The page of ``docs/reference`` about a job: its script's docstring and all of its flags, in Markdown."""
    lines = [
        f"# {job}",
        "",
        *about.strip().splitlines(),
        "",
        "Flags override the YAML file of `--config`, and the file overrides the defaults.",
        "Its keys are the names of the flags.",
    ]
    for title, names in flags_in_groups(model, {*model.model_fields}).items():
        lines += ["", f"## {title}", "", "| flag | default | meaning |", "| --- | --- | --- |"]
        for name in names:
            field = model.model_fields[name]
            default = "" if field.is_required() else f"`{_default_text(field.default)}`"
            cells = f"`{_usage(name, field)}`", default, _explanation(field).replace("``", "`")
            lines.append(" | ".join(("", *(cell.replace("|", r"\|") for cell in cells), "")).strip())
    return "\n".join(lines) + "\n"


def flags_in_groups(model: type[BaseModel], shown: set[str]) -> dict[str, list[str]]:
    """{group: flags}: the required flags, then the shown ones by group. Empty groups are left out."""
    required = [name for name, field in model.model_fields.items() if field.is_required()]
    others = [name for name in model.model_fields if name in shown and name not in required]
    groups = {"required": required} | {
        group: [name for name in others if group_of_flag(model, name) == group] for group in (*GROUPS, JOB_GROUP)
    }
    return {group: names for group, names in groups.items() if names}


def _wrapped(about: str) -> list[str]:
    """A script's docstring in 80 columns. Commands, which are indented, continue after a backslash."""
    lines = []
    for line in about.strip().splitlines():
        if line.startswith("    "):
            lines += _wrapped_command(line)
        else:
            lines += textwrap.wrap(line, WIDTH, break_on_hyphens=False) or [""]
    return lines


def _wrapped_command(line: str) -> list[str]:
    """A command in lines that end in a backslash. A flag and its value stay together."""
    first, *flags = re.split(r" (?=--)", line.rstrip())
    lines = [first]
    for flag in flags:
        if len(lines[-1]) + len(flag) + 3 > WIDTH:  # a space, and the space and backslash at the end
            lines[-1] += " \\"
            lines.append(f"        {flag}")
        else:
            lines[-1] += f" {flag}"
    return lines


def group_of_flag(model: type[BaseModel], name: str) -> str:
    """The group of a flag: by its name, else by the class that has it."""
    for group, fields in FIELDS.items():
        if name in fields.split():
            return group
    for prefix, group in PREFIXES.items():
        if name.startswith(prefix):
            return group
    owner = next(parent.__name__ for parent in model.__mro__ if name in vars(parent).get("__annotations__", {}))
    return next((group for group, names in GROUPS.items() if owner.removesuffix("Flags") in names), JOB_GROUP)


def _flag_lines(name: str, field: FieldInfo) -> list[str]:
    usage = _usage(name, field)
    default = "required" if field.is_required() else f"default {_default_text(field.default)}"
    head = f"  {usage}  ({default})"
    lines = [head] if len(head) <= WIDTH else [f"  {usage}", f"      ({default})"]
    indent = " " * 6
    text = _explanation(field)
    return lines + textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def _usage(name: str, field: FieldInfo) -> str:
    return f"--{name} / --no_{name}" if is_switch(field) else f"--{name} {_type_name(field.annotation)}"


def _explanation(field: FieldInfo) -> str:
    """A flag's docstring, its older names, and why it has no effect."""
    flag = flag_metadata(field)
    text = " ".join((field.description or "").split())
    if flag.aliases:
        text += f" Also: {', '.join('--' + alias for alias in flag.aliases)}."
    if flag.no_effect:
        text += f" Accepted, no effect: {flag.no_effect}."
    return text


def _type_name(annotation: Any) -> str:
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return "|".join(value for value in map(str, typing.get_args(annotation)) if value)
    if origin in {typing.Union, types.UnionType}:
        return "|".join(_type_name(part) for part in typing.get_args(annotation) if part is not type(None))
    if origin is tuple:
        return f"{_type_name(typing.get_args(annotation)[0])},..."
    if origin is Annotated:
        return _type_name(typing.get_args(annotation)[0])
    return {"int": "N", "float": "X", "str": "TEXT"}.get(getattr(annotation, "__name__", ""), "VALUE")


def _default_text(value: Any) -> str:
    if value is None or value in ("", (), {}):
        return "none"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
