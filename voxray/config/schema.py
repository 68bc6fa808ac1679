"""The JSON schema of a job's YAML files, with which editors complete and check them."""

from typing import Any

from pydantic import BaseModel, BeforeValidator

from voxray.config.flags import flag_metadata

SCALARS = ("boolean", "integer", "number", "string")


def yaml_schema(model: type[BaseModel]) -> dict[str, Any]:
    """JSON schema of the YAML files that ``--config`` reads: every flag and its older names."""
    schema = model.model_json_schema()
    properties = schema["properties"]
    for name, field in model.model_fields.items():
        rule = properties[name]
        is_converted = any(isinstance(item, BeforeValidator) for item in field.metadata)
        if is_converted or (rule.get("type") not in SCALARS and "enum" not in rule):  # the flag's text is valid, too
            outer = {key: rule.pop(key) for key in ("title", "description", "default") if key in rule}
            properties[name] = {**outer, "anyOf": [rule, {"type": ["string", "number"]}]}
        elif rule.get("type") == "number":  # PyYAML reads 1e-5 as text
            rule["type"] = ["number", "string"]
        for alias in flag_metadata(field).aliases:
            properties[alias] = {**properties[name], "description": f"Older name of {name}."}
    # an older name fulfils a requirement as well, so the schema requires nothing
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "required": []}
