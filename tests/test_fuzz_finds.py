"""What fuzzing has found, and others of its kind: each is refused in one line."""

import asyncio
import io
import json
import os
import shlex
import struct
import subprocess
import sys
import threading
import zipfile
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import papers
import pytest
import resident
from checkpoints import (
    REPO,
    byte_bpe,
    byte_tokenizer,
    chat_tokenizer,
    edit_config,
    make_base,
    write,
)
from click.testing import CliRunner
from jinja2.sandbox import ImmutableSandboxedEnvironment
from mlx_lm.tokenizer_utils import TokenizerWrapper
from serving import serving
from test_training import SETTINGS
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ahn_mlx import AHNConfig, AHNError
from ahn_mlx.apps.tokenizer import pack_tokenizer
from ahn_mlx.checkpoints import gguf, pickles
from ahn_mlx.checkpoints import tokenizer as tables
from ahn_mlx.checkpoints.baseconfig import read_config
from ahn_mlx.checkpoints.card import base_model, read_origins
from ahn_mlx.checkpoints.convert import convert
from ahn_mlx.checkpoints.formats import describe
from ahn_mlx.checkpoints.ggufile import GGUFile
from ahn_mlx.checkpoints.load import load_model, load_plain
from ahn_mlx.checkpoints.safetensors import read_header
from ahn_mlx.checkpoints.tokenizer import load_tokenizer
from ahn_mlx.cli import cli
from ahn_mlx.errors import show
from ahn_mlx.evaluate.predictions import read_run
from ahn_mlx.evaluate.records import count_records, parse_line
from ahn_mlx.reading import layout, sandbox
from ahn_mlx.reading.template import Template
from ahn_mlx.reading.text import read_documents, read_file
from ahn_mlx.reading.tokens import Encoder
from ahn_mlx.serve import anthropic
from ahn_mlx.serve.digests import Digests, Files
from ahn_mlx.serve.guard import LOOPBACK, Guard
from ahn_mlx.serve.memories import Library
from ahn_mlx.train import loop

NAN, ENDLESS = float("nan"), 10**400
NESTED = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


@pytest.mark.parametrize(
    "settings",
    [
        {"layer_types": 1.5, "rope_parameters": NESTED},
        {"layer_types": {"full_attention": 1}},
        {"layer_types": [["full_attention"], None]},
        {"rope_theta": ENDLESS},
        {"rope_theta": 1e308},
        {"rms_norm_eps": 2},
        {"rope_scaling": {"rope_type": "linear", "factor": 1e308}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": ENDLESS}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": [NAN]}},
        {"eos_token_id": ENDLESS},
        {"eos_token_id": [1, 1 << 24]},
        {"max_window_layers": -ENDLESS},
        {"model_type": "gemma2", "final_logit_softcapping": NAN},
    ],
)
def test_numbers_of_a_config_that_no_setting_can_be(settings: dict[str, Any], base: Path) -> None:
    edit_config(base, **settings)
    with pytest.raises(AHNError, match=rf"config\.json: .*{next(iter(settings))}|factor|settin"):
        read_config(base)


@pytest.mark.parametrize(
    "settings",
    [
        {"window": ENDLESS},
        {"window": (1 << 30) + 1},
        {"sinks": 1 << 40},
        {"sinks": True},
        {"fa_layer_ids": [float("inf")]},
        {"fa_layer_ids": [True]},
        {"fa_layer_ids": [1.5]},
        {"fa_layer_ids": {"1": 2}},
        {"memory": ["deltanet"] * 1000},
    ],
)
def test_settings_of_a_memory_that_cannot_be(settings: dict[str, Any]) -> None:
    with pytest.raises(AHNError) as refused:
        AHNConfig.from_dict({"ahn": settings})
    assert next(iter(settings)) in str(refused.value)
    assert len(str(refused.value)) < 300


def test_files_without_a_tensor(base: Path) -> None:
    mx.save_safetensors(str(base / "model.safetensors"), {})
    for read in (describe, load_plain):
        with pytest.raises(AHNError, match="holds no tensors"):
            read(base)


@pytest.mark.parametrize("label", ["idna", "punycode", "undefined", "unicode_escape", "utf_7"])
def test_encodings_that_no_page_has(label: str, tmp_path: Path) -> None:
    page = tmp_path / "a.html"
    page.write_bytes(f"<meta charset={label}><p>\\x41 xn--a-\xe9.b".encode("latin-1"))
    with pytest.raises(AHNError, match="no known encoding"):
        read_file(page)


def damaged(method: int) -> bytes:
    """A zip archive whose only member, a.jsonl, is not what its method makes."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", method) as archive:
        archive.writestr("a.jsonl", b'{"a": 1}\n' * 50)
    raw = bytearray(data.getvalue())
    at = raw.index(b"a.jsonl") + len("a.jsonl")
    # Behind what LZMA says of itself, so that it begins to unpack.
    raw[at + 9 : at + 30] = b"\xff" * 21
    return bytes(raw)


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2, zipfile.ZIP_DEFLATED])
def test_archives_of_a_suite_that_do_not_unpack(method: int, tmp_path: Path) -> None:
    file = tmp_path / "data.zip"
    file.write_bytes(damaged(method))
    with pytest.raises(AHNError, match=r"data\.zip"):
        count_records(file, "a.jsonl")


def test_a_name_in_an_archive_that_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "data.zip"
    raw = damaged(zipfile.ZIP_STORED)
    flags = raw.index(b"PK\x01\x02") + 8
    raw = raw[:flags] + struct.pack("<H", 0x800) + raw[flags + 2 :]  # says that it is UTF-8
    file.write_bytes(raw.replace(b"a.jsonl", b"a\xff\xffsonl"))
    with pytest.raises(AHNError, match="damaged"):
        count_records(file, "a.jsonl")


@pytest.mark.parametrize("length", ["x", "-1", "1_0", "\xb2", "", "9" * 5000, "0x10", "+1"])
def test_a_body_whose_length_is_no_number(length: str) -> None:
    sent: list[Any] = []

    async def ask() -> None:
        async def receive() -> Any:
            return {"type": "http.request", "body": b"{}"}

        async def send(message: Any) -> None:
            sent.append(message)

        pairs = {"host": "localhost", "content-type": "application/json", "content-length": length}
        headers = [(k.encode(), v.encode("latin-1")) for k, v in pairs.items()]
        scope = {"type": "http", "method": "POST", "path": "/v1/x", "headers": headers}
        await Guard(lambda *_: None, None, LOOPBACK, frozenset())(scope, receive, send)  # type: ignore[arg-type,return-value]

    asyncio.run(ask())
    assert sent[0]["status"] == 400
    assert "Content-Length" in json.loads(sent[1]["body"])["error"]["message"]


@pytest.mark.parametrize("name", ["~\0", "fi \0/*G", "a\0b", "[\0!", "\0", "file:///\0"])
def test_names_with_a_nul(name: str) -> None:
    with pytest.raises(AHNError) as refused:
        read_documents([name], has_prompt=False)
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("name", ["\x1b[31mred", "a\x7fb", "\u202egpj.exe", "\x9b2J", "\ud83d"])
def test_names_that_a_terminal_would_obey(name: str, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(AHNError) as refused:
        read_documents([name], has_prompt=False)
    assert str(refused.value).isprintable() and ascii(name)[1:-1] in str(refused.value)
    (tmp_path / "good.txt").write_text("It was")
    try:
        (tmp_path / f"{name}.txt").touch()
    except UnicodeEncodeError:  # no file can have it
        return
    assert read_documents([str(tmp_path)], has_prompt=False) == "It was"
    said = capsys.readouterr().err
    assert "empty" in said and said.rstrip("\n").isprintable()


def test_a_folder_with_a_link_into_what_is_closed(tmp_path: Path, monkeypatch: Any) -> None:
    """Root may look everywhere, so that the system's answer is made up."""
    (tmp_path / "good.txt").write_text("It was")
    (tmp_path / "closed.txt").symlink_to("/nowhere/x")
    real = os.stat

    def stat(path: Any, *args: Any, **options: Any) -> Any:
        if not isinstance(path, int) and os.fspath(path).endswith("closed.txt"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(os, "stat", stat)
    assert read_documents([str(tmp_path)], has_prompt=False) == "It was"


@pytest.mark.parametrize("kind", ["docx", "epub", "lies"])
def test_archives_that_unpack_without_end(kind: str, tmp_path: Path) -> None:
    body = papers.paragraph("x") * 60_000
    data = papers.docx(body) if kind != "epub" else papers.epub({"a.xhtml": body})
    if kind == "lies":  # in its directory, about how small the part is
        at = data.index(b"word/document.xml", data.index(b"PK\x01\x02")) - 46
        data = data[: at + 20] + struct.pack("<I", 1 << 30) + data[at + 24 :]
    file = tmp_path / f"a.{'epub' if kind == 'epub' else 'docx'}"
    file.write_bytes(data)
    with pytest.raises(AHNError, match="zip bomb"):
        read_file(file)


@pytest.fixture(scope="module")
def site() -> Any:
    with serving() as running:
        yield running


def raw(site: Any, path: str, body: str) -> Any:
    headers = {"content-type": "application/json"}
    return site.client.post(path, content=body.encode(), headers=headers)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", '"messages": [], "temperature": 1' + "0" * 400),
        ("chat/completions", '"messages": [], "logit_bias": {"5": -1' + "0" * 400 + "}"),
        ("completions", '"prompt": "x", "top_p": 1e999'),
        ("responses", '"input": "x", "metadata": {"a": [-1e999]}'),
        ("responses", '"input": "x", "metadata": {"a": NaN}'),
    ],
)
def test_numbers_of_a_request_that_nobody_writes(path: str, body: str, site: Any) -> None:
    answer = raw(site, f"/v1/{path}", f'{{"model": "tiny", {body}}}')
    assert answer.status_code == 400, answer.text


DEEP = "[" * 99 + "]" * 99
ODD = ['{"x": "\\ud800"}', '{"x": 1e999}', '{"x": NaN}', DEEP, f'{{"x": {DEEP}}}']


@pytest.mark.parametrize("arguments", ODD)
def test_arguments_of_past_calls_that_are_no_plain_json(arguments: str, site: Any) -> None:
    """A client repeats what it was told, which the model may have written in any way."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "1"},
    ]
    body = {"model": "tiny", "messages": messages, "max_tokens": 1}
    assert site.post("/v1/chat/completions", body).status_code == 200
    item = {"type": "function_call", "call_id": "c", "name": "f", "arguments": arguments}
    body = {"model": "tiny", "input": [{"role": "user", "content": "Why?"}, item]}
    assert site.post("/v1/responses", {**body, "max_output_tokens": 1}).status_code == 200


@pytest.mark.parametrize("arguments", [*ODD, "[1]", "x"])
def test_arguments_that_a_model_writes_are_an_object_for_anthropic(arguments: str) -> None:
    use = anthropic._use({"id": "c", "function": {"name": "f", "arguments": arguments}})
    assert use["input"] == {}
    good = {"id": "c", "function": {"name": "f", "arguments": '{"x": [1.5, "\\u00e9"]}'}}
    assert anthropic._use(good)["input"] == {"x": [1.5, "é"]}


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_code_of_a_tokenizer_is_not_run_whatever_is_piped_in(
    bom: bytes, tmp_path: Path, monkeypatch: Any
) -> None:
    path, trace = byte_tokenizer(tmp_path / "model"), tmp_path / "trace"
    kind = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    (path / "tokenizer_config.json").write_bytes(bom + json.dumps(kind).encode())
    (path / "config.json").write_text('{"model_type": "own"}')
    code = f"open({str(trace)!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast as Own\n"
    (path / "own.py").write_text(code)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(AHNError, match="no usable tokenizer"):
        load_tokenizer(path, {})
    assert not trace.exists()


def table(**changes: Any) -> dict[str, Any]:
    """Of a tokenizer of bytes, otherwise than it should be."""
    made: dict[str, Any] = json.loads(byte_bpe().to_str())
    made["model"] |= {k: v for k, v in changes.items() if k in made["model"]}
    return made | {k: v for k, v in changes.items() if k in made}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": []}}, "splitter"),
        ({"vocab": {}}, "numbers up to"),
    ],
)
def test_tables_for_apps_of_tokenizers_that_load_and_make_no_sense(
    changes: dict[str, Any], match: str
) -> None:
    backend = Tokenizer.from_str(json.dumps(table(**changes)))
    tokenizer = TokenizerWrapper(PreTrainedTokenizerFast(tokenizer_object=backend))
    with pytest.raises(AHNError, match=match):
        pack_tokenizer(tokenizer)


def test_two_tokens_with_one_number(tmp_path: Path) -> None:
    """Of which the library forgets one, with its merges or not."""
    path, made = byte_tokenizer(tmp_path / "model"), table()
    made["model"]["vocab"] |= {"aa": 256, "ab": 256}
    made["model"]["merges"] = [["a", "a"], ["a", "b"]]
    (path / "tokenizer.json").write_text(json.dumps(made))
    with pytest.raises(AHNError, match=r"merges have 'a[ab]', which has no number"):
        pack_tokenizer(load_tokenizer(path, {}))


PIECES = [{"SpecialToken": {"id": "<\x1b[31mgone>", "type_id": 0}}]
PIECES += [{"Sequence": {"id": "A", "type_id": 0}}]
PANICS: dict[str, dict[str, Any]] = {
    "a text that begins with a token that is not there": {
        "post_processor": {"type": "TemplateProcessing", "single": PIECES, "special_tokens": {}}
        | {"pair": [*PIECES, {"Sequence": {"id": "B", "type_id": 1}}]},
    },
    "pieces shorter than what they begin with": {
        "vocab": {"a": 0, "b": 1, "ab": 2},
        "merges": [["a", "b"]],
        "continuing_subword_prefix": "####",
    },
    "two that are one piece": {"merges": [["a", "b"]], "continuing_subword_prefix": "##"},
}


@pytest.mark.parametrize("name", PANICS)
def test_a_panic_of_a_library_is_one_line(name: str, tmp_path: Path, capfd: Any) -> None:
    """And not a hundred more, which Rust writes by itself."""
    path = byte_tokenizer(tmp_path / "model")
    (path / "tokenizer.json").write_text(json.dumps(table(**PANICS[name])))
    with pytest.raises(AHNError, match=r"model: no usable tokenizer \(.*\); copy the base's"):
        load_tokenizer(path, {})
    assert capfd.readouterr() == ("", "")
    os.write(1, b"heard")
    os.write(2, b"too")
    assert capfd.readouterr() == ("heard", "too")


@pytest.mark.parametrize("option", ["\x1b[31mred", "two\nlines"])
def test_what_a_token_has_no_setting_for_is_not_said(
    option: str, tmp_path: Path, capfd: Any
) -> None:
    path = byte_tokenizer(tmp_path / "model")
    token = {"content": "<|end|>", "__type": "AddedToken", option: True}
    config = json.loads((path / "tokenizer_config.json").read_text())
    config |= {"eos_token": token, "added_tokens_decoder": {"256": token}}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    capfd.readouterr()
    AutoTokenizer.from_pretrained(str(path))
    assert f"unknown kwarg option {option}" in capfd.readouterr().out  # by itself
    assert load_tokenizer(path, {}).eos_token == "<|end|>"
    assert capfd.readouterr() == ("", "")


def test_threads_are_silent_one_after_the_other(capfd: Any) -> None:
    """Else the second would take the silence of the first for what there was."""
    inside = [threading.Event() for _ in range(2)]
    leave = [threading.Event() for _ in range(2)]

    def work(n: int) -> None:
        with tables.unheard():
            inside[n].set()
            leave[n].wait(30)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    threads[0].start()
    assert inside[0].wait(30)
    threads[1].start()
    assert not inside[1].wait(0.3)
    for thread, event in zip(threads, leave, strict=True):
        event.set()
        thread.join(30)
    os.write(2, b"heard")
    assert capfd.readouterr().err == "heard"


@pytest.mark.parametrize("number", [1, 2])
def test_a_process_without_a_stream_reads_tokenizers(number: int, tmp_path: Path) -> None:
    """Its number is that of a file then."""
    path = byte_tokenizer(tmp_path / "model")
    words = "import os, sys; f = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT)"
    words += f"; assert f == {number}; from pathlib import Path"
    words += "; from ahn_mlx.checkpoints.tokenizer import load_tokenizer"
    words += "; load_tokenizer(Path(sys.argv[1]), {}); os.write(f, b'mine')"
    command = shlex.join([sys.executable, "-c", words, str(path), str(tmp_path / "file")])
    subprocess.run(f"{command} {number}>&-", shell=True, cwd=REPO, check=True, timeout=120)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("merged", ["ab", "ba"])
def test_a_tokenizer_whose_copy_makes_its_library_panic(merged: str, tmp_path: Path) -> None:
    """As of two tokens with one number it forgets one, and not its merges."""
    path = byte_tokenizer(tmp_path / "model")
    vocab, end = {"a": 2, "b": 1, merged: 2}, {"id": 3, "content": "<|end|>", "special": True}
    sides = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    made = table(vocab=vocab, merges=[list(merged)], pre_tokenizer=None)
    (path / "tokenizer.json").write_text(json.dumps({**made, "added_tokens": [{**end, **sides}]}))
    encode = Encoder(load_tokenizer(path, {"eos_token_id": [3]}))
    assert encode("<|end|>", "b", "<|end|>")[1:-1] == [1]
    with pytest.raises(AHNError, match=r"the text has '<\|end\|>'.*take it out"):
        encode("", "b <|end|>", "")


def test_templates_that_are_no_text() -> None:
    tokenizer = chat_tokenizer()
    tokenizer._tokenizer.chat_template = {"default": 1, "tool_use": "<think>"}
    assert Encoder(tokenizer)("", "ab") == Encoder(chat_tokenizer())("", "ab")


def test_which_tokens_were_seen_is_as_long_as_the_vocabulary() -> None:
    """Before each bit of it becomes a byte."""
    facts = {"version": 2, "tokens": 0, "window": 8, "sinks": 0, "layers": []}
    for size in (0, 31, 34, 1 << 16):
        arrays = {"seen": mx.zeros((size,), dtype=mx.uint8)}
        with pytest.raises(ValueError, match="seen other tokens than the 259"):
            layout.check_values(arrays, facts, 259)


@pytest.mark.parametrize("option", ["--lr=inf", "--lr=nan", "--weight-decay=nan", "--seed=1e30"])
def test_numbers_of_a_training_that_are_none(option: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("It was")
    name, _, value = option.partition("=")
    number = str(10**30) if value == "1e30" else value
    words = ["train", str(tmp_path / "a.txt"), "-o", str(tmp_path / "out"), name, number]
    result = CliRunner().invoke(cli, words)
    assert isinstance(result.exception, AHNError) and name in str(result.exception)


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", NAN), ("lr", -1.0), ("weight_decay", float("inf")), ("steps", ENDLESS), ("seed", -1)],
)
def test_settings_of_a_saved_training_that_cannot_be(name: str, value: Any, tmp_path: Path) -> None:
    settings = {**asdict(SETTINGS), name: value}
    metadata = {"settings": json.dumps(settings), "step": "0"}
    write(tmp_path / loop.STATE, {"__metadata__": metadata})
    with pytest.raises(AHNError, match=f"its {name} is"):
        loop.read_settings(tmp_path)
    metadata["settings"] = json.dumps(asdict(SETTINGS))
    write(tmp_path / loop.STATE, {"__metadata__": metadata})
    assert loop.read_settings(tmp_path) == (asdict(SETTINGS), 0)


NEST = "[" * 300 + "]" * 300


def test_settings_that_are_nested_without_end(base: Path, tmp_path: Path) -> None:
    """Python reads more levels than it writes."""
    settings = (base / "config.json").read_text()
    for file, text in {
        "config.json": settings[:-1] + f', "more": {NEST}}}',
        "generation_config.json": f'{{"more": {NEST}}}',
    }.items():
        was = (base / file).read_bytes() if (base / file).exists() else None
        (base / file).write_text(text)
        with pytest.raises(AHNError, match=rf"{file}: .*nested deeper than 64"):
            read_config(base)
        (base / file).unlink() if was is None else (base / file).write_bytes(was)
    (tmp_path / "run.json").write_text(f'{{"model": {NEST}}}')
    with pytest.raises(AHNError, match="nested deeper than 64"):
        read_run(tmp_path)
    with pytest.raises(AHNError, match="nested deeper than 64"):
        parse_line(f'{{"pred": {NEST}}}'.encode(), "line 1")


def test_what_is_shown_of_a_large_value_is_its_begin() -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    for value in (deep, {"a": deep}, [[0] * 1000] * 1000, "x" * 10**6, {"x" * 10**6: 1}):
        assert len(show(value)) <= 120
    assert show([1, {"a": "é"}]) == r"[1, {'a': '\xe9'}]"


def small_gguf(file: Path, kind: str, tensors: dict[str, Any], heads: int = 1) -> Path:
    """Of this architecture, with an embedding and these tensors: arrays, or (packed, kind)."""
    ggml = pytest.importorskip("gguf")
    writer = ggml.GGUFWriter(file, kind)
    for add in ("head_count", "head_count_kv"):
        getattr(writer, f"add_{add}")(heads)
    for add in ("embedding_length", "block_count"):
        getattr(writer, f"add_{add}")(1)
    for add in ("feed_forward_length", "context_length", "vocab_size"):
        getattr(writer, f"add_{add}")(32)
    writer.add_rope_freq_base(1e4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tensor("token_embd.weight", np.ones((32, 32), np.float32))
    for name, x in tensors.items():
        packed, stored = x if isinstance(x, tuple) else (x, None)
        writer.add_tensor(name, packed, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_a_long_value_is_shown_by_its_begin() -> None:
    assert show("x" * 118) == f"'{'x' * 118}'"
    assert show("x" * 119) == f"'{'x' * 116}..."


def test_a_vector_in_gguf_that_is_quantized(tmp_path: Path) -> None:
    ggml = pytest.importorskip("gguf")
    kind = ggml.GGMLQuantizationType.Q8_0
    packed = ggml.quantize(np.ones(32, np.float32), kind)
    file = small_gguf(tmp_path / "a.gguf", "qwen2", {"output_norm.weight": (packed, kind)})
    with pytest.raises(AHNError, match="is a vector, and quantized"):
        GGUFile(file).sources()


@pytest.mark.parametrize("name", ["attn_q.weight", "attn_k.weight", "attn_q.bias", "attn_k.bias"])
def test_rows_in_gguf_that_heads_cannot_share(tmp_path: Path, name: str) -> None:
    for rows, fits in ((4, True), (1, False), (6, False)):
        x = np.arange(rows * 32, dtype=np.float32).reshape(rows, 32)
        stored = x[:, 0].copy() if name.endswith("bias") else x
        tensors = {f"blk.0.{name}": stored}
        found = GGUFile(small_gguf(tmp_path / f"{rows}.gguf", "llama", tensors, heads=2))
        if fits:
            assert found.read(f"blk.0.{name}").shape == stored.shape and found.sources()
        else:
            with pytest.raises(AHNError, match=f"has {rows} rows, which 2 heads of pairs cannot"):
                found.sources()


def test_how_wide_a_template_may_make_a_text() -> None:
    for width, good in ((1 << 16, True), ((1 << 16) + 1, False)):
        for program in (f"'x' | center({width})", f"'x'.zfill({width})", f"'%*s' % ({width}, 'x')"):
            tokenizer = chat_tokenizer("{% set y = " + program + " %}{{ messages[0].content }}")
            said = [{"role": "user", "content": "x"}]
            if good:
                assert sandbox.render(tokenizer, said) == "x"
            else:
                with pytest.raises(Exception, match=r"it asks for"):
                    sandbox.render(tokenizer, said)


@pytest.mark.parametrize("big", [1 << 24, 4_000_000_000])
@pytest.mark.parametrize("where", ["tokenizer.json", "added", "vocab.json"])
def test_numbers_of_tokens_that_would_fill_the_memory(tmp_path: Path, where: str, big: int) -> None:
    made = table()
    if where == "tokenizer.json":
        made["model"]["vocab"] |= {"b": big}
    if where == "added":
        made["added_tokens"] = [{"id": big, "content": "<x>", "special": True}]
    (tmp_path / "tokenizer.json").write_text(json.dumps(made))
    if where == "vocab.json":
        (tmp_path / where).write_text(json.dumps({"a": 0, "b": big}))
    with pytest.raises(AHNError, match=f"json: a token has the number {big:,}"):
        load_tokenizer(tmp_path, {})


def hold(base: Path, **claims: Any) -> None:
    """A config that claims more than there is, of a model with a memory."""
    edit_config(base, ahn={"memory": "deltanet", "window": 8, "sinks": 2}, **claims)


@pytest.mark.parametrize(
    ("claims", "match"),
    [
        ({"hidden_size": 250_036}, r"embed_tokens.* \[264, 250036\]; it has \[264, 64\] in model"),
        ({"num_attention_heads": 4096}, r"_proj.*\[.*131072.*\]; it has \[64, 64\] in model"),
        ({"vocab_size": 1 << 24}, r"\[16777216, 64\]; it has \[264, 64\] in model\.safetensors"),
        ({"intermediate_size": 1 << 24}, r"\[16777216, 64\]; it has \[96, 64\] in model"),
    ],
)
def test_a_config_that_claims_more_than_its_tensors(
    claims: dict[str, Any], match: str, tmp_path: Path
) -> None:
    """Before what it claims is computed with, to find out what its attention does."""
    base = make_base(tmp_path / "base", "llama")
    hold(base, **claims)
    for read in (load_model, lambda path: convert(None, path, tmp_path / "out")):
        with pytest.raises(AHNError, match=rf"config\.json: describes a model of .*{match}"):
            read(base)


LAYERS = ["num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_transformer_layers"]


@pytest.mark.parametrize("name", LAYERS)
def test_layers_that_have_no_tensor(name: str, base: Path) -> None:
    edit_config(base, **{name: 900})
    with pytest.raises(AHNError, match=rf"config\.json: {name} is 900, but there are 26 tensors"):
        load_plain(base)
    edit_config(base, **{name: 26})
    with (
        nullcontext() if name != "num_hidden_layers" else pytest.raises(AHNError, match="describes")
    ):
        load_plain(base)


@pytest.mark.parametrize("name", ["n_head", "n_routed_experts", "altup_num_inputs", "n_group"])
def test_lists_that_a_config_makes_long(name: str, base: Path) -> None:
    edit_config(base, **{name: 4096})
    read_config(base)
    for settings in ({name: 4097}, {"ffn_config": [{name: 1 << 40}]}):
        edit_config(base, **{name: None, **settings})
        with pytest.raises(AHNError, match=rf"config\.json: '{name}' must be at most 4,096"):
            read_config(base)


GROWS = "{% set n = namespace(x=START) %}{% for i in range(60) %}{% set n.x = STEP %}{% endfor %}"
LONG = "y" * 9000
MADE = [
    "'a' * 10**9",
    "10**9 * 'a'",
    "[1] * 10**9",
    "'a'.encode() * 10**9",
    "'%1000000000d' % 1",
    "'%*d' % (10**9, 1)",
    "('%s' * 9999) % (('x' * 9999,) * 9999)",
    "'{:1000000000}'.format(1)",
    "'{:{}}'.format(1, 10**9)",
    "('{0}' * 9999).format('x' * 9999)",
    "'a'.center(10**9)",
    "'a' | center(10**9)",
    "'1'.zfill(10**9)",
    "(1).to_bytes(10**9, 'big')",
    "('\\t' * 9999).expandtabs(60000)",
    "('a' * 99999).replace('', 'b' * 9999)",
    "('a' * 99999) | replace('a', 'b' * 9999)",
    "('b' * 9999).join(range(999) | map('string'))",
    "range(9999) | join('b' * 9999)",
    "('\\n' * 99999) | indent(60000, blank=true)",
    "messages | tojson(indent=10**8)",
    "('a' * 99999).translate({97: 'x' * 9999})",
    "[1] | batch(10**9, 'x') | list",
    "['x' * 99999] * 99999",
    "dict(a=['x' * 99999] * 999).items()",
    "1 | round(10**9)",
    "'%s' | format('x' * 10**9)",
    "lipsum(n=10**5)",
    "('a b ' * 99999) | wordwrap(1)",
    "('http://a.bc ' * 999) | urlize(target='x' * 99999)",
]


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(10**8) %}x{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{{ range(99999) | sum }}{% endfor %}",
        "{% set x = range(99999) | list %}{% for i in range(300) %}{{ x | max }}{% endfor %}",
        "{% set x = range(99999) | list %}{% for i in x %}{% if 'q' in x %}{% endif %}{% endfor %}",
        "{% set x %}{% for i in range(99999) %}LONG{% endfor %}{% endset %}".replace("LONG", LONG),
        "{% macro f() %}LONG{% endmacro %}".replace("LONG", LONG)
        + "{% for i in range(99999) %}{% set q = f() %}{% endfor %}",
        "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
        "{% for x in messages recursive %}{{ loop(messages) }}{{ loop(messages) }}{% endfor %}",
        "{% set x = 'ab' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 40,
        GROWS.replace("START", "'ab'").replace("STEP", "n.x ~ n.x"),
        GROWS.replace("START", "'ab'").replace("STEP", "n.x + n.x"),
        GROWS.replace("START", "9").replace("STEP", "n.x * n.x"),
        GROWS.replace("START", "9").replace("STEP", "n.x ** n.x"),
        GROWS.replace("START", "[1]").replace("STEP", "[n.x, n.x]"),
        GROWS.replace("START", "[1]").replace("STEP", "(n.x, n.x)"),
        GROWS.replace("START", "[1]").replace("STEP", "{'a': n.x, 'b': n.x}"),
        "{% set n = namespace(x='a' * 10**5, l=[]) %}"
        "{% for i in range(99999) %}{% set n.l = n.l + [n.x[1:]] %}{% endfor %}",
        "{% for i in range(99999) | _counted(-9**9) %}{% for j in range(99999) %}{% endfor %}"
        "{% endfor %}",
        "{% for m in messages * 99999 %}{{ m.role }}{{ m.content | trim }}{% endfor %}" * 9,
        *(f"{{{{ {made} }}}}" for made in MADE),
    ],
)
def test_templates_that_would_fill_the_memory_or_not_end(
    template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ahn_mlx.reading.template.SECONDS", 300)  # not by the clock
    tokenizer = chat_tokenizer()
    said = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer._tokenizer.chat_template = template + said
    resident.start_over()
    before = resident.most()
    with pytest.raises(AHNError, match=r"without end|characters|too|recursion|undefined"):
        Template(tokenizer)
    assert resident.most() - before < 100 << 20


def test_what_templates_do_every_day_is_not_changed() -> None:
    """In one template: each place where what is made is paid for."""
    template = (
        "{% set ns = namespace(n=0, said=[]) %}"
        "{% macro say(x, y='!') %}<{{ x ~ y }}>{% endmacro %}"
        "{% for role, few in messages | groupby('role') if role != 'x' %}"
        "{{ loop.index }}/{{ loop.length }}:"
        "{% for m in few %}{% set ns.n = ns.n + 2 * loop.revindex %}"
        "{% set ns.said = ns.said + [m['content'][1:]] %}{% endfor %}"
        "{% else %}none{% endfor %}{{ ns.said }}{{ ns.n }}"
        "{{ '%s-%03d' % ('a', 7) }}{{ '{:>4}|{x}'.format(1, x=[2]) }}{{ ', '.join(ns.said) }}"
        "{{ {'a': (1, 2), 'b': messages[::-1][0].content} | tojson(indent=2) }}"
        "{% set x %}<{{ 'b' in ns.said[1] }}{% endset %}{{ x }}{{ x is in ['q'] }}{{ say('h') }}"
        "{{ 'a-b'.split('-') | map('upper') | join('+') }}"
        "{{ ' x ' | trim | replace('x', 'yy') | indent(2, true) }}"
        "{{ 2 ** 10 % 7 }}{{ missing }}{{ missing is defined }}{{ 'x' * 3 }}{{ [1] * 2 }}"
        "{% for a, b in {'k': [1]}.items() recursive %}{{ a }}{{ b[:] }}{% endfor %}"
        "{% for t in nothing %}{% endfor %}"
        "{{ '%d %s' % (10**9, 10**9) }}{{ '{:,}'.format(10**9) }}{{ say(10**9) }}"
        "{{ '%d' | format(10**9) }}{{ missing | default(10**9) }}{{ 'abc'.find('c', 0, 10**9) }}"
        "{{ [10**9] | select('equalto', 10**9) | list }}{{ [1] | sum(start=10**9) }}"
    )
    messages = [{"role": "user", "content": "One"}, {"role": "system", "content": "abc"}]
    tokenizer = chat_tokenizer()
    tokenizer._tokenizer.chat_template = template
    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    plain.filters["tojson"] = lambda x, indent: json.dumps(x, ensure_ascii=False, indent=indent)
    expected = plain.from_string(template).render(messages=messages)
    assert "yy" in expected and sandbox.render(tokenizer, messages) == expected


ALL = "{% for m in messages %}{{ m.content }}{% endfor %}"
LONG_TALKS = [
    # As models with tools have it: one text, to which all are added.
    "{% set ns = namespace(t='') %}{% for m in messages %}"
    "{% set ns.t = ns.t + '### ' + m.role ~ '\n' + m.content %}{% endfor %}{{ ns.t }}",
    "{% for t in tools %}{{ t | tojson(indent=4) }}{% endfor %}{{ tools | tojson }}" + ALL,
    "{% for m in messages %}{% if false %}" + "x" * 4000 + "{% endif %}{{ m.content }}{% endfor %}",
    "{% macro f(v) %}{% if v is mapping %}{% for k, x in v.items() %}{{ k }}:{{ f(x) }}{% endfor %}"
    "{% else %}{{ v }}{% endif %}{% endmacro %}{% for t in tools %}{{ f(t) }}{% endfor %}" + ALL,
    "{% set ns = namespace(all=[]) %}{% for m in messages %}{% set ns.all = ns.all + [m] %}"
    "{% endfor %}{% for m in ns.all[1:] %}{{ m.content | trim }}{% endfor %}",
]


@pytest.mark.parametrize("template", LONG_TALKS)
def test_long_conversations_with_many_tools_are_written(template: str) -> None:
    messages = [
        {"role": "assistant" if n % 2 else "user", "content": f"{n} " + "word " * 200}
        for n in range(500)
    ]
    fields = {
        f"field{n}": {"type": "string", "description": "What it is. " * 12} for n in range(12)
    }
    tools = [
        {"name": f"tool{n}", "since": 1735689600, "parameters": {"properties": fields}}
        for n in range(100)
    ]
    tokenizer = chat_tokenizer()
    tokenizer._tokenizer.chat_template = template
    said = sandbox.render(tokenizer, messages, tools=tools)
    assert all(m["content"].strip() in said for m in messages[1:])
    assert "tools" not in template or said.count("1735689600") >= 100


def test_a_width_may_be_a_text_among_the_values() -> None:
    tokenizer = chat_tokenizer()
    tokenizer._tokenizer.chat_template = "{{ '{:>{}}'.format('a', '3') }}{{ messages[0].content }}"
    assert sandbox.render(tokenizer, [{"role": "user", "content": "b"}]) == "  ab"


def test_templates_of_other_programs_are_not_counted() -> None:
    made = sandbox.Bounded().from_string("{{ 'ab' * n }}").render(n=1 << 26)
    assert len(made) == 1 << 27


def steps(kind: str, n: int, **fields: Any) -> dict[str, Any]:
    """Of a tokenizer, one and the same n times."""
    return {"type": "Sequence", f"{kind}s": [fields] * n}


TWICE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": steps("normalizer", 40, **TWICE)},
        {"normalizer": steps("normalizer", 40, type="ByteLevel")},
        {"normalizer": steps("normalizer", 3, **{**TWICE, "content": "b" * 9999})},
        {"normalizer": {**TWICE, "pattern": {"Regex": ""}, "content": "b" * 9999}},
        {"normalizer": {"type": "Prepend", "prepend": "x" * 9999}},
        {"decoder": steps("decoder", 40, **TWICE)},
    ],
)
def test_steps_of_a_tokenizer_that_make_a_book_of_a_word(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(table() | changes))
    with pytest.raises(AHNError, match=rf"tokenizer\.json: its {next(iter(changes))} makes"):
        load_tokenizer(tmp_path, {})
    few = steps("decoder", 3, type="Replace", pattern={"String": "▁"}, content=" ")
    path = byte_tokenizer(tmp_path / "good")
    (path / "tokenizer.json").write_text(json.dumps(table() | {"normalizer": None, "decoder": few}))
    load_tokenizer(path, {})


@pytest.mark.parametrize(
    ("most", "more"),
    [
        (steps("normalizer", 12, type="ByteLevel"), steps("normalizer", 13, type="ByteLevel")),
        (steps("normalizer", 12, **TWICE), steps("normalizer", 13, **TWICE)),
        ({"type": "Prepend", "prepend": "x" * 4096}, {"type": "Prepend", "prepend": "x" * 4097}),
        (
            steps("normalizer", 60, **{**TWICE, "pattern": {"String": "ab"}}),
            steps("normalizer", 13, **{**TWICE, "pattern": {"String": ""}}),
        ),
        (
            steps("normalizer", 60, **{**TWICE, "pattern": {"String": "abcd"}}),
            steps("normalizer", 13, **{**TWICE, "pattern": {"Regex": "a"}}),
        ),
    ],
)
def test_a_character_becomes_at_most_four_thousand(
    most: dict[str, Any], more: dict[str, Any], tmp_path: Path
) -> None:
    path = byte_tokenizer(tmp_path / "model")
    (path / "tokenizer.json").write_text(json.dumps(table() | {"normalizer": most}))
    load_tokenizer(path, {})
    (path / "tokenizer.json").write_text(json.dumps(table() | {"normalizer": more}))
    with pytest.raises(AHNError, match="its normalizer makes"):
        load_tokenizer(path, {})


def test_the_largest_number_of_a_token(tmp_path: Path) -> None:
    """Without a tokenizer of so many, which would be made only then."""
    (tmp_path / "tokenizer.json").write_text(json.dumps(table() | {"added_tokens": [3]}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"a": (1 << 24) - 1, "b": "5"}))
    tables._check_tables(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"a": 1 << 24}))
    with pytest.raises(AHNError, match=r"added_tokens\.json: a token has the number 16,777,216"):
        tables._check_tables(tmp_path)


def test_a_vocabulary_larger_than_any(tmp_path: Path) -> None:
    path = byte_tokenizer(tmp_path / "model")
    with (path / "tokenizer.json").open("ab") as f:
        f.truncate((64 << 20) + 1)
    with pytest.raises(AHNError, match=r"tokenizer\.json: larger than 64 MB"):
        load_tokenizer(path, {})


def test_a_token_in_gguf_that_is_a_book() -> None:
    """Each of its parts may be a merge."""
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["a", "b" * 1025],
        "tokenizer.ggml.token_type": [1, 1],
        "tokenizer.ggml.scores": [0.0, 0.0],
    }
    with pytest.raises(AHNError, match="token of 1,025 characters, 'bbb"):
        gguf.load_tokenizer(metadata, 2)


def test_a_name_that_is_in_a_large_header_twice(tmp_path: Path) -> None:
    """Who counts each name in all of them is not done in a day."""
    names = "".join(f'"{n}": 0, ' for n in range(300_000))
    raw = f'{{{names}"299999": 0}}'.encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(raw)) + raw)
    with pytest.raises(AHNError, match=r"'299999' appears twice"):
        read_header(file)


@pytest.mark.parametrize("method", [1, 6, 12, 14, 93, 97, 99, 65535])
@pytest.mark.parametrize("kind", ["zip", "epub", "docx"])
def test_archives_whose_compression_is_not_known(kind: str, method: int, tmp_path: Path) -> None:
    data = {
        "zip": papers.zipped({"a.jsonl": b'{"a": 1}\n'}),
        "epub": papers.epub({"a.xhtml": "<p>x</p>"}),
        "docx": papers.docx(papers.paragraph("x")),
    }[kind]
    raw = bytearray(data)
    for sign, at in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        place = raw.find(sign)
        while place >= 0:
            raw[place + at : place + at + 2] = struct.pack("<H", method)
            place = raw.find(sign, place + 4)
    file = tmp_path / f"a.{kind}"
    file.write_bytes(bytes(raw))
    read = (lambda: read_file(file)) if kind != "zip" else (lambda: count_records(file, "a.jsonl"))
    with pytest.raises(AHNError, match=rf"a\.{kind}: is damaged"):
        read()


@pytest.mark.parametrize(
    "front",
    [
        "x: 'a\n---x'\n" + "".join(f"k{i}: [1, 2]\n" for i in range(40_000)),  # a minute
        "".join(f"k{i}: [1, 2]\n" for i in range(40_000)),
        "k: " + "[" * 5000,
        "k: " + "{}," * 513,
        "k: [" + "{a: 1}, " * 513 + "]",
        "k: " + "1" * 5000,
        "k: !!python/object/apply:os.system [false]",
        "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 60)),
        "- a\n- b",
        "k: \x00",
    ],
)
def test_cards_that_say_nothing(front: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\nbase_model: a/b\n{front}\n---\n")
    assert base_model(tmp_path) == "" and read_origins(tmp_path) == []


def test_pickles_whose_views_are_larger_than_the_file(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    file = tmp_path / "pytorch_model.bin"
    x = torch.ones(512)
    torch.save({"a": x, "b": x, "c": x.view(2, 256)}, file)  # as head and embedding are one
    assert set(pickles.load(file)) == {"a", "b", "c"}
    for views in ({"a": x.expand(1 << 20, 512)}, {str(n): x.expand(2, 512) for n in range(20)}):
        torch.save(views, file)
        with pytest.raises(AHNError, match=r"pytorch_model\.bin: .*larger than the file"):
            pickles.load(file)


def test_pickles_whose_strides_reach_beyond_what_is_stored(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(64, 64)}, file)
    with zipfile.ZipFile(file) as z:
        parts = {name: z.read(name) for name in z.namelist()}
    [pkl] = (name for name in parts if name.endswith("data.pkl"))
    before = b"K@K@\x86"  # (64, 64), and so are its strides (64, 1)
    assert parts[pkl].count(before) == 1
    with zipfile.ZipFile(file, "w") as z:
        for name, data in parts.items():
            z.writestr(name, data.replace(b"K@K\x01\x86", b"M\xff\x7fK\x01\x86", 1))
    with pytest.raises(AHNError, match=r"pytorch_model\.bin: "):
        pickles.load(file)


def test_pickles_of_one_number_with_any_stride(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    file = tmp_path / "pytorch_model.bin"
    x = torch.arange(24.0).reshape(6, 4)
    some = {
        "one": x[:1, 2],
        "row": x[1:2, ::4],
        "none": x[:0, 1],
        "column": x[:, 3],
        "all": x[5, 3],
    }
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        torch.save({name: y.to(dtype) for name, y in some.items()}, file)
        for name, y in pickles.load(file).items():
            found = pickles.to_mlx(y)
            assert found.shape == tuple(some[name].shape)
            assert found.astype(mx.float32).tolist() == some[name].tolist()


def test_a_run_whose_words_are_no_text_is_refused(tmp_path: Path) -> None:
    """Half a character is JSON, but can be neither written again nor shown."""
    (tmp_path / "hotpotqa.jsonl").write_text('{"pred": "a", "answers": ["a"], "item": 0}\n')
    run = {"data": {}, "deviations": [], "mixer": "memory", "protocol": "ahn", "model": "\ud83d"}
    run["facts"] = {"memory": "deltanet", "size": "7b"}
    (tmp_path / "run.json").write_text(json.dumps(run))
    result = CliRunner().invoke(cli, ["eval", "score", str(tmp_path), "--json"])
    assert isinstance(result.exception, AHNError), result.exception
    assert "run.json: cannot be read" in str(result.exception)
    (tmp_path / "run.json").write_text(json.dumps({**run, "model": "\U0001f600"}))
    assert CliRunner().invoke(cli, ["eval", "score", str(tmp_path), "--json"]).exit_code == 0


def test_standard_input_that_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(AHNError, match="standard input: is closed; pipe in"):
        read_documents(["-"], has_prompt=True)


@pytest.mark.parametrize(
    "change",
    [{"name": 5}, {"files": "x"}, {"files": [5]}, {"id": "../x"}, {"error": []}, {"tokens": "1"}],
)
def test_a_job_whose_file_says_other_things_is_none_of_ours(tmp_path: Path, change: Any) -> None:
    known = {"name": "book", "files": [], "id": f"job-{'0' * 32}", "status": "reading"}
    (tmp_path / "jobs").mkdir()
    engine: Any = None
    for said, jobs in ((known, [known["id"]]), ({**known, **change}, [])):
        (tmp_path / f"jobs/{known['id']}.json").write_text(json.dumps(said))
        files = Files(tmp_path / "files")
        found = Digests(Library(tmp_path, engine, engine, 0), files, engine)
        files.close()
        assert list(found.jobs) == jobs
