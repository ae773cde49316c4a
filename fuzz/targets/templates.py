"""Chat templates and tokenizers, which are programs and tables of strangers."""

import contextlib
import json
import shutil
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from checkpoints import CHATML, byte_tokenizer, chat_tokenizer
from serving import TOOLS

from ahn_mlx.apps.tokenizer import PATTERNS, NoTable, pack_tokenizer
from ahn_mlx.checkpoints.tokenizer import load_tokenizer
from ahn_mlx.reading import sandbox, template
from ahn_mlx.reading.template import Template
from ahn_mlx.reading.tokens import Encoder, check_ids

from ..mutate import of_json
from ..oracle import Target, also

# Characters that a template may make, a number wherever it is; here it is small, so that many
# templates are tried.
MOST = 1 << 20
JINJA = (
    *(
        "{% for m in messages %}",
        "{% endfor %}",
        "{% if ",
        "{% endif %}",
        "{{ m.content }}",
        "{%- ",
    ),
    *("{{ m.role }}", "add_generation_prompt", "loop.first", "loop.last", "loop.index0 % 2", "-%}"),
    *("raise_exception('x')", "strftime_now('%S')", "tojson", "| trim", "namespace(x=1)", "range("),
    *(
        "{% set x = ",
        "{% macro f() %}",
        "{% endmacro %}",
        "{% include 'x' %}",
        "{% import 'x' as y %}",
    ),
    *("''.__class__.__mro__", "self.__init__.__globals__", "cycler.__init__", "lipsum", "| attr("),
    *(
        "999999999",
        "* 99999",
        "bos_token",
        "eos_token",
        "messages[0]['content']",
        "~",
        "is defined",
    ),
    *("{% generation %}", "tools", "documents", "{% break %}", "{% continue %}", "|e", "\\n"),
)


@cache
def _tokenizer() -> Any:
    return chat_tokenizer()


def _template(data: bytes, place: Path) -> str:
    return data.decode("utf-8", "replace")


def _take_apart(text: str, place: Path, out: Path) -> None:
    tokenizer = _tokenizer()
    tokenizer._tokenizer.chat_template = text
    tokenizer.has_chat_template = bool(text)
    with patch.object(sandbox, "MOST", MOST):
        found = Template(tokenizer, "Be brief." if len(text) % 2 else "")
    json.dumps(found.facts())
    for turn in ("start", "read", "answered", "cut"):
        with contextlib.suppress(template.TemplateError):
            found.opening(turn)
            Encoder(tokenizer)(*found.question(turn, "Why?"))
    found.begin(" x ")
    found.end(" x ")


def written() -> list[bytes]:
    plain = "{% for m in messages %}{{ m.content }}{% endfor %}"
    listed = "{% for m in messages %}{{ m.content[0].text }}{% endfor %}{{ bos_token }}"
    llama = (
        "{% if messages[0].role == 'system' %}<<SYS>>{{ messages[0].content | trim }}"
        "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns') }}"
        "{% endif %}[{{ m.role }}]{{ m.content | trim }}{% endfor %}"
        "{% if add_generation_prompt %}[answer]<think>{% endif %}"
    )
    return [x.encode() for x in (CHATML, TOOLS, plain, listed, llama, plain + "{{ 1/0 }}")]


FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model"),
    *("config.json", "chat_template.jinja"),
)
TABLES = (
    *("version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer", "model"),
    *("post_processor", "decoder", "type", "BPE", "ByteLevel", "Sequence", "Split", "Regex", "NFC"),
    *("WordPiece", "Unigram", "vocab", "merges", "unk_token", "ignore_merges", "byte_fallback"),
    *("add_prefix_space", "use_regex", "special", "normalized", "content", "id", "eos_token"),
    *("tokenizer_class", "PreTrainedTokenizerFast", "LlamaTokenizer", "chat_template", "auto_map"),
    *("model_max_length", "bos_token", "trust_remote_code", "tokenizer_file", "tool_parser_type"),
)


def _directory(data: bytes, place: Path) -> Path:
    """JSON has files by name, as objects or texts; M: a tokenizer.model."""
    path = place / "model"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    if data.startswith(b"M"):
        (path / "tokenizer.model").write_bytes(data[1:])
        return path
    try:
        given = json.loads(data)
        for name in FILES:
            if name in given:
                value = given[name]
                text = value if isinstance(value, str) else json.dumps(value)
                (path / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    except (ValueError, TypeError, RecursionError):
        (path / "tokenizer.json").write_bytes(data)
    return path


def _load(path: Path, place: Path, out: Path) -> None:
    tokenizer = load_tokenizer(path, {"eos_token_id": [3]})
    encoder = Encoder(tokenizer)
    ids = encoder("", "It is 42 \u00e9\n")
    tokenizer.decode(ids)
    with also():
        check_ids(ids, SimpleNamespace(args=SimpleNamespace(vocab_size=256)))  # type: ignore[arg-type]
    for token in list(encoder.controls.values())[:2]:
        with also():  # in what a user says it is text, and no token
            scaffolding = f" {token.content} \n"
            said = [encoder(scaffolding, *more) for more in ((), (f"It {token.content} is",))]
            first, second = ([i for i in ids if i in encoder.controls] for ids in said)
            assert first == second, f"{token.content!r}: {first} {second}"
    with contextlib.suppress(NoTable):
        pack_tokenizer(tokenizer)


@cache
def _small() -> dict[str, Any]:
    """The tables of bytes, with some merges and tokens that are added."""
    import tempfile

    path = byte_tokenizer(Path(tempfile.mkdtemp()) / "tokenizer")
    table = json.loads((path / "tokenizer.json").read_text())
    table["model"]["merges"] = [["a", "b"]]
    table["model"]["vocab"]["ab"] = 256
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    table["added_tokens"] = [{"id": 257, "content": "<|end|>", "special": True, **added}]
    config = json.loads((path / "tokenizer_config.json").read_text())
    return {"tokenizer.json": table, "tokenizer_config.json": {**config, "eos_token": "<|end|>"}}


def tables() -> list[bytes]:
    """Of bytes, with and without merges; of other kinds, most of which no app reads."""
    small = _small()
    few = json.loads(json.dumps(small))
    few["tokenizer.json"]["model"]["vocab"] = {"a": 0, "b": 1, "ab": 2, "\u0120": 3}
    found = [small, few]

    def other(**parts: Any) -> dict[str, Any]:
        made: dict[str, Any] = json.loads(json.dumps(few))
        made["tokenizer.json"] |= parts
        found.append(made)
        return made

    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    split = {"type": "Split", "pattern": {"Regex": next(iter(PATTERNS))}, "invert": False}
    splits = [{**split, "behavior": "Isolated"}, {**byte_level, "use_regex": False}]
    digits = [{"type": "Digits", "individual_digits": True}, {**byte_level, "use_regex": True}]
    for parts in (splits, digits, [{**splits[0], "invert": True}, splits[1]], [splits[0]]):
        other(pre_tokenizer={"type": "Sequence", "pretokenizers": parts})
    other(normalizer={"type": "NFC"})
    other(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}]})
    for content in ("\u00c5", "x" * 600):
        replace = {"type": "Replace", "pattern": {"String": "x"}, "content": content}
        other(normalizer={"type": "Sequence", "normalizers": [replace, replace]})
    words = {"[UNK]": 0, "It": 1, "##s": 2, "is": 3, "42": 4}
    piece = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##"}
    whitespace = {"type": "Whitespace"}
    other(model={**piece, "max_input_chars_per_word": 9, "vocab": words}, pre_tokenizer=whitespace)
    scores = [["<unk>", 0.0], ["\u2581", -1.0], ["It", -2.0], ["<|end|>", -3.0]]
    space = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always"}
    other(model={"type": "Unigram", "unk_id": 0, "vocab": scores}, pre_tokenizer=space)
    other(model={"type": "WordLevel", "vocab": words, "unk_token": "[UNK]"})
    begin = {"SpecialToken": {"id": "<|end|>", "type_id": 0}}
    template = {
        "type": "TemplateProcessing",
        "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
    }
    template |= {"pair": template["single"], "special_tokens": {
        "<|end|>": {"id": "<|end|>", "ids": [257], "tokens": ["<|end|>"]}
    }}  # fmt: skip
    other(post_processor=template)
    bpe = few["tokenizer.json"]["model"]
    other(model={**bpe, "byte_fallback": True, "unk_token": "a"})
    other(model={**bpe, "unk_token": "a", "ignore_merges": True, "merges": []})
    added = few["tokenizer.json"]["added_tokens"][0]
    think = {**added, "id": 258, "content": "<think>", "special": False}
    for change in ({"lstrip": True}, {"normalized": True}, {"single_word": True}, {"content": ""}):
        other(added_tokens=[{**added, **change}, think], normalizer={"type": "NFC"})
    bom = {**small, "config.json": {"eos_token_id": ["ab", 257], "model_type": "qwen2"}}
    bom["tokenizer_config.json"] = "\ufeff" + json.dumps(small["tokenizer_config.json"])
    bom["chat_template.jinja"] = "{{ messages[0].content }}<think>"
    ends = {**small, "config.json": {"eos_token_id": "ab"}}
    return [json.dumps(x).encode() for x in (*found, bom, ends)] + [b"M" + b"\n\x0b\n\x05<unk>"]


TARGETS = [
    Target("template", _template, _take_apart, written, ("reading/template.py",), JINJA),
    Target(
        "tokenizer",
        _directory,
        _load,
        tables,
        ("checkpoints/tokenizer.py", "apps/tokenizer.py", "reading/tokens.py"),
        TABLES,
        of_json(TABLES),
        longest=1 << 15,
    ),
]
