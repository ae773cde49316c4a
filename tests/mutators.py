"""The small faults that tests/mutants.py puts into a module: what each replaces, and by what.

Left alone is what no test should pin down: annotations, docstrings, decorators, `__all__`, the
words of messages, what only a type checker runs, and whether zip() would see that lists are not as
long as each other.
"""

import ast
from collections.abc import Iterator
from typing import NamedTuple

COMPARED: dict[type[ast.cmpop], str] = {
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.Is: "is not",
    ast.IsNot: "is",
    ast.In: "not in",
    ast.NotIn: "in",
}
COMPUTED: dict[type[ast.operator], str] = {
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "/",
    ast.Div: "*",
    ast.FloorDiv: "*",
    ast.Mod: "+",
    ast.Pow: "*",
    ast.BitOr: "&",
    ast.BitAnd: "|",
    ast.LShift: ">>",
    ast.RShift: "<<",
}
NAMES = {
    "float32": "bfloat16",
    "bfloat16": "float32",
    "min": "max",
    "max": "min",
    "minimum": "maximum",
    "maximum": "minimum",
    "any": "all",
    "all": "any",
    "add": "discard",
    "append": "count",
}
# What a person reads.
SAID = {"AHNError", "note", "warn", "warning", "print", "echo", "info", "debug", "tqdm"}


class Mutant(NamedTuple):
    """lines: first and last that the fault is on, from 1. original and broken: those lines whole,
    as they were and as they become."""

    lines: tuple[int, int]
    original: str
    broken: str

    def __str__(self) -> str:
        before, after = (" ".join(part.split()) for part in (self.original, self.broken))
        return f"{before} => {after}"


def mutants(source: str) -> list[Mutant]:
    """All of them, in the order of the lines."""
    lines = [line.encode() for line in source.splitlines(keepends=True)]
    found: dict[Mutant, None] = {}
    for node, text in _faults(ast.parse(source), lines):
        first, last = node.lineno, node.end_lineno
        before = b"".join(lines[first - 1 : last])
        end = len(before) - len(lines[last - 1]) + node.end_col_offset
        broken = before[: node.col_offset] + text.encode() + before[end:]
        if broken != before:
            found[Mutant((first, last), before.decode(), broken.decode())] = None
    return sorted(found, key=lambda m: m.lines)


def _faults(tree: ast.AST, source: list[bytes]) -> Iterator[tuple[ast.AST, str]]:
    """Nodes and what they become; source: its lines."""
    for node in _alive(tree):
        yield from ((node, text) for text in _instead(node, source))
        if isinstance(node, ast.Call) and not _zips(node):
            for keyword in node.keywords:
                if keyword.arg and len(node.args) + len(node.keywords) > 0:
                    yield node, _without(node, keyword, source)


def _alive(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that a fault may be put on."""
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_comment"):
            continue
        if name == "keywords" and _zips(node):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not _dead(child):
                yield from _alive(child)


def _zips(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and getattr(node.func, "id", "") == "zip"


def _dead(node: ast.AST) -> bool:
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant) or _says(node.value)
    if isinstance(node, ast.Call):
        return _says(node)
    if isinstance(node, ast.If):
        return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    if isinstance(node, ast.Assign | ast.AnnAssign):
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        return isinstance(target, ast.Name) and target.id == "__all__"
    return isinstance(node, ast.Import | ast.ImportFrom | ast.Assert | ast.JoinedStr)


def _says(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    name = getattr(node.func, "id", getattr(node.func, "attr", ""))
    return name in SAID or name.endswith("Error")


def _instead(node: ast.AST, source: list[bytes]) -> Iterator[str]:
    """What this one node may become."""
    if not hasattr(node, "lineno"):
        return
    match node:
        case ast.Compare(left=left, ops=[op], comparators=[right]):
            yield f"{_of(left, source)} {COMPARED[type(op)]} {_of(right, source)}"
        case ast.BinOp(left=left, op=op, right=right) if type(op) in COMPUTED:
            yield f"({_of(left, source)} {COMPUTED[type(op)]} {_of(right, source)})"
        case ast.BoolOp(op=op, values=[first, *rest]):
            other = " or " if isinstance(op, ast.And) else " and "
            yield f"({other.join(_of(part, source) for part in [first, *rest])})"
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield _of(operand, source)
        case ast.Constant(value=bool(value)):
            yield str(not value)
        case ast.Constant(value=int(value)):
            yield from (str(value + 1), *([str(value - 1)] if value > 1 else []))
        case ast.Constant(value=float(value)):
            yield repr(2 * value) if value else "1.0"
        case ast.Name(id=name, ctx=ast.Load()) if name in NAMES:
            yield NAMES[name]
        case ast.Attribute(value=value, attr=name, ctx=ast.Load()) if name in NAMES:
            yield f"{_of(value, source)}.{NAMES[name]}"
        case ast.Subscript(value=value, slice=ast.Constant(value=str(key))):
            yield f"{_of(value, source)}[{key + '_'!r}]"
        case ast.Slice(lower=lower, upper=upper, step=None):
            if lower is not None:
                yield f":{_of(upper, source)}" if upper else ":"
            if upper is not None:
                yield f"{_of(lower, source)}:" if lower else ":"
        case ast.IfExp(body=body, orelse=orelse):
            yield f"({_of(body, source)})"
            yield f"({_of(orelse, source)})"
        case ast.Raise() | ast.AugAssign() | ast.Delete() | ast.Expr():
            yield "pass"
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield "pass"
        case ast.Break():
            yield "continue"
        case ast.Continue():
            yield "break"


def _without(call: ast.Call, keyword: ast.keyword, source: list[bytes]) -> str:
    """The call, but for one argument by name."""
    parts = [_of(part, source) for part in call.args]
    parts += [_of(other, source) for other in call.keywords if other is not keyword]
    return f"{_of(call.func, source)}({', '.join(parts)})"


def _of(node: ast.AST, source: list[bytes]) -> str:
    """Its text; brackets around it are not part of a node."""
    lines = source[node.lineno - 1 : node.end_lineno]
    lines[-1] = lines[-1][: node.end_col_offset]
    lines[0] = lines[0][node.col_offset :]
    text = b"".join(lines).decode()
    loose = ast.BinOp | ast.BoolOp | ast.Compare | ast.IfExp | ast.NamedExpr | ast.UnaryOp
    return f"({text})" if isinstance(node, loose | ast.Lambda) else text
