"""An answer taken apart while it comes: thoughts, words, and calls of tools, as mlx-lm knows
them of the tokenizer."""

import json
import secrets
from typing import Any, NamedTuple

from mlx_lm.tokenizer_utils import TokenizerWrapper

from .sampling import begun


class Part(NamedTuple):
    """kind: "content", "reasoning", or "call", whose text is JSON of name and arguments."""

    kind: str
    text: str
    call: dict[str, Any] | None = None


class Parts:
    """thinking: the answer begins inside of a thought. tools: that may be called."""

    def __init__(
        self, tokenizer: TokenizerWrapper, tools: list[dict[str, Any]], thinking: bool = False
    ):
        self._tokenizer, self._tools = tokenizer, tools
        self._kind = "reasoning" if thinking else "content"
        self._held = ""
        self._call = ""

    def __call__(self, text: str, last: bool = False) -> list[Part]:
        """What is certain of the answer after more text."""
        self._held += text
        parts: list[Part] = []
        while self._held:
            marks = self._marks()
            found = [(at, m) for m in marks if (at := self._held.find(m)) >= 0]
            if not found:
                keep = 0 if last else begun(self._held, tuple(marks))
                self._say(parts, self._held[: len(self._held) - keep])
                self._held = self._held[len(self._held) - keep :]
                break
            at, mark = min(found)
            self._say(parts, self._held[:at])
            self._held = self._held[at + len(mark) :]
            self._turn(parts, marks[mark])
        if last and self._kind == "call":
            self._turn(parts, "content")
        return parts

    def _marks(self) -> dict[str, str]:
        """What may come, and what comes after it."""
        t = self._tokenizer
        if self._kind == "reasoning":
            return {t.think_end: "content"}
        if self._kind == "call":
            return {t.tool_call_end: "content"} if t.tool_call_end else {}
        marks = {t.think_start: "reasoning"} if t.has_thinking else {}
        if self._tools and t.has_tool_calling:
            marks[t.tool_call_start] = "call"
        return marks

    def _say(self, parts: list[Part], text: str) -> None:
        if self._kind == "call":
            self._call += text
        elif text:
            parts.append(Part(self._kind, text))

    def _turn(self, parts: list[Part], kind: str) -> None:
        if self._kind == "call":
            parts += self._calls(self._call)
            self._call = ""
        self._kind = kind

    def _calls(self, text: str) -> list[Part]:
        """Calls that a text is, or the text, if it is none."""
        try:
            found = self._tokenizer.tool_parser(text, self._tools)
            calls = [_call(c) for c in (found if isinstance(found, list) else [found])]
        except Exception:  # a model writes anything, and parsers raise anything
            start, end = self._tokenizer.tool_call_start, self._tokenizer.tool_call_end
            return [Part("content", f"{start}{text}{end}")]
        return [Part("call", "", call) for call in calls]


def _call(found: dict[str, Any]) -> dict[str, Any]:
    """As OpenAI has it. Raises for what is no call."""
    arguments = found.get("arguments", {})
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    function = {"name": str(found["name"]), "arguments": text}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
