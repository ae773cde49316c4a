"""What a model has remembered of a text, and what a training goes on from."""

import dataclasses
import json
import math
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
from checkpoints import chat_tokenizer

import ahn_mlx
from ahn_mlx.checkpoints.directory import load_safetensors
from ahn_mlx.checkpoints.safetensors import STORED, bits
from ahn_mlx.model.augment import build_base
from ahn_mlx.model.families import tiny_config
from ahn_mlx.reading import inspect, memoryfile
from ahn_mlx.reading.layout import FACTS, OPTIONAL, SINCE_2
from ahn_mlx.reading.session import Session
from ahn_mlx.train import loop, metrics, validation
from ahn_mlx.train.settings import Settings, Window, draw_window

from ..mutate import of_json, of_lines
from ..oracle import Target, also

WORDS = (
    *FACTS,
    *SINCE_2,
    *OPTIONAL,
    *("version", "seen", "tail", "pending", "layers.0.0", "layers.0.memory", "layers.1.trace.0"),
    *("layers.0.tail.0", "layers.0.tail.memory", "start", "read", "answered", "cut", "name"),
    *("dtype", "q_bits", "ahn", "F32", "F16", "U32", "U8", "talked", "float32", "gated_deltanet"),
)
SETTINGS = tuple(field.name for field in dataclasses.fields(Settings))


# Which layers a model has, beside some with a memory.
KINDS = {
    "plain": ("", {}),
    "wide": ("llama", {"fa_layer_ids": (1,)}),  # one that keeps all
    "rings": ("gemma3_text", {}),  # windows of its own
    "states": ("lfm2", {}),
}


@cache
def model(kind: str = "plain") -> Any:
    """Small, with a memory that is heard, and the tokenizer of bytes."""
    import serving

    family, layers = KINDS[kind]
    if not family:
        return serving.model(window=12), chat_tokenizer()
    mx.random.seed(4)
    base = build_base({**tiny_config(family), "vocab_size": 259})
    made = ahn_mlx.augment(base, ahn_mlx.AHNConfig("deltanet", 12, 4, "clamped", **layers))
    mx.eval(made.parameters())
    made.eval()
    return made, chat_tokenizer()


def _described(file: Path) -> dict[str, Any]:
    """A file as JSON: its facts, and of each array dtype, shape and numbers."""
    facts, metadata = mx.load(str(file), format="safetensors", return_metadata=True)  # type: ignore[misc]
    names = {dtype: text for text, dtype in STORED.items()}
    arrays = {k: [names[x.dtype], list(x.shape), None] for k, x in facts.items()}
    return {"of": file.stem, "facts": json.loads(metadata["ahn"]), "arrays": arrays}


@cache
def _honest() -> dict[str, tuple[Path, dict[str, Any]]]:
    """Memories of a text in the middle of a window, beyond it, with a tail and quantized."""
    made = {}
    place = Path(tempfile.mkdtemp())
    for name, tokens, options in (
        *(("short", 9, {}), ("full", 64, {}), ("long", 75, {}), ("plain", 40, {"chat": False})),
        ("packed", 75, {"kv_bits": 8, "kv_group_size": 32}),
        *((f"{kind}-{n}", n, {}) for kind in ("wide", "rings", "states") for n in (9, 64, 75)),
    ):
        session = Session(*model(_kind(name)), step=16, origin={"name": "model"}, **options)
        session.read_ids([7 * t % 256 for t in range(tokens)])
        session.preview = "It was"
        file = place / f"{name}.ahn"
        session.save(file)
        made[name] = (file, _described(file))
    return made


def _kind(name: Any) -> str:
    kind = str(name).partition("-")[0]
    return kind if kind in KINDS else "plain"


@cache
def _numbers(name: str) -> dict[str, mx.array]:
    found = load_safetensors(_honest()[name][0])
    mx.eval(found)
    return found


def _arrays(name: Any, given: Any) -> dict[str, mx.array]:
    """What JSON describes, as far as there is such a thing; null are the honest numbers."""
    known = _numbers(name if name in _honest() else "long")
    found: dict[str, mx.array] = {}
    for name, about in given.items() if isinstance(given, dict) else ():
        try:
            kind, shape, fill = about
            shape = tuple(shape)
            if not all(0 <= n < 4096 for n in shape) or math.prod(shape) > 1 << 16:
                continue
            real = known.get(name)
            x = real if fill is None and real is not None and real.shape == shape else None
            x = mx.full(shape, fill or 0) if x is None else x
            found[str(name)] = x.astype(STORED[kind])
        except (ValueError, TypeError, KeyError, OverflowError):
            continue
    return found


def _memory(data: bytes, place: Path) -> tuple[Path, str]:
    """JSON is a file with a right checksum; anything else is the file itself. Also which model it
    is for."""
    file, kind = place / "book.ahn", "plain"
    file.unlink(missing_ok=True)  # MLX may have mapped the one before
    try:
        given = json.loads(data)
        text = json.dumps(given["facts"], sort_keys=True)
        arrays, kind = _arrays(given.get("of"), given["arrays"]), _kind(given.get("of"))
        metadata = {"format": "mlx", "ahn": text, "sha256": memoryfile._checksum(text, arrays)}
        mx.save_safetensors(str(place / "book"), arrays, metadata)
        (place / "book.safetensors").replace(file)
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError, AttributeError):
        file.write_bytes(data)
    return file, kind


def _load(given: tuple[Path, str], place: Path, out: Path) -> None:
    file, kind = given
    for other in (place, place / "none.ahn"):
        with also():
            memoryfile.read_facts(other)
    memoryfile.is_memory(file)
    memoryfile.read_facts(file)
    memoryfile.verify(file)
    memoryfile.load(file, *model(kind))


def _go_on(given: tuple[Path, str], place: Path, out: Path) -> None:
    """What a user does with it: look, ask, read more, save."""
    file, kind = given
    session = Session.load(file, *model(kind))
    if file.stat().st_size % 3 == 0:
        with also():
            session.read("More of it. " * 3, name="more")
    with suppress(ahn_mlx.AHNError):
        inspect.page(session, file.name)
    if session.template is not None:
        for _ in session.ask("Why?", max_tokens=2, temp=0.0):
            pass
    session.fork().read("And then?", name="more")
    session.save(out / "again.ahn")
    memoryfile.verify(out / "again.ahn")
    if file.stat().st_size % 4 == 0:
        Session.load(out / "again.ahn", *model(kind)).save(out / "third.ahn")
        _same(out / "again.ahn", out / "third.ahn")


def _same(*files: Path) -> None:
    """What is loaded and saved again is the same."""
    facts, arrays = [], []
    for file in files:
        found, metadata = mx.load(str(file), format="safetensors", return_metadata=True)  # type: ignore[misc]
        facts.append({**json.loads(metadata["ahn"]), "saved": 0})
        arrays.append({name: bits(x).tobytes() for name, x in found.items()})
    assert facts[0] == facts[1], facts
    assert arrays[0].keys() == arrays[1].keys()
    for name, x in arrays[0].items():
        assert x == arrays[1][name], name


def memories() -> list[bytes]:
    found = [json.dumps(described).encode() for _, described in _honest().values()]
    return [*found, min((f.read_bytes() for f, _ in _honest().values()), key=len)]


# Trainings


@cache
def _trained() -> tuple[Any, Path, dict[str, Any]]:
    """A trainer, and what it has saved after a step."""
    from test_training import SETTINGS as usual

    class Data:
        def of(self, length: int) -> "Data":
            return self

        def __getitem__(self, n: int) -> mx.array:
            return mx.arange(64)[None] * (2 * n + 7) % 256

    plan = dataclasses.replace(usual, steps=3, seq_len=64, window=12, sinks=4, layerwise=0)
    trainer = loop.Trainer(model()[0], Data(), plan)  # type: ignore[arg-type]
    trainer.train_step()
    place = Path(tempfile.mkdtemp())
    trainer.save(place)
    arrays, facts = mx.load(str(place / loop.STATE), return_metadata=True)  # type: ignore[misc]
    mx.eval(arrays)
    return trainer, place, {"settings": json.loads(facts["settings"]), "step": facts["step"]}


def _state(data: bytes, place: Path) -> Path:
    """JSON has settings, step, and arrays that are other than honest ones: null for none, or a
    number to fill one with, or its shape."""
    file = place / loop.STATE
    file.unlink(missing_ok=True)
    _, honest, _ = _trained()
    try:
        given = json.loads(data)
        arrays: dict[str, mx.array] = dict(mx.load(str(honest / loop.STATE)))
        for name, change in given.get("arrays", {}).items():
            if change is None:
                arrays.pop(name, None)
            elif isinstance(change, list):
                arrays[name] = mx.zeros([min(n, 64) for n in change])
            else:
                old = arrays.get(name, mx.zeros((2,)))
                arrays[name] = mx.full(old.shape, change).astype(old.dtype)
        step = given["step"] if isinstance(given["step"], str) else json.dumps(given["step"])
        metadata = {"settings": json.dumps(given["settings"]), "step": step}
        mx.save_safetensors(str(file), arrays, metadata)
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError, AttributeError):
        file.write_bytes(data)
    return file


def _resume(file: Path, place: Path, out: Path) -> None:
    trainer, _, _ = _trained()
    plan = Settings(**loop.read_settings(place)[0])
    for step in range(3):
        drawn = draw_window(plan, step)
        assert drawn.window > 0 <= drawn.sinks and drawn.window + drawn.sinks < drawn.seq_len
    with also():
        trainer._resume(place)


def trainings() -> list[bytes]:
    _, _, known = _trained()
    name = "parameters.model.layers.0.self_attn.ahn.gain"
    return [
        json.dumps(known).encode(),
        json.dumps({**known, "arrays": {name: 1.0, "x": [2]}}).encode(),
        json.dumps({**known, "arrays": {name.replace("gain", "o_proj.weight"): None}}).encode(),
    ]


def _lines(data: bytes, place: Path) -> None:
    for name in (metrics.METRICS, validation.VALIDATION):
        (place / name).write_bytes(data)


def _metrics(_: None, place: Path, out: Path) -> None:
    with suppress(ahn_mlx.AHNError):  # as a run that goes on after its first step
        metrics.Metrics(place / metrics.METRICS, 1).write(1, 0.5, 8, Window(4, 1, 8))
    validation.read_validation(place / validation.VALIDATION)


TARGETS = [
    Target(
        "memory",
        _memory,
        _load,
        memories,
        ("reading/memoryfile.py", "reading/layout.py", "checkpoints/safetensors.py"),
        WORDS,
        of_json(WORDS),
        longest=1 << 16,
    ),
    Target(
        "memory-session",
        _memory,
        _go_on,
        memories,
        (
            *("reading/memoryfile.py", "reading/layout.py", "reading/tail.py"),
            "checkpoints/safetensors.py",
        ),
        WORDS,
        of_json(WORDS),
        longest=1 << 16,
    ),
    Target(
        "training",
        _state,
        _resume,
        trainings,
        ("train/settings.py", "train/metrics.py"),
        SETTINGS,
        of_json(SETTINGS),
    ),
    Target(
        "metrics",
        _lines,
        _metrics,
        lambda: [
            b'{"step": 0, "loss": 2.5, "window": 8}\n{"step": 1, "loss": 2.25}\n',
            b'{"step": 1, "kl": 0.5, "window_kl": 0.75}\n{"step": 2, "kl": 0.25, "window_kl": 1.5}',
        ],
        ("train/metrics.py",),
        ("step", "loss", "kl", "window_kl", "NaN", "1e999", "\n", "null"),
        of_lines(("step", "loss", "kl", "window_kl", "window")),
    ),
]
