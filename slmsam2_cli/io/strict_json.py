"""Parse untrusted JSON within fixed bounds, and explain validation errors of settings files in one line each.

At most 20 MB of UTF-8 (a byte order mark is allowed), 100 levels, 100 digits a number; no duplicate keys, no NaN, no Infinity.

Errors name the line or the key; validation errors also the value found and the values allowed.
"""

from __future__ import annotations

import json
import math
import re
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NoReturn, get_args

if TYPE_CHECKING:  # pydantic is slow to import, and processes that score cases do without
    from pydantic import BaseModel, ValidationError
    from pydantic.fields import FieldInfo

MAX_BYTES = 20_000_000
MAX_DEPTH = 100
MAX_DIGITS = 100
_TOKEN = re.compile(rf'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[{{]|[\]}}]|-?(?:NaN|Infinity)|\d{{{MAX_DIGITS + 1},}}', re.DOTALL)


class JsonRejected(ValueError):
    """Why a text is not JSON as we accept it, with the line or key."""


def parse(data: bytes) -> Any:
    """Parse a JSON document.

    Raises: JsonRejected when it is not strict JSON or exceeds the bounds; names line or key.
    """
    if len(data) > MAX_BYTES:
        raise JsonRejected(f"larger than {MAX_BYTES // 1_000_000} MB of JSON")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise JsonRejected(f"line {line}: not UTF-8 (byte 0x{data[error.start]:02x}); save the file with UTF-8 encoding") from None
    if not text.strip():
        raise JsonRejected("empty, no JSON in it")
    _scan(text)
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_float=_finite)
    except json.JSONDecodeError as error:
        raise JsonRejected(f"not valid JSON, line {error.lineno} column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise JsonRejected("JSON nested too deeply") from None


def _scan(text: str) -> None:
    """Reject deep nesting, long numbers and NaN before anything is built; names the line."""
    depth = 0

    def reject(position: int, what: str) -> NoReturn:
        raise JsonRejected(f"line {text.count(chr(10), 0, position) + 1}: {what}")

    for token in _TOKEN.finditer(text):
        kind = token[0][0]
        if kind == '"':
            continue
        if kind in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                reject(token.start(), f"JSON nested more than {MAX_DEPTH} levels deep")
        elif kind in "]}":
            depth -= 1
        elif token[0][-1].isdigit():
            reject(token.start(), f"a number of {len(token[0])} digits is not accepted in JSON")
        else:
            reject(token.start(), f"{token[0]} is not a JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise JsonRejected(f'duplicate key "{key[:80]}": it is given twice')
        found[key] = value
    return found


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise JsonRejected(f"the number {digits[:40]} is too large for JSON")
    return value


_LONGEST = 60
_SHOWN = str | int | float | bool | None


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Format all errors that pydantic found in a value for `model`, with the value found and the values allowed."""
    return "; ".join(_finding(item, model) for item in error.errors(include_url=False))


def _finding(item: Any, model: type[BaseModel]) -> str:
    """Format one error of pydantic."""
    loc = tuple(part for part in item["loc"] if part != "[key]")
    key = ".".join(map(str, loc)) or "the whole"
    owner = _owner(model, loc)
    seen = f" (found {shortened(repr(item['input']))})" if isinstance(item["input"], _SHOWN) else ""
    if item["type"] == "extra_forbidden":
        close = get_close_matches(str(loc[-1]), owner.model_fields, n=1) if owner is not None else []
        return f"{key}: unknown key{seen}{f'; did you mean {close[0]}?' if close else ''}"
    if item["type"] == "missing":
        return f"{key}: {item['msg']}"
    field = owner.model_fields.get(str(loc[-1])) if owner is not None and loc else None
    allowed = _allowed(field) if field is not None else ""
    return f"{key}: {item['msg'].removeprefix('Value error, ')}{seen}{f'; allowed: {allowed}' if allowed else ''}"


def shortened(text: str) -> str:
    """Truncate a text for a message."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else f"{value:g}"


def _owner(model: type[BaseModel], loc: tuple[str | int, ...]) -> type[BaseModel] | None:
    """Return the model that has the field named by the last part of `loc`; None where there is none."""
    owner: type[BaseModel] | None = model
    for part in loc[:-1]:
        if isinstance(part, int):
            continue
        if owner is None or part not in owner.model_fields:
            return None
        owner = _inside(owner.model_fields[part].annotation)
    return owner


def _inside(annotation: Any) -> type[BaseModel] | None:
    """Return the model in a field's annotation, directly or inside a tuple or union."""
    if isinstance(annotation, type) and hasattr(annotation, "model_fields"):
        return annotation
    return next((found for each in get_args(annotation) if (found := _inside(each)) is not None), None)


def _allowed(field: FieldInfo) -> str:
    """Format the bounds of a field, as in "32 to 2048, multiples of 32"; "" when it has none."""
    bounds: dict[str, Any] = {}
    for rule in field.metadata:
        bounds |= {name: value for name in ("ge", "gt", "le", "lt", "multiple_of") if (value := getattr(rule, name, None)) is not None}
    ends = [f"{_number(bounds['ge'])} or more"] if "ge" in bounds else [f"more than {_number(bounds['gt'])}"] if "gt" in bounds else []
    ends += [f"at most {_number(bounds['le'])}"] if "le" in bounds else [f"less than {_number(bounds['lt'])}"] if "lt" in bounds else []
    span = f"{_number(bounds['ge'])} to {_number(bounds['le'])}" if {"ge", "le"} <= set(bounds) else ", ".join(ends)
    steps = f"multiples of {_number(bounds['multiple_of'])}" if "multiple_of" in bounds else ""
    return ", ".join(part for part in (span, steps) if part)
