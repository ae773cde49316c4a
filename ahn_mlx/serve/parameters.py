"""What a request may say: one table of names, types and bounds for each endpoint.

A body comes from anyone. What is not in the table is refused by name, and what is null is
absent, as clients mean it.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAX_DEPTH = 64


class APIError(Exception):
    """What the client is told. param: the parameter at fault. after: seconds to wait."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        after: int | None = None,
    ):
        super().__init__(message)
        self.message, self.status, self.param = message, status, param
        self.code, self.after = code, after


@dataclass(frozen=True)
class Field:
    """kind: of JSON ("integer", "number", "boolean", "string", "array", "object", "any").
    low, high: of a number, or of the length of a string or array. choices: all that is allowed.
    """

    kind: str
    default: Any = None
    low: float | None = None
    high: float | None = None
    choices: tuple[Any, ...] | None = None
    required: bool = False
    note: str = ""

    def schema(self) -> dict[str, Any]:
        """As JSON Schema."""
        kinds = {"any": {}, "text or array": {"type": ["string", "array", "null"]}}
        found: dict[str, Any] = dict(kinds.get(self.kind, {"type": [self.kind, "null"]}))
        if self.required and "type" in found:
            found["type"] = [k for k in found["type"] if k != "null"]
        names = {"integer": ("minimum", "maximum"), "number": ("minimum", "maximum")}
        names |= {"string": ("minLength", "maxLength"), "array": ("minItems", "maxItems")}
        for name, bound in zip(names.get(self.kind, ()), (self.low, self.high), strict=False):
            if bound is not None:
                found[name] = bound
        if self.choices is not None:
            found["enum"] = [*self.choices] if self.required else [*self.choices, None]
        if self.note:
            found["description"] = self.note
        return found


Table = Mapping[str, Field]

_IS = {
    "integer": lambda v: type(v) is int or (type(v) is float and v.is_integer()),
    # Not math.isfinite(), which fails for a whole number of 400 digits.
    "number": lambda v: type(v) in (int, float) and abs(v) < math.inf,
    "boolean": lambda v: type(v) is bool,
    "string": lambda v: type(v) is str,
    "array": lambda v: type(v) is list,
    "object": lambda v: type(v) is dict,
    "any": lambda v: True,
    "text or array": lambda v: type(v) in (str, list),
}


def parse_json(data: bytes) -> dict[str, Any]:
    """The object that a body is. Raises APIError for anything else."""
    try:
        value = plain_json(data.decode())
    except UnicodeError:
        raise APIError("the body is not UTF-8 text") from None
    except RecursionError:
        raise APIError(f"the body is nested deeper than {MAX_DEPTH}") from None
    except ValueError as e:
        raise APIError(f"the body is not JSON ({e})") from None
    if not isinstance(value, dict):
        raise APIError("the body must be a JSON object")
    return value


def plain_json(text: str) -> Any:
    """A value that can be written again: of bounded depth, without endless numbers and halves of
    characters. Raises ValueError, or RecursionError."""
    value = json.loads(text, parse_constant=_no_number, parse_float=_finite)
    _check_tree(value)
    return value


def _no_number(name: str) -> Any:
    raise ValueError(f"{name[:20]} is no number")


def _finite(text: str) -> float:
    return value if math.isfinite(value := float(text)) else _no_number(text)


def _check_tree(value: Any) -> None:
    """Bounded depth, and strings that can be written again (no half of a surrogate pair)."""
    level, depth = [value], 0
    while level:
        if depth > MAX_DEPTH:
            raise RecursionError
        depth += 1
        following: list[Any] = []
        for item in level:
            if isinstance(item, str):
                if not item.isascii():
                    item.encode()
            elif isinstance(item, list):
                following += item
            elif isinstance(item, dict):
                following += item.keys()
                following += item.values()
        level = following


def parse(body: Mapping[str, Any], table: Table, where: str = "") -> dict[str, Any]:
    """All parameters of a table, with defaults. Raises APIError that names the one at fault."""
    for name, value in body.items():
        if name not in table and value is not None:
            raise APIError(
                f"{where}{name[:100]!r} is not supported", param=name[:100], code="unsupported"
            )
    found = {}
    for name, field in table.items():
        value = body.get(name)
        if value is None:
            if field.required:
                raise APIError(f"{where}{name!r} is required", param=name, code="missing")
            found[name] = field.default
        else:
            found[name] = check(value, field, f"{where}{name}", name)
    return found


def check(value: Any, field: Field, what: str, param: str) -> Any:
    """A value of the field's type and within its bounds."""
    if not _IS[field.kind](value):
        kind = "a string or an array" if field.kind == "text or array" else f"of type {field.kind}"
        raise APIError(f"{what} must be {kind}", param=param, code="invalid_type")
    if field.kind == "integer":
        value = int(value)
    size = value if field.kind in ("integer", "number") else None
    if field.kind in ("string", "array", "text or array", "object"):
        size = len(value)
    if size is not None:
        of = "" if field.kind in ("integer", "number") else "the length of "
        if field.low is not None and size < field.low:
            raise APIError(f"{of}{what} must be at least {field.low:,}", param=param)
        if field.high is not None and size > field.high:
            raise APIError(f"{of}{what} must be at most {field.high:,}", param=param)
    if field.choices is not None and value not in field.choices:
        allowed = ", ".join(map(repr, field.choices))
        raise APIError(f"{what} must be one of {allowed}", param=param, code="unsupported")
    return value
