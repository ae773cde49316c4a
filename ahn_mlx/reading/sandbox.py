"""Chat templates are programs of strangers. jinja's sandbox keeps them from files and from Python;
here what they make and how often they go round is bounded, before it is made.

What a rendering may make is counted in characters, and a turn of a loop, a call and an item cost
as much time as some. So time and memory have one bound, which is the same on every machine.
"""

import re
import sys
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, wraps
from typing import Any

from jinja2 import TemplateRuntimeError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from mlx_lm.tokenizer_utils import TokenizerWrapper
from transformers.utils import chat_template_utils

# Characters that a rendering may make, and for each that it is given: whoever adds message after
# message to one text copies the first as often as there are others.
MOST, FOR_EACH = 1 << 26, 1 << 10
TURN, ITEM = 1 << 6, 1 << 3  # what costs as much
BITS = 1 << 13  # of a whole number
WIDEST = 1 << 16  # a number that says how wide something is to be

# Filters that look at an item or two; and those that make no text, however large items are.
_FREE = ("attr", "count", "d", "default", "first", "last", "length", "random")
_LIGHT = (
    *("batch", "dictsort", "float", "groupby", "int", "items", "list", "map", "max", "min"),
    *("reject", "rejectattr", "reverse", "round", "select", "selectattr", "slice", "sort", "sum"),
    "unique",
)
# Filters and methods that may say what they are given once for each sign of a text.
_TIMES = ("expandtabs", "indent", "tojson", "translate", "urlize", "wordwrap", "xmlattr")
_FORMATS = ("format", "format_map")
_MILLION = re.compile(r"%[^a-zA-Z%]*\d{6}|\{[^{}]*:[^{}]*\d{6}")
_ASKED = re.compile(r"%[^a-zA-Z%]*\*|\{[^{}]*:[^{}]*\{")  # a width that is among the values
# Those whose numbers are widths, or how many there are to be.
_WIDE = (
    *("batch", "center", "expandtabs", "indent", "ljust", "rjust", "round", "slice", "to_bytes"),
    *("tojson", "truncate", "urlize", "wordwrap", "zfill"),
)

_TEXTS = (str, bytes)
_VIEWS: Any = (type({}.keys()), type({}.values()), type({}.items()))
_HOLDERS = (list, tuple, set, frozenset, *_VIEWS)


def render(tokenizer: TokenizerWrapper, messages: list[dict[str, Any]], **options: Any) -> str:
    """What the chat template says of messages. Raises whatever the template's own code raises,
    and TemplateRuntimeError where it would do too much."""
    with bounded(messages, options):
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))


_LEFT: ContextVar[list[int] | None] = ContextVar("characters", default=None)


@contextmanager
def bounded(*given: Any) -> Iterator[None]:
    """All renderings within it have what one may make, if they are not within another."""
    if _LEFT.get() is not None:
        yield
        return
    before = _LEFT.set([MOST + FOR_EACH * _deep(given, MOST)])
    try:
        yield
    finally:
        _LEFT.reset(before)


def _left() -> list[int]:
    """Characters that are left, in a list of one. Other programs' templates are not ours."""
    left = _LEFT.get()
    return [sys.maxsize] if left is None else left


def _spend(characters: int) -> None:
    left = _left()
    left[0] -= characters
    if left[0] < 0:
        raise TemplateRuntimeError("it writes or loops without end")


def _afford(characters: int) -> None:
    """As _spend, of what is not made yet and will be paid for."""
    if characters > _left()[0]:
        raise TemplateRuntimeError("it writes or loops without end")


def _deep(value: Any, most: int) -> int:
    """Characters and items of a value, as often as it holds them; some number above `most` if
    there are more."""
    found, left = 0, [value]
    while left and found <= most:
        x: Any = left.pop()
        found += ITEM
        if isinstance(x, _TEXTS):
            found += len(x)
        elif isinstance(x, _HOLDERS):
            left.extend(x)
        elif isinstance(x, dict):
            left += [*x.keys(), *x.values()]
        elif isinstance(x, int):
            found += x.bit_length() // 3
        elif isinstance(x, Namespace):
            left.append(x._Namespace__attrs)
    return found


def _size(value: Any) -> int:
    """Of a value that was made: its own characters or items."""
    if isinstance(value, _TEXTS):
        return len(value) + ITEM
    return ITEM * (len(value) + 1) if isinstance(value, Sized) else ITEM


def _whole(value: Any) -> Any:
    """Pay for a value and for all that is in it."""
    _spend(_deep(value, _left()[0]))
    return value


def _made(value: Any) -> Any:
    _spend(_size(value))
    return value


def _joined(values: list[Any]) -> str:
    """Of the operator ~."""
    _whole(values)
    return "".join(map(str, values))


class _Counted:
    """What a loop goes over. weight: characters that stand in the loop."""

    def __init__(self, items: Any, weight: int):
        self.items, self.cost = items, max(weight, 0) + TURN

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Any]:
        for item in self.items:
            _spend(self.cost)
            yield item


def _check(name: str, text: Any, args: tuple[Any, ...]) -> None:
    """What a filter or a method of texts will make can be paid for."""
    numbers = [abs(x) for x in args if isinstance(x, int)]
    if name in _WIDE and any(x > WIDEST for x in numbers):
        raise TemplateRuntimeError(f"it asks for {max(numbers):.3g} characters")
    if name in _FORMATS:
        text = str(text)
        if _MILLION.search(text) or (_ASKED.search(text) and _largest(args) > WIDEST):
            raise TemplateRuntimeError("it asks for a million characters")
    most = _left()[0]
    size, more = _deep(text, most), _deep(args, most)
    if name == "replace" and len(args) > 1:
        old, new = str(args[0]), str(args[1])
        size += str(text).count(old) * len(new) if size <= most else 0
    elif name == "join":
        size += more + _size(text) * max(map(_size, args), default=0)
    elif name in _FORMATS:
        size *= more + (_largest(args) if _ASKED.search(text) else 0)
    elif name in _TIMES:
        size *= TURN * (more + sum(numbers))  # they take long
    else:
        size += more
    _afford(size)


def _largest(values: Any) -> int:
    """The largest whole number of some values."""
    numbers = (_largest(x) if isinstance(x, tuple) else x for x in values)
    return max((abs(x) for x in numbers if isinstance(x, int)), default=0)


@lru_cache(128)  # jinja's own are the same in every environment
def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that is paid for."""
    first = hasattr(function, "jinja_pass_arg")  # before the value there is jinja's own

    @wraps(function)
    def guarded(*args: Any, **named: Any) -> Any:
        value, rest = args[first], (*args[first + 1 :], *named.values())
        if name == "join" and not hasattr(value, "__len__"):
            value = list(value)
            args = (*args[:first], value, *args[first + 1 :])
        if name in _WIDE or name not in (*_FREE, *_LIGHT):
            _check(name, value, rest)
        elif name in _LIGHT:
            _made(value)
        found = function(*args, **named)
        return found if name in _FREE else _made(found)

    return guarded


class _Filters(dict[str, Callable[..., Any]]):
    def __setitem__(self, name: str, function: Callable[..., Any]) -> None:
        super().__setitem__(name, _guarded(name, function))


class Bounded(ImmutableSandboxedEnvironment):
    """jinja's sandbox, in which all that a template makes is paid for."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        filters, self.filters = self.filters, _Filters()
        for name, function in filters.items():
            self.filters[name] = function
        for own in (_whole, _made, _joined):
            dict.__setitem__(self.filters, own.__name__, own)
        dict.__setitem__(self.filters, "_counted", _Counted)
        del self.globals["lipsum"]
        self.finalize = _whole

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """What makes values or goes round and asks no one is led through a filter."""
        return _led(super()._parse(source, name, filename))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        whole = isinstance(left, int) and isinstance(right, int)
        if whole and operator in ("*", "**"):
            bits = left.bit_length()
            if (bits * max(right, 0) if operator == "**" else bits + right.bit_length()) > BITS:
                raise TemplateRuntimeError("it makes a number without end")
        elif operator == "*":
            times, item = (left, right) if isinstance(left, int) else (right, left)
            _spend(_deep(item, _left()[0]) * max(times, 1) if isinstance(times, int) else 1)
        elif operator == "%" and isinstance(left, str | bytes):
            _check("format", left, (right,))
        elif operator == "+":
            _afford(_size(left) + _size(right))
        return _made(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __called: Any, *args: Any, **named: Any) -> Any:
        name = getattr(__called, "__name__", "")
        of = getattr(getattr(__called, "__wrapped__", __called), "__self__", None)
        values = (*args, *named.values())
        if isinstance(of, str | bytes | int):
            if name == "join" and args and not hasattr(args[0], "__len__"):
                args = values = (list(args[0]),)
            joined = name == "join" and len(args) == 1
            _check(name, *((args[0], (of,)) if joined else (of, values)))
        _spend(TURN + sum(map(_size, values)))  # a recursive loop goes over what it is called with
        return _made(super().call(__context, __called, *args, **named))


def _led(node: nodes.Node) -> Any:
    """The same program, with filters around loops' items, lists, slices and what ~ joins."""
    for name, value in node.iter_fields():
        if isinstance(value, nodes.Node):
            setattr(node, name, _led(value))
        elif isinstance(value, list):
            setattr(node, name, [_led(x) if isinstance(x, nodes.Node) else x for x in value])
    if isinstance(node, nodes.For):
        weight = sum(len(x.data) for x in node.find_all(nodes.TemplateData))
        node.iter = _filter("_counted", node.iter, nodes.Const(weight))
    elif isinstance(node, nodes.Test):
        node.args = [_filter("_made", x) for x in node.args or ()]
    elif isinstance(node, nodes.Concat):
        parts = nodes.List(node.nodes, lineno=node.lineno, environment=node.environment)
        return _filter("_joined", parts)
    elif isinstance(node, nodes.Compare):
        for compared in node.ops:
            compared.expr = _filter("_made", compared.expr)
    elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        return _filter("_made", node)
    elif isinstance(node, nodes.List | nodes.Dict) or (
        isinstance(node, nodes.Tuple) and node.ctx == "load"
    ):
        return _filter("_whole", node)
    return node


def _filter(name: str, of: Any, *args: nodes.Expr) -> nodes.Filter:
    made = nodes.Filter(of, name, list(args), [], None, None)
    made.set_environment(of.environment)
    return made


# Where transformers takes the sandbox from, of whatever template.
chat_template_utils.ImmutableSandboxedEnvironment = Bounded  # type: ignore[misc]
