"""JSON as strangers may send it: bounded, unambiguous, and refused with a line or a key.

At most 20 MB of UTF-8 (a byte order mark is allowed), 100 levels, 100 digits a number; no duplicate keys, no NaN, no Infinity.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

MAX_BYTES = 20_000_000
MAX_DEPTH = 100
MAX_DIGITS = 100
_TOKEN = re.compile(rf'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[{{]|[\]}}]|-?(?:NaN|Infinity)|\d{{{MAX_DIGITS + 1},}}', re.DOTALL)


class Refused(ValueError):
    """Why a text is not JSON as we accept it, with the line or key."""


def parse(data: bytes) -> Any:
    """The value of a JSON document. Refused."""
    if len(data) > MAX_BYTES:
        raise Refused(f"larger than {MAX_BYTES // 1_000_000} MB of JSON")
    text = _decoded(data)
    if not text.strip():
        raise Refused("empty, no JSON in it")
    _scan(text)
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_float=_finite)
    except json.JSONDecodeError as error:
        raise Refused(f"not valid JSON, line {error.lineno} column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise Refused("JSON nested too deeply") from None


def dump(value: object, indent: int | None = 2) -> bytes:
    """Strict JSON: NaN and unknown types are a ValueError or TypeError. Ends with a line feed."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)
    return (text + "\n").encode("utf-8", "backslashreplace")  # lone surrogates become \udcxx, which JSON reads back


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise Refused(f"line {line}: not UTF-8 (byte 0x{data[error.start]:02x}); save the file with UTF-8 encoding") from None


def _scan(text: str) -> None:
    """Refuse depth, long numbers and NaN before anything is built, with the line."""
    depth = 0
    for token in _TOKEN.finditer(text):
        kind = token[0][0]
        if kind == '"':
            continue
        if kind in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                _refuse(text, token.start(), f"JSON nested more than {MAX_DEPTH} levels deep")
        elif kind in "]}":
            depth -= 1
        elif token[0][-1].isdigit():
            _refuse(text, token.start(), f"a number of {len(token[0])} digits is not accepted in JSON")
        else:
            _refuse(text, token.start(), f"{token[0]} is not a JSON number")


def _refuse(text: str, position: int, what: str) -> NoReturn:
    line = text.count("\n", 0, position) + 1
    raise Refused(f"line {line}: {what}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise Refused(f'duplicate key "{key[:80]}": it is given twice')
        found[key] = value
    return found


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise Refused(f"the number {digits[:40]} is too large for JSON")
    return value
