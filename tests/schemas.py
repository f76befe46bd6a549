"""The JSON schemas of the verbs of ``stq``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema

import stq_compile.cli

SCHEMAS = Path(stq_compile.cli.__file__).parent / "schemas"


def check(verb: str, found: Any) -> None:
    """Raises if what a verb printed does not keep to its schema."""
    schema = json.loads((SCHEMAS / f"{verb}.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(found)
