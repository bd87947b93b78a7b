"""The JSON Schema of recipes, from the classes themselves: editors complete and check with it."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode, models_json_schema

from llmc.compiler.recipe.sections import Document
from llmc.compiler.recipe.splice import WITHOUT, WORD
from llmc.passes.base import discover


class _Untitled(GenerateJsonSchema):
    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002  # pydantic's hook
        """Keys are titles enough."""
        return False


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a recipe file, with the parameters of every pass that llmc has."""
    mode: JsonSchemaMode = "validation"
    models: list[type[BaseModel]] = [Document, *discover().values()]
    places, whole = models_json_schema([(model, mode) for model in models], schema_generator=_Untitled)
    definitions = whole["$defs"]
    document = definitions.pop(places[Document, mode]["$ref"].rpartition("/")[2])
    parameters = {
        key: {"description": kind.summary(), "anyOf": [places[kind, mode], {"type": "null"}]}
        for key, kind in discover().items()
    }
    names = [{"const": key, "description": kind.summary()} for key, kind in discover().items()]
    mapping = {"type": "object", "properties": parameters, "additionalProperties": False}
    other = {
        "type": "object",
        "description": "All passes of a recipe that ships with llmc, without those named.",
        "properties": {WORD: {"type": "string"}, WITHOUT: {"type": "array", "items": {"enum": list(discover())}}},
        "required": [WORD],
        "additionalProperties": False,
    }
    document["properties"]["passes"] = {
        "description": "The passes, in the order in which they run; each by its name, or as 'name: {parameters}'.",
        "type": "array",
        "items": {"oneOf": [*names, {**mapping, "minProperties": 1, "maxProperties": 1}, other]},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **document,
        "title": "llmc recipe",
        "$defs": definitions,
    }


def schema_text() -> str:
    """The schema as the file `configs/recipe.schema.json` holds it."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"
