"""Plain mappings to validated sections, with errors in one line; and the hashes that name results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from haste_core.errors import HasteError, unknown

S = TypeVar("S", bound=BaseModel)


def section_type(annotation: Any) -> type[BaseModel] | None:
    """The section a field holds, also where it is optional; None for fields that hold values."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def digest(content: Any) -> str:
    """The first 10 hexadecimal digits of the SHA-256 of `content` as canonical JSON."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`, section by section; neither argument changes."""
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merge(result[key], value) if both else value
    return result


def validate(kind: type[S], content: Mapping[str, Any], where: str) -> S:
    """`content` as a section of type `kind`.

    Raises:
        HasteError: one line that says where, what was given and what is expected.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(p) for p in first["loc"])
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        if first["type"] == "extra_forbidden":
            section: Any = kind
            for part in first["loc"][:-1]:
                section = section_type(section.model_fields[str(part)].annotation)
            within = "".join(f"{part}." for part in first["loc"][:-1])
            wrong = unknown("key", first["loc"][-1], section.model_fields, within)
            raise HasteError(f"{where}: {wrong}{more}") from error
        given = first.get("input")
        shown = "" if isinstance(given, (dict, BaseModel)) or not path else f", given {given!r}"
        message = first["msg"].removeprefix("Value error, ")
        raise HasteError(f"{where}: {path + ': ' if path else ''}{message}{shown}{more}") from error
