"""Type-check a kernel with Metal's rules, without running it."""

import re
import subprocess
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from .capture import Generated, KernelSpec, Template, capture
from .errors import KernelError
from .source import checkable
from .toolchain import NATIVE, find_clang, why_no_clang

_FLAGS = [
    *("-x", "c++", "-std=c++17", "-fsyntax-only", "-nostdinc", "-nostdinc++"),
    *("--target=x86_64-linux-gnu", "-fno-color-diagnostics", "-ferror-limit=20"),
    *("-Xclang", "-cl-single-precision-constant", "-Wimplicit-float-conversion"),
    *("-Wno-unknown-attributes", "-Wno-ignored-attributes", "-Wno-duplicate-decl-specifier"),
    *("-Werror=return-type", "-Werror=uninitialized", "-Werror=vla"),
    *("-Xclang", "-ast-dump"),
]
_LOCATION = re.compile(r"(?:line|(?P<file>[^\s<>,:]+)):(?P<line>\d+):\d+")
_DECLARATION = re.compile(r"\b(?:Parm)?VarDecl 0x\w+ .*?'(?P<type>[^']*[*&])'")


def strict_check(
    spec: KernelSpec,
    inputs: Sequence[Any],
    template: Template | None = None,
    *,
    output_dtypes: Sequence[mx.Dtype],
    small: Sequence[str] = (),
) -> None:
    """Compile a kernel as it would be generated for these inputs; KernelError if Metal would not.

    small: names of inputs that may have fewer than 8 elements. MLX passes those as `constant`
    instead of `device`, which is another kernel: it is checked too.
    """
    variants = [list(inputs)]
    if small:
        variants.append(
            [
                mx.zeros((1,) * x.ndim, x.dtype) if name in small and isinstance(x, mx.array) else x
                for name, x in zip(spec.input_names, inputs, strict=True)
            ]
        )
    for variant in variants:
        generated = capture(spec, variant, template, output_dtypes)
        problems = diagnose(spec.name, generated)
        if problems:
            raise KernelError(f"{spec.name} is not valid Metal:\n" + "\n".join(problems))


def diagnose(kernel: str, generated: Generated) -> list[str]:
    """What Metal's compiler would reject, best effort; empty when all is well."""
    clang = find_clang()
    if clang is None:
        raise KernelError(why_no_clang())
    code = checkable(kernel, generated)
    folders = [f"-isystem{NATIVE / d}" for d in ("strict", "stubs")] + [f"-I{NATIVE}"]
    done = subprocess.run(
        [*clang, *_FLAGS, *folders, "-"], input=code, capture_output=True, text=True, timeout=120
    )
    if done.returncode:
        return [done.stderr[-6000:].strip()]
    # Rules of Metal that clang's C++ does not have.
    found = [
        line
        for line in done.stderr.splitlines()
        if re.search(r"loses floating-point precision.* to '[^']*(__bf16|bfloat)", line)
    ]
    found += _syntax_tree_rules(kernel, code, done.stdout)
    return list(dict.fromkeys(found))


def _syntax_tree_rules(kernel: str, code: str, tree: str) -> list[str]:
    texts = _parts(kernel, code)
    found = []
    file, line = "", 0
    for node in tree.splitlines():
        # The tree names a file or line only where it differs from the one before.
        for m in _LOCATION.finditer(node.split(" '", 1)[0]):
            if m["file"]:
                file = m["file"]
            line = int(m["line"])
        if file not in texts:
            continue
        where = f"{file}:{line}"
        if "CStyleCastExpr" in node and "<AddressSpaceConversion>" in node:
            found.append(f"{where}: cast between address spaces")
        declared = _DECLARATION.search(node)
        if declared and not re.search(r"__(global|local|constant)|\(|auto", declared["type"]):
            name = re.search(r"(\w+) '", node)
            if name and not _says_thread(texts[file], line, name[1]):
                found.append(
                    f"{where}: pointer or reference without an address space: "
                    f"{declared['type']} {name[1]} (say `thread`)"
                )
    return found


def _parts(kernel: str, code: str) -> dict[str, list[str]]:
    """Lines of the header and of the source, as clang counts them."""
    parts: dict[str, list[str]] = {}
    current: list[str] = []
    for line in code.split("\n"):
        m = re.match(r'#line 1 "(.*)"', line)
        if m:
            current = parts.setdefault(m[1], [])
        else:
            current.append(line)
    return {f: parts[f] for f in (kernel, f"{kernel}.header")}


def _says_thread(lines: list[str], line: int, name: str) -> bool:
    """Whether the declaration of `name` that ends on `line` carries `thread` or `auto`."""
    text = " ".join(lines[max(0, line - 4) : line])
    ends = [m.start() for m in re.finditer(rf"\b{name}\b", text)]
    for end in ends:
        start = max(text.rfind(c, 0, end) for c in ";{}(,")
        if re.search(r"\b(thread|auto)\b", text[start + 1 : end]):
            return True
    return False
