"""From MLX's text to a C++ translation unit.

One rewrite only: a variable in threadgroup memory becomes a reference into the emulator's
arena (or, for the strict compiler, a static). Pointers and parameters stay as they are.
"""

import re

from .capture import Argument, Generated
from .errors import KernelError

_TOKEN = re.compile(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\])*\"|[A-Za-z_]\w*|.", re.S)

# Thread attributes that are not a field of emu::Attributes of the same name.
_SCALARS = {
    "dispatch_quadgroups_per_threadgroup": "(t->dispatch_simdgroups * 8)",
    "dispatch_simdgroups_per_threadgroup": "t->dispatch_simdgroups",
    "quadgroup_index_in_threadgroup": "(t->thread_index_in_threadgroup / 4)",
    "quadgroups_per_threadgroup": "(t->simdgroups * 8)",
    "simdgroup_index_in_threadgroup": "t->simdgroup_index",
    "simdgroups_per_threadgroup": "t->simdgroups",
    "thread_execution_width": "32u",
    "thread_index_in_quadgroup": "(t->lane % 4)",
    "thread_index_in_simdgroup": "t->lane",
    "thread_index_in_threadgroup": "t->thread_index_in_threadgroup",
    "threads_per_simdgroup": "32u",
}
_VECTORS = {"grid_size": "threads_per_grid"}


def rewrite_threadgroup_variables(kernel: str, body: str, strict: bool) -> str:
    """Replace definitions of threadgroup variables; line numbers stay."""
    tokens = _TOKEN.findall(body)
    out: list[str] = []
    depth = variables = i = 0
    while i < len(tokens):
        token = tokens[i]
        depth += (token == "(") - (token == ")")
        if token == "threadgroup" and depth == 0:
            end = tokens.index(";", i) if ";" in tokens[i:] else len(tokens)
            statement = "".join(t for t in tokens[i + 1 : end] if not t.startswith(("//", "/*")))
            outside = re.sub(r"\[[^\]]*\]", "", statement)
            if "=" in outside and not re.search(r"[*&(]", outside):
                raise KernelError(f"{kernel}: threadgroup variable with an initialiser:{statement}")
            if not re.search(r"[*&(=]", outside):
                type_, names = _declarators(statement)
                for name, dims in names:
                    if strict:
                        out.append(f"static threadgroup {type_} {name}{dims};")
                    else:
                        out.append(f"EMU_THREADGROUP({variables}, {name}, {dims}, {type_});")
                    variables += 1
                out.append("\n" * "".join(tokens[i:end]).count("\n"))
                i = end + 1
                continue
        out.append(token)
        i += 1
    return "".join(out)


def _declarators(statement: str) -> tuple[str, list[tuple[str, str]]]:
    """`vec<float, 4> a[2][3], b` -> type and (name, dimensions) of each variable."""
    parts = [""]
    depth = 0
    for c in statement:
        depth += (c in "<([{") - (c in ">)]}")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    declarator = re.compile(r"\s*(.*?)([A-Za-z_]\w*)\s*((?:\[[^\]]*\]\s*)*)\s*", re.S)
    names = []
    type_ = ""
    for n, part in enumerate(parts):
        m = declarator.fullmatch(part)
        if not m:
            raise KernelError(f"cannot read the threadgroup variable `{statement.strip()}`")
        if n == 0:
            type_ = m[1].strip()
        names.append((m[2], m[3].strip()))
    return type_, names


def _value(n: int, a: Argument) -> str:
    if a.is_buffer:
        return f"{'*' if a.is_reference else ''}({a.type}*)args[{n}]"
    if a.name in _SCALARS:
        return _SCALARS[a.name]
    field = _VECTORS.get(a.name, a.name)
    if field == "grid_origin":
        return "uint3(0)"
    return f"uint3(t->{field}[0], t->{field}[1], t->{field}[2])"


def _text(kernel: str, g: Generated, strict: bool) -> list[str]:
    body = rewrite_threadgroup_variables(kernel, g.body, strict)
    return [
        "#include <metal_stdlib>",
        '#include "mlx_preamble.h"',
        f'#line 1 "{kernel}.header"',
        g.header,
        f'#line 1 "{kernel}.signature"',
        f'{g.signature}#line 1 "{kernel}"',
        body,
        "}",
    ]


def executable(kernel: str, g: Generated) -> str:
    """C++ with an entry point for the runtime."""
    values = ", ".join(_value(n, a) for n, a in enumerate(g.arguments))
    return "\n".join(
        [
            *_text(kernel, g, strict=False),
            'extern "C" void emu_entry(void** args, const emu::Attributes* t) {',
            f"  {g.function}({values});",
            "}",
            "",
        ]
    )


def checkable(kernel: str, g: Generated) -> str:
    """C++ for the strict compiler; taking the address instantiates a template."""
    return "\n".join([*_text(kernel, g, strict=True), f"auto emu_use = &{g.function};", ""])
