"""Memory files that may come from anyone: what a false one says is refused, in one line, before
anything is computed; what a session writes comes back bit for bit."""

import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from checkpoints import byte_bpe, chat_tokenizer, talking_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.tokenizer_utils import load as load_tokenizer
from tokenizers import normalizers

from ahn_mlx import AHNConfig, AHNError, augment, load, load_model
from ahn_mlx.checkpoints.identity import hash_of, model_identity
from ahn_mlx.checkpoints.load import cast
from ahn_mlx.cli.digest import _resume, load_as_read
from ahn_mlx.hub.zoo import ZOO
from ahn_mlx.model.augment import memory_layers
from ahn_mlx.outputs import pages
from ahn_mlx.reading import inspect, memoryfile
from ahn_mlx.reading.session import Session

Facts = dict[str, Any]
Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    path = talking_model("qwen2-gdn", tmp_path_factory.mktemp("model"))
    return load_model(path, dtype="float32")[0], load_tokenizer(path)


@pytest.fixture(scope="module")
def honest(loaded, tmp_path_factory) -> Path:
    """243 tokens in steps of 16: three wait, the others fill a window of 12 + 4."""
    session = Session(*loaded, step=16, origin={"name": "model"})
    session.read_ids([7 * t % 256 for t in range(243)])
    session.preview = "It was"
    file = tmp_path_factory.mktemp("memory") / "honest.ahn"
    session.save(file)
    return file


DTYPES = {"F32": np.float32, "F16": np.float16, "U32": np.uint32, "I32": np.int32, "U8": np.uint8}
MLX = {"F32": "mlx.core.float32", "F16": "mlx.core.float16", "U32": "mlx.core.uint32"}
MLX |= {"I32": "mlx.core.int32", "U8": "mlx.core.uint8"}


def contents(file: Path) -> tuple[Facts, Arrays]:
    """Read without the code under test."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    facts = json.loads(header.pop("__metadata__")["ahn"])
    arrays = {}
    for name, entry in header.items():
        begin, end = (8 + length + n for n in entry["data_offsets"])
        flat = np.frombuffer(data[begin:end], DTYPES[entry["dtype"]])
        arrays[name] = flat.reshape(entry["shape"]).copy()
    return facts, arrays


def write(file: Path, facts: Any, arrays: Arrays) -> Path:
    """A file of any contents, with a right checksum."""
    text = facts if isinstance(facts, str) else json.dumps(facts)
    names = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
    found = hashlib.sha256(text.encode(errors="surrogatepass"))
    header: dict[str, Any] = {}
    begin = 0
    for name in sorted(arrays):
        x = np.asarray(arrays[name], order="C")
        dtype = names[x.dtype]
        found.update(f"{name} {MLX[dtype]} {x.shape}".encode() + x.tobytes())
        offsets = [begin, begin + x.nbytes]
        header[name] = {"dtype": dtype, "shape": list(x.shape), "data_offsets": offsets}
        begin += x.nbytes
    header["__metadata__"] = {"ahn": text, "sha256": found.hexdigest()}
    raw = json.dumps(header).encode()
    body = b"".join(np.asarray(arrays[name], order="C").tobytes() for name in sorted(arrays))
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + body)
    return file


def offsets(n: int) -> Callable[[Facts, Arrays], None]:
    """All that is said of where the caches stand, said alike."""

    def lie(facts: Facts, arrays: Arrays) -> None:
        facts["tokens"] = n + np.size(arrays.get("tail", ()))
        for layer in facts["layers"]:
            layer[0] = n

    return lie


def layer(at: int, value: Any) -> Callable[[Facts, Arrays], None]:
    return lambda facts, arrays: facts["layers"][1].__setitem__(at, value)


def every(at: int, value: Any) -> Callable[[Facts, Arrays], None]:
    return lambda facts, arrays: [x.__setitem__(at, value) for x in facts["layers"]]


def said(**changes: Any) -> Callable[[Facts, Arrays], None]:
    return lambda facts, arrays: facts.update(changes)


def of_model(**changes: Any) -> Callable[[Facts, Arrays], None]:
    return lambda facts, arrays: facts["model"].update(changes)


def without(name: str) -> Callable[[Facts, Arrays], None]:
    return lambda facts, arrays: arrays.pop(name)


def array(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Facts, Arrays], None]:
    return lambda facts, arrays: arrays.update({name: change(arrays.get(name, np.zeros(1)))})


def holding(name: str, value: float) -> Callable[[Facts, Arrays], None]:
    """One number of an array is another."""
    return lambda facts, arrays: arrays[name].reshape(-1).__setitem__(-1, value)


def full_attention(facts: Facts, arrays: Arrays) -> None:
    facts["layers"][1] = facts["layers"][1][:1]
    for name in ("memory", "trace.0", "trace.1", "2"):
        arrays.pop(f"layers.1.{name}")
        arrays.pop(f"layers.1.tail.{name}")
    for j in "01":
        arrays[f"layers.1.{j}"] = np.zeros((1, 2, 240, 16), np.float32)


def fewer(facts: Facts, arrays: Arrays) -> None:
    facts["layers"].pop()
    for name in [name for name in arrays if name.startswith("layers.2.")]:
        arrays.pop(name)


def quantized(facts: Facts, arrays: Arrays) -> None:
    """As bits and groups would have it that this model's heads are too narrow for."""
    for i, numbers in enumerate(facts["layers"]):
        numbers[3:] = [8, 64]
        for part, slots in ((f"layers.{i}.", 16), (f"layers.{i}.tail.", 3)):
            gates = arrays.pop(f"{part}2")
            for j, (dtype, width) in enumerate(2 * [("u4", 4), ("f4", 1), ("f4", 1)]):
                arrays[f"{part}{j}"] = np.zeros((1, 2, slots, width), dtype)
            arrays[f"{part}6"] = gates


def after_tail(more: int) -> Callable[[Facts, Arrays], None]:
    """Every layer says that the tail has let so many tokens leave the window."""

    def lie(facts: Facts, arrays: Arrays) -> None:
        for i in range(3):
            arrays[f"layers.{i}.tail.trace.0"][1] = arrays[f"layers.{i}.trace.0"][1]
            arrays[f"layers.{i}.tail.trace.0"][1, -1] += more

    return lie


TAIL = "layers.1.tail."
KEYS, STATE, TRACE = "layers.1.0", "layers.1.memory", "layers.1.trace."
float16 = lambda x: x.astype(np.float16)  # noqa: E731
LIES = {
    "a negative offset": (offsets(-2), "where [-2"),
    "an offset beyond what MLX counts": (offsets(2**31), "its tokens"),
    "an offset that is no number": (every(0, "240"), "its layers"),
    "an offset with a fraction": (every(0, 240.0), "its layers"),
    "an offset that is a truth value": (every(0, True), "its layers"),
    "no offset": (every(0, None), "its layers"),
    "another offset in one layer": (layer(0, 239), "layer 1 says"),
    "fewer tokens than the offset": (said(tokens=240), "says"),
    "an offset before the first eviction": (offsets(16), "'layers.0.memory' belongs to no"),
    "an offset of nothing": (offsets(0), "belongs to no"),
    "an offset in the middle of a window of more slots": (offsets(10), "belongs to no"),
    "another window in one layer": (layer(1, 13), "layer 1 says"),
    "other sinks in one layer": (layer(2, 3), "layer 1 says"),
    "negative sinks": (every(2, -4), "layer 0 says"),
    "bits without codes": (every(3, 8), "this model"),
    "bits of one layer": (layer(3, 8), "layer 1 says"),
    "bits that MLX does not have": (every(3, 7), "its layers"),
    "a group of no size": (every(4, 0), "its layers"),
    "groups that do not divide a head": (quantized, "does not divide"),
    "a number too many in a layer": (layer(slice(5, 5), [1]), "its layers"),
    "no layers": (said(layers=[]), "its layers is []"),
    "layers without end": (said(layers=[[1]] * 100_000), "its layers is [[1], [1]"),
    "a layer less": (fewer, "this model's"),
    "full attention where there is a window": (full_attention, "this model's"),
    "fewer slots": (array(KEYS, lambda x: x[:, :, :8]), f"array {KEYS} is F32 [1, 2, 8, 16]"),
    "more slots": (array(KEYS, lambda x: np.tile(x, (1, 1, 64, 1))), f"array {KEYS}"),
    "a slot less": (array(KEYS, lambda x: x[:, :, 1:]), f"array {KEYS} is F32"),
    "fewer heads": (array(KEYS, lambda x: x[:, :1]), f"array {KEYS}"),
    "wider heads": (array(KEYS, lambda x: np.tile(x, 2)), f"array {KEYS}"),
    "two rows": (array(KEYS, lambda x: np.tile(x, (2, 1, 1, 1))), f"array {KEYS}"),
    "a dimension less": (array(KEYS, lambda x: x[0]), f"array {KEYS}"),
    "keys of half precision": (array(KEYS, float16), f"array {KEYS} is F16"),
    "keys that are whole numbers": (array(KEYS, lambda x: x.astype(np.int32)), f"array {KEYS}"),
    "one gate of two": (array("layers.1.2", lambda x: x[..., :1]), "array layers.1.2"),
    "gates of fewer heads": (array("layers.1.2", lambda x: x[:, :2]), "array layers.1.2"),
    "no gates": (without("layers.1.2"), "layers.1.2 is missing"),
    "no state": (without(STATE), f"{STATE} is missing"),
    "a state that is not square": (array(STATE, lambda x: x[..., :8]), f"array {STATE}"),
    "a state of fewer heads": (array(STATE, lambda x: x[:, :2]), f"array {STATE}"),
    "a state of half precision": (array(STATE, float16), f"array {STATE}"),
    "a state that is not a number": (holding(STATE, np.nan), f"array {STATE} holds NaN"),
    "an infinite key": (holding(KEYS, np.inf), f"array {KEYS} holds NaN"),
    "an infinite gate": (holding("layers.1.2", -np.inf), "array layers.1.2 holds NaN"),
    "no trace": (without(TRACE + "0"), f"{TRACE}0 is missing"),
    "half a trace": (array(TRACE + "0", lambda x: x[:1]), f"array {TRACE}0"),
    "a trace longer than the text": (
        array(TRACE + "0", lambda x: np.tile(x, 9)),
        f"array {TRACE}0",
    ),
    "a trace of one block more": (
        array(TRACE + "0", lambda x: np.pad(x, [(0, 0), (0, 1)])),
        f"array {TRACE}0",
    ),
    "a trace of other heads": (array(TRACE + "1", lambda x: x[:, :3]), f"array {TRACE}1"),
    "a trace that is not a number": (holding(TRACE + "1", np.nan), "holds NaN"),
    "negative sums": (holding(TRACE + "1", -1), "layer 1 has negative"),
    "negative strengths": (
        array(TRACE + "0", lambda x: x * np.float32([[-1], [1]])),
        "layer 1 has negative",
    ),
    "counts of parts of tokens": (holding(TRACE + "0", 0.5), "layer 1 counts other"),
    "more tokens in a block than it has": (
        array(TRACE + "0", lambda x: np.float32([x[0], [65, 1, 1, 1]])),
        "layer 1 counts other",
    ),
    "blocks without any token": (array(TRACE + "0", lambda x: 0 * x), "layer 1 counts other"),
    "more tokens traced than written": (
        lambda facts, arrays: [
            arrays[f"layers.{i}.trace.0"].__setitem__((1, slice(None)), 64) for i in range(3)
        ],
        "layer 0 counts other",
    ),
    "a trace of another text": (holding(TRACE + "0", 1), "layer 1 is of another text"),
    "a trace that is far behind": (offsets(2**29), "trace.0 is F32 [2, 4], not F32 [2, 81"),
    "no keys of the tail": (without(TAIL + "0"), f"{TAIL}0 is missing"),
    "no gates of the tail": (without(TAIL + "2"), f"{TAIL}2 is missing"),
    "no state after the tail": (without(TAIL + "memory"), f"{TAIL}memory is missing"),
    "no trace after the tail": (without(TAIL + "trace.1"), f"{TAIL}trace.1 is missing"),
    "a tail of fewer slots": (array(TAIL + "1", lambda x: x[:, :, :2]), "is F32 [1, 2, 2, 16]"),
    "a tail of more slots": (array(TAIL + "1", lambda x: np.tile(x, (1, 1, 2, 1))), TAIL + "1"),
    "a tail of fewer heads": (array(TAIL + "0", lambda x: x[:, :1]), TAIL + "0"),
    "a tail of half precision": (array(TAIL + "0", float16), f"{TAIL}0 is F16"),
    "a tail's state that is not square": (array(TAIL + "memory", lambda x: x[..., :8]), TAIL),
    "a tail that is not a number": (holding(TAIL + "0", np.nan), f"{TAIL}0 holds NaN"),
    "an infinite state after the tail": (holding(TAIL + "memory", np.inf), "holds NaN"),
    "a tail's trace that is not a number": (holding(TAIL + "trace.1", np.nan), "holds NaN"),
    "negative sums after the tail": (holding(TAIL + "trace.1", -1), "after the tail has negative"),
    "a tail's trace of another text": (
        array(TAIL + "trace.0", lambda x: x - np.float32([[0] * 4, [0, 0, 0, 1]])),
        "layer 1 after the tail is of another text",
    ),
    "a tail's trace of less than was traced": (after_tail(-1), "does not go on"),
    "a tail's trace of more than the tail": (after_tail(4), "after the tail counts other"),
    "a tail's trace shorter than the other": (
        lambda facts, arrays: [
            arrays.update({name: x[:, :2]})
            for name, x in arrays.items()
            if name.endswith("tail.trace.0")
        ],
        "does not go on",
    ),
    "what a tail changed, and no tail": (
        lambda facts, arrays: (arrays.pop("tail"), facts.update(tokens=240)),
        "'layers.0.tail.0' belongs to no",
    ),
    "a tail of one token more": (
        lambda facts, arrays: (
            arrays.update(tail=np.zeros(4, np.uint32)),
            facts.update(tokens=244),
        ),
        "array layers.0.tail.0 is F32 [1, 2, 3, 16], not F32 [1, 2, 4, 16]",
    ),
    "a tail in steps of one": (said(step=1), "layer 0 says [240"),
    "an array too many": (array("layers.1.7", lambda x: float16(x)), "'layers.1.7' belongs"),
    "an array of no layer": (array("layers.3.0", lambda x: float16(x)), "'layers.3.0' belongs"),
    "an array by another name": (array("\x1b[2J", lambda x: float16(x)), "'\\x1b[2J' belongs"),
    "an id outside the vocabulary": (holding("tail", 256), "its tail has token 256"),
    "an id that would be negative": (holding("tail", 2**32 - 1), "has token 4294967295"),
    "ids that are not whole": (array("tail", lambda x: x.astype(np.float32)), "array tail"),
    "ids in rows": (array("tail", lambda x: x[None]), "array tail"),
    "ids as a number": (array("tail", lambda x: x[0].reshape(())), "array tail"),
    "no ids": (without("tail"), "layer 0 says [240"),
    "as many ids as a step": (
        lambda facts, arrays: (
            arrays.update(tail=np.zeros(16, np.uint32)),
            facts.update(tokens=256),
        ),
        "array tail is U32 [16], not U32 [1 to 15]",
    ),
    "steps of nothing": (said(step=0), "its step is 0"),
    "negative steps": (said(step=-16), "its step is -16"),
    "steps of everything": (said(step=2**40), "its step is 1099511627776"),
    "a step that is a truth value": (said(step=True), "its step is True"),
    "another turn": (said(turn="later"), "its turn is 'later'"),
    "a turn that is a list": (said(turn=["read"]), "its turn is ['read']"),
    "chat that is a number": (said(chat=1), "its chat is 1"),
    "no system message": (said(system=None), "its system is None"),
    "a system message without end": (said(system="x" * (1 << 21)), "its system is 'xx"),
    "half a letter": (said(system="\ud83d"), "its system is '\\ud83d'"),
    "a preview without end": (said(preview="x" * 201), "its preview is 'xx"),
    "a preview that is a list": (said(preview=["x"]), "its preview is"),
    "a day that is none": (said(saved="now"), "its saved is 'now'"),
    "NaN": (said(saved=float("nan")), "its saved is nan"),
    "no memory's kind": (said(memory="lstm"), "its memory is 'lstm'"),
    "a memory that is a list": (said(memory=["mamba2"]), "its memory is"),
    "no base": (said(base=None), "its base is None"),
    "a base of no dtype": (said(base={"dtype": "int8", "bits": None}), "its base is"),
    "a base of odd bits": (said(base={"dtype": "float16", "bits": True}), "its base is"),
    "texts that are none": (said(texts="book"), "its texts is 'book'"),
    "texts without end": (said(texts=[{"name": "", "read": 0, "tokens": 0}] * 101), "its texts"),
    "a text without a name": (said(texts=[{"read": 0, "tokens": 0}]), "its texts is"),
    "a text of a long name": (
        said(texts=[{"name": "x" * 201, "read": 0, "tokens": 0}]),
        "its texts is",
    ),
    "a text of less than nothing": (
        said(texts=[{"name": "", "read": 0, "tokens": -1}]),
        "its texts is",
    ),
    "fewer texts than none": (said(earlier=-1), "its earlier is -1"),
    "space without end": (said(space=" " * (1 << 17)), "its space is"),
    "a model that is a name": (said(model="model"), "its model is 'model'"),
    "no name": (of_model(name=None), "its model is"),
    "a name without end": (of_model(name="x" * 5000), "its model is"),
    "a name that ends early": (of_model(name="a\0b"), "its model is"),
    "bits of a base that are none": (of_model(q_bits="many"), "its model is"),
    "a dtype that MLX does not have": (of_model(dtype="int3"), "its model is"),
    "a job that nothing is done of": (said(job="x"), "either job or done"),
    "less than nothing done": (said(job="x", done=-1), "its done is -1"),
    "an opening that is a number": (said(opening=5), "its opening is 5"),
    "an opening of numbers": (said(opening=["a", 5]), "its opening is ['a', 5]"),
    "a system message without chat": (said(system="x", chat=False), "there is no chat"),
    "a version that is a truth value": (said(version=True), "version True"),
    "a version that is text": (said(version="1"), "version '1'"),
    "other tokens seen": (
        lambda facts, arrays: arrays.update(seen=np.full(40, 255, np.uint8)),
        "other tokens than",
    ),
    "a tail that was not seen": (
        lambda facts, arrays: arrays.update(seen=0 * arrays["seen"]),
        "not seen the tokens of its tail",
    ),
    "tokens seen in another dtype": (
        lambda facts, arrays: arrays.update(seen=arrays["seen"].astype(np.uint32)),
        "array seen is U32",
    ),
}


@pytest.mark.parametrize(("lie", "message"), LIES.values(), ids=LIES)
def test_a_lie_is_refused_in_one_line(loaded, honest, tmp_path, lie, message):
    facts, arrays = contents(honest)
    lie(facts, arrays)
    refused(loaded, write(tmp_path / "lie.ahn", facts, arrays), message)


def refused(loaded, file: Path, message: str) -> None:
    with pytest.raises(AHNError) as error:
        Session.load(file, *loaded)
    text = str(error.value)
    assert text.startswith(f"{file}: ") and message in text, text
    assert text.isprintable() and len(text) < len(str(file)) + 500


TEXTS = {
    "no object": ("[]", "its version"),
    "a number": ("5", "its version"),
    "text": ('"version"', "its version"),
    "not JSON": ("{", "line 1 column 2"),
    "deep": ("[" * 100_000, "recursion"),
    "a number without end": ('{"version": ' + "1" * 5000 + "}", "digits"),
    "half a letter, as it is": ('{"version": 2, "x": "\ud800"}', "does not say its model"),
    "no end": (" " * (1 << 25), "it says 33,554,432 characters"),
}


@pytest.mark.parametrize(("text", "message"), TEXTS.values(), ids=TEXTS)
def test_a_header_that_says_nothing_sensible(loaded, tmp_path, text, message):
    refused(loaded, write(tmp_path / "lie.ahn", text, {}), message)


def test_half_a_letter_beside_the_facts(loaded, honest, tmp_path):
    facts, arrays = contents(honest)
    text = json.dumps(facts)[:-1] + ', "more": "\ud800"}'
    refused(loaded, write(tmp_path / "lie.ahn", text, arrays), "")


def test_what_the_same_writer_writes_of_the_truth_is_believed(loaded, honest, tmp_path):
    facts, arrays = contents(honest)
    file = write(tmp_path / "truth.ahn", {**facts, "title": "A book"}, arrays)
    memoryfile.verify(file)
    session, same = Session.load(file, *loaded), Session.load(honest, *loaded)
    answers = ["".join(s.ask("Why?", max_tokens=4)) for s in (session, same)]
    assert answers[0] == answers[1]


# What only the model can tell.
OF_THE_MODEL = {
    *("groups that do not divide a head", "a layer less"),
    *("full attention where there is a window", "fewer heads", "wider heads"),
    *("keys of half precision", "one gate of two", "gates of fewer heads"),
    *("a state that is not square", "a state of fewer heads", "a trace of other heads"),
    *("a tail of fewer heads", "a tail of half precision", "a tail's state that is not square"),
    *("an id outside the vocabulary", "an id that would be negative"),
    "other tokens seen",
    "a tail that was not seen",
}


@pytest.mark.parametrize("name", LIES)
def test_without_the_model_numbers_are_checked_too(honest, tmp_path, name):
    facts, arrays = contents(honest)
    LIES[name][0](facts, arrays)
    file = write(tmp_path / "lie.ahn", facts, arrays)
    if name in OF_THE_MODEL:
        memoryfile.verify(file)
        return
    with pytest.raises(AHNError, match=r"lie\.ahn: "):
        memoryfile.verify(file)


def small(memory="gated_deltanet", dtype=mx.float32, quantized=False, window=12, **ahn):
    """A model with heads that can be quantized, and a memory that says something."""
    args = llama.ModelArgs("llama", 64, 3, 64, 2, rms_norm_eps=1e-5, vocab_size=256)
    mx.random.seed(0)
    model = augment(llama.Model(args), AHNConfig(memory, window, 4, "clamped", **ahn))
    for _, attention in memory_layers(model):
        weight = attention.ahn.o_proj.weight
        attention.ahn.o_proj.weight = mx.random.normal(weight.shape)
    cast(model, dtype)
    if quantized:
        nn.quantize(model, 32, 4)
    mx.eval(model.parameters())
    return model


# What a session is made of, and bits of its window.
KINDS = {
    "gated": ({}, None),
    "deltanet": ({"memory": "deltanet"}, None),
    "mamba2, 8 bits": ({"memory": "mamba2"}, 8),
    "bfloat16, 4 bits": ({"dtype": mx.bfloat16}, 4),
    "quantized base": ({"dtype": mx.bfloat16, "quantized": True}, None),
    "router, 3 bits": ({"router": True}, 3),
    "query projection": ({"query_projection": True}, None),
    "a layer of full attention, 8 bits": ({"fa_layer_ids": (0,)}, 8),
    "full attention everywhere": ({"fa_layer_ids": (0, 1, 2)}, None),
}


FEW = ("mamba2, 8 bits", "bfloat16, 4 bits", "router, 3 bits", "query projection")


@pytest.mark.parametrize(
    ("options", "bits"),
    [pytest.param(*of, marks=[] if n in FEW else pytest.mark.slow) for n, of in KINDS.items()],
    ids=KINDS,
)
def test_whatever_is_saved_comes_back_bit_for_bit(loaded, tmp_path, options, bits):
    """Fresh, mid-window, just full, and long."""
    come_back(small(**options), loaded[1], tmp_path, 4, (0, 3, 8, 16, 17, 62), bits)


@pytest.mark.parametrize("bits", [None, 8])
def test_so_does_a_window_that_grows_in_steps(loaded, tmp_path, bits):
    model = small(window=300, fa_layer_ids=(1,))
    come_back(model, loaded[1], tmp_path, 100, (200, 300, 304, 400, 900), bits)


def come_back(model, tokenizer, path, step, lengths, bits) -> None:
    for n in lengths:
        session = Session(model, tokenizer, step=step, kv_bits=bits, kv_group_size=32)
        session.read_ids([7 * t % 256 for t in range(n)])
        again = saved(session, path / "a.ahn")
        for x in (session, again):
            assert list(x.ask("Why?", max_tokens=3))
        assert everything(session) == everything(again)
    saved(session, path / "a.ahn")


def saved(session: Session, file: Path) -> Session:
    """The session of a file that this one has just written; it is the same."""
    session.save(file)
    memoryfile.verify(file)
    again = Session.load(file, session.model, session.tokenizer)
    assert everything(session) == everything(again)
    return again


def everything(session: Session) -> list[Any]:
    """All that a session is."""
    found = []
    for cache in session.caches:
        arrays = [x for _, x in tree_flatten([cache.state]) if isinstance(x, mx.array)]
        arrays += getattr(cache, "trace", None) or ()
        found.append([(str(x.dtype), x.shape, bytes(memoryview(x.view(mx.uint8)))) for x in arrays])
        numbers = ("offset", "window", "sinks", "bits", "group_size")
        found.append([getattr(cache, name, None) for name in numbers])
    template = session.template and session.template.system
    return [*found, session.tail.ids, session.turn, session.step, session.preview, template]


def test_the_tail_of_an_earlier_programs_memory_is_read(loaded, honest, tmp_path):
    """Version 1 kept only its ids."""
    facts, arrays = contents(honest)
    for name in [name for name in arrays if "tail." in name]:
        arrays.pop(name)
    arrays["pending"] = arrays.pop("tail")
    old = {k: v for k, v in facts.items() if k not in ("memory", "base", "texts")}
    file = write(tmp_path / "old.ahn", {**old, "version": 1}, arrays)
    memoryfile.verify(file)
    session = Session.load(file, *loaded)
    assert everything(session) == everything(Session.load(honest, *loaded))
    session.save(file)
    assert {**contents(file)[0], "saved": 0} == {**facts, "saved": 0}
    arrays.pop("pending")
    with pytest.raises(AHNError, match="pending is missing"):
        memoryfile.verify(write(file, {**old, "version": 1}, arrays))


def test_a_memory_of_an_earlier_program_is_read(loaded):
    file = Path(__file__).parent / "memories/version-1.ahn"
    memoryfile.verify(file)
    session = Session.load(file, *loaded)
    assert session.tokens == int(memoryfile.read_facts(file)["tokens"]) > 243
    assert list(session.ask("Why?", max_tokens=3))


def spoil_offset(session: Session) -> None:
    session.caches[0].offset = -5


def spoil_layer(session: Session) -> None:
    session.caches[1].offset = 5


def spoil_keys(session: Session) -> None:
    session.caches[2].buffers = tuple(x[:, :, :8] for x in session.caches[2].buffers)


def spoil_tail(session: Session) -> None:
    session.tail = session.tail._replace(ids=(10**6, *session.tail.ids[1:]))


def spoil_memory(session: Session) -> None:
    session.caches[0].memory *= mx.nan


def spoil_step(session: Session) -> None:
    session.step = 0


@pytest.mark.parametrize(
    "spoil", [spoil_offset, spoil_layer, spoil_keys, spoil_tail, spoil_memory, spoil_step]
)
def test_what_could_not_be_loaded_replaces_no_file(loaded, honest, tmp_path, spoil):
    file = tmp_path / "book.ahn"
    file.write_bytes(honest.read_bytes())
    session = Session.load(file, *loaded)
    spoil(session)
    with pytest.raises(AHNError, match=r"book\.ahn: not written"):
        session.save(file)
    assert file.read_bytes() == honest.read_bytes() and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("step", [0, -1, 1 << 40])
def test_a_session_has_steps_that_a_file_can_have(loaded, step):
    with pytest.raises(AHNError, match="step must be from 1"):
        Session(*loaded, step=step)


def test_the_path_of_a_model_is_found_from_any_directory(loaded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("models/mine").mkdir(parents=True)
    names = {"models/mine": str(tmp_path / "models/mine"), "org/name": "org/name", "": ""}
    names |= {name: name for name in ZOO}
    for name in ZOO:
        Path(name).mkdir()
    for name, kept in names.items():
        Session(*loaded, origin={"name": name}).save("a.ahn")
        assert memoryfile.read_facts(Path("a.ahn"))["model"]["name"] == kept
        assert Session.load("a.ahn", *loaded).origin["name"] == kept


HUGE = 3e38


@pytest.mark.parametrize("name", ["layers.1.memory", "layers.1.trace.1", "layers.1.trace.0"])
def test_a_page_is_drawn_of_numbers_without_sense(loaded, honest, tmp_path, name):
    facts, arrays = contents(honest)
    (arrays[name][0] if name.endswith("trace.0") else arrays[name])[:] = HUGE
    session = Session.load(write(tmp_path / "a.ahn", facts, arrays), *loaded)
    assert drawn(session) == 5
    arrays[name][:1] *= 0
    assert drawn(Session.load(write(tmp_path / "a.ahn", facts, arrays), *loaded)) == 5


def drawn(session: Session) -> int:
    """Maps on a page that have a brightest cell."""
    page = inspect.page(session, "a\udce4").encode().decode()
    bright = f'fill="{pages.color(1)}"'
    return sum(bright in part for part in page.split("<svg")[1:])


def test_no_page_of_what_was_not_counted(loaded):
    model, tokenizer = small(fa_layer_ids=(0, 1, 2)), loaded[1]
    session = Session(model, tokenizer, step=4)
    session.read_ids([7] * 40)
    with pytest.raises(AHNError, match="no layer of the model has a memory"):
        inspect.page(session, "a")
    session = Session(*loaded, step=1)
    session.read_ids([7] * 40)
    with pytest.raises(AHNError, match="token by token"):
        inspect.page(session, "a")


numbers = st.one_of(
    st.integers(-(2**65), 2**65),
    st.integers(-1, 300),
    st.floats(),
    st.sampled_from([None, True, False, "", "8", [], [[]], {}, 2**31 - 1, 2**31, 2**32, 2**63]),
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_whatever_is_changed_it_is_refused_or_goes_on(loaded, honest, tmp_path, data):
    facts, arrays = contents(honest)
    if data.draw(st.booleans()):  # so that more than one number is believable
        offsets(data.draw(st.integers(-(2**31), 2**31)))(facts, arrays)
    if data.draw(st.booleans()):
        change_fact(facts, data)
    if data.draw(st.booleans()):
        change_array(arrays, data)
    goes_on(loaded, write(tmp_path / "lie.ahn", facts, arrays))


def goes_on(loaded, file: Path) -> None:
    try:
        session = Session.load(file, *loaded)
    except AHNError as e:
        assert str(e).startswith(f"{file}: ")
        return
    assert session.tokens >= 0
    assert len(list(session.ask("Why?", max_tokens=2))) > 0


def change_fact(facts: Facts, data: st.DataObject) -> None:
    """One value, at any depth."""
    places = [(facts, key) for key in sorted(facts)]
    places += [(facts["model"], key) for key in sorted(facts["model"])]
    places += [(layer, i) for layer in facts["layers"] for i in range(5)]
    where, key = data.draw(st.sampled_from(places))
    where[key] = data.draw(numbers)


def change_array(arrays: Arrays, data: st.DataObject) -> None:
    """Its dtype, its shape, a number of it, or its name."""
    name = data.draw(st.sampled_from(sorted(arrays)))
    x = arrays[name]
    what = data.draw(st.sampled_from(["dtype", "size", "order", "number", "name"]))
    if what == "dtype":
        x = x.astype(data.draw(st.sampled_from(list(DTYPES.values()))))
    elif what == "size" and x.ndim:
        axis = data.draw(st.integers(0, x.ndim - 1))
        x = np.resize(x, [*x.shape[:axis], data.draw(st.integers(0, 300)), *x.shape[axis + 1 :]])
    elif what == "order":
        x = x.reshape(data.draw(st.permutations(x.shape)))
    elif what == "number" and x.size:
        value = data.draw(st.floats(width=32) if x.dtype.kind == "f" else st.integers(0, 255))
        x.reshape(-1)[data.draw(st.integers(0, x.size - 1))] = value
    elif what == "name":
        del arrays[name]
        name = data.draw(st.sampled_from(["layers.0.0", "layers.9.0", "layers.0.9", ""]))
    arrays[name] = x


def test_a_text_begun_goes_on_only_where_it_was_left(loaded, tmp_path, capsys):
    begun, file = Session(*loaded, step=16), tmp_path / "book.ahn.partial"
    begun.read_ids([7] * 40)
    for done, goes_on_after in ((39, None), (41, None), (40, 40)):
        begun.save(file, job="a", done=done, opening=("Read: ",))
        resumed, facts = _resume(file, Session(*loaded, step=16), "a")
        assert (resumed and resumed.tokens) == goes_on_after
        assert facts.get("opening") == (["Read: "] if goes_on_after else None)
    assert capsys.readouterr().err.count("starting anew") == 2


def test_a_memory_that_names_no_model_asks_for_one(honest):
    facts = memoryfile.read_facts(honest)
    facts["model"]["name"] = ""
    with pytest.raises(AHNError, match="give --model"):
        load_as_read(facts, None)


def test_the_system_message_comes_back(loaded, tmp_path):
    """Also before anything was read: it is what is read first."""
    for text in ("", "It was the best of times."):
        session = Session(*loaded, step=16, system="Be brief.")
        if text:
            session.read(text)
        again = saved(session, tmp_path / "a.ahn")
        assert again.template.system == "Be brief."
        assert again.encode("Hi") == session.encode("Hi")
        assert memoryfile.read_facts(tmp_path / "a.ahn")["system"] == "Be brief."


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_file_says_what_its_base_is(loaded, tmp_path, dtype):
    for quantized in (False, True):
        model = small(dtype=dtype, quantized=quantized)
        Session(model, loaded[1]).save(tmp_path / "a.ahn")
        base = {"dtype": str(dtype).removeprefix("mlx.core."), "bits": 4 if quantized else None}
        assert contents(tmp_path / "a.ahn")[0]["base"] == base


def test_a_session_without_a_template_comes_back_without(loaded, tmp_path):
    session = Session(*loaded, step=16, chat=False)
    session.read("It was the best of times.")
    session.save(tmp_path / "a.ahn")
    again = Session.load(tmp_path / "a.ahn", *loaded)
    assert again.template is None
    assert again.tokenizer.decode(again.encode(" It was")) == " It was"


@pytest.mark.parametrize("more", [[], ["worst"]], ids=["cut otherwise", "a word more"])
def test_another_tokenizer_is_refused(loaded, tmp_path, more):
    """Also one with the same tokens that cuts texts otherwise, or one that only has more."""
    model = small()
    plain = byte_bpe()
    Session(model, chat_tokenizer(bpe=plain)).save(tmp_path / "a.ahn")
    Session.load(tmp_path / "a.ahn", model, chat_tokenizer(bpe=byte_bpe()))
    other = byte_bpe()
    if not more:
        other.normalizer = normalizers.Lowercase()
    with pytest.raises(memoryfile.OtherModel, match="of another tokenizer"):
        Session.load(tmp_path / "a.ahn", model, chat_tokenizer(bpe=other, plain=tuple(more)))


@pytest.mark.parametrize("field", ["rope_theta", "rms_norm_eps"])
def test_a_memory_is_of_a_base_with_its_settings(loaded, tmp_path, field):
    model = small()
    Session(model, loaded[1]).save(tmp_path / "a.ahn")
    setattr(model.args, field, 2 * getattr(model.args, field))
    with pytest.raises(memoryfile.OtherModel, match=r"\(settings differ\)"):
        Session.load(tmp_path / "a.ahn", model, loaded[1])


@pytest.mark.parametrize("settings", [{"sink_positions": "absolute"}, {"memory": "deltanet"}])
def test_a_memory_is_of_a_model_with_its_settings(loaded, tmp_path, settings):
    """Also where their weights are the same."""
    model = small()
    session = Session(model, loaded[1], step=16)
    session.read_ids([7] * 40)
    session.save(tmp_path / "a.ahn")
    model.ahn = replace(model.ahn, **settings)
    with pytest.raises(AHNError, match=r"another model.*\(settings differ\)"):
        Session.load(tmp_path / "a.ahn", model, loaded[1])


def test_settings_of_a_memory_are_said_as_ever():
    """Of a model that has none of the newer ones; whoever digested with it has their files."""
    model = small()
    then = {"memory": "gated_deltanet", "window": 0, "sinks": 0, "sink_positions": "clamped"}
    then |= {"fa_layer_ids": [], "router": False, "query_projection": False}
    assert model_identity(model)["settings"] == hash_of([vars(model.args), then])


def test_a_file_that_another_replaces_is_read_again(tmp_path, monkeypatch):
    """Between its header, which is of the one, and its arrays, of the other."""
    model, tokenizer = load(talking_model("qwen2-gdn", tmp_path), dtype="float32")
    files = [tmp_path / f"{n}.ahn" for n in range(2)]
    for n, file in enumerate(files):
        session = Session(model, tokenizer)
        session.read("call me ishmael" * (n + 1))
        session.save(file)
    expected = Session.load(files[1], model, tokenizer).tokens
    read, there = memoryfile._arrays, tmp_path / "book.ahn"

    def late(file, *rest):
        if files[1].exists():
            files[1].rename(there)
        return read(file, *rest)

    shutil.copy(files[0], there)
    with monkeypatch.context() as patched:
        patched.setattr(memoryfile, "_arrays", late)
        assert Session.load(there, model, tokenizer).tokens == expected
    there.write_bytes(there.read_bytes()[:-1] + b"\xff")
    with pytest.raises(AHNError, match="damaged"):
        memoryfile.verify(there)
