"""Run as one of several processes: what a model whose layers are divided among them computes,
keeps, writes and sends, beside the whole one. Rank 0 prints it."""

import json
import os
import socket
import struct
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import ahn_mlx  # noqa: F401, before MLX

# ruff: isort: split
import mlx.core as mx
from checkpoints import chat_tokenizer
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from several import KINDS, random_model

from ahn_mlx import Session
from ahn_mlx.checkpoints.identity import note_whole
from ahn_mlx.measure import cost
from ahn_mlx.measure.ranks import sent
from ahn_mlx.model.families import tiny_config
from ahn_mlx.model.pipeline import Pipeline
from ahn_mlx.model.ranks import Ranks, join

LAYERS = {"num_hidden_layers": 5, "num_attention_heads": 6, "num_key_value_heads": 6}
IDS = [n * 7 % 256 for n in range(40)]
TEXT = "It was the best of times, it was the worst of times. " * 3


def follow(model: Any, kv_bits: int | None) -> tuple[list[Any], list[int]]:
    """Logits of a prompt in pieces, behind a window that it fills, and ids of a greedy answer."""
    caches = model.make_cache()
    if kv_bits:
        caches = [cache.to_quantized(32, kv_bits) for cache in caches]
    logits = []
    for piece in (IDS[:9], IDS[9:31], IDS[31:32], IDS[32:]):
        logits.append(model(mx.array([piece]), cache=caches))
        mx.eval([cache.state for cache in caches])
    ranks = model.ranks

    def drawn(x: mx.array) -> mx.array:
        x = x.argmax(axis=-1)
        return x if ranks is None else ranks.first(x)

    steps = generate_step(
        mx.array(IDS[:21]),
        model,
        prompt_cache=caches,
        max_tokens=6,
        sampler=drawn,
        prefill_step_size=6,
    )
    return logits, [token for token, _ in steps]


def compared(ranks: Pipeline, name: str, make: Any, kv_bits: int | None = None) -> dict[str, Any]:
    whole, part = make(), make()
    ranks.cut(part)
    theirs, ids = follow(whole, kv_bits)
    ours, said = follow(part, kv_bits)
    weights, all_weights = (
        sum(x.nbytes for key, x in tree_flatten(m.parameters()) if ".layers." in key)
        for m in (part, whole)
    )
    return {
        **{"case": name, "same": said == ids, "weights": weights / all_weights},
        "layers": len(part.run) / len(part.layers),
        "off": max(mx.abs(a - b).max().item() for a, b in zip(ours, theirs, strict=True)),
        "largest": max(mx.abs(x).max().item() for x in theirs),
    }


def logits(ranks: Pipeline) -> list[dict[str, Any]]:
    cases: list[Any] = [(k, s, None, None) for k, s in product(KINDS, ("absolute", "clamped"))]
    cases += [("gated_deltanet", "clamped", 4, 8), ("mamba2", "absolute", 8, 4)]
    found = [
        compared(
            ranks,
            f"{kind} {sinks} base {bits} window {kv_bits}",
            lambda kind=kind, sinks=sinks, bits=bits: random_model(kind, sinks, bits, **LAYERS),
            kv_bits,
        )
        for kind, sinks, bits, kv_bits in cases
    ]
    # A head of its own; masks made by layers of other ranks; a recurrence of mlx-lm's.
    for family in ("helium", "gemma3_text", "qwen3_next"):
        config = {**tiny_config(family), "vocab_size": 265, "num_hidden_layers": 6}
        made = lambda config=config: random_model("deltanet", "clamped", None, **config)  # noqa: E731
        found.append(compared(ranks, family, made))
    return found


def memories(ranks: Pipeline, directory: Path) -> dict[str, Any]:
    """A text read by the whole model and by the divided one, each saved, and asked by the other."""
    tokenizer = chat_tokenizer()
    ahn = {"memory": "gated_deltanet", "window": 32, "sinks": 3, "sink_positions": "clamped"}
    config = {**LAYERS, "ahn": {**ahn, "fa_layer_ids": [1, 4]}}
    whole, part = (random_model("", "", None, **config) for _ in range(2))
    note_whole(part)
    ranks.cut(part)

    def read(model: Any, file: Path) -> None:
        session = Session(model, tokenizer, step=16, kv_bits=8, kv_group_size=32)
        session.read(TEXT)
        session.read(TEXT[:50])
        session.save(file)

    def asked(model: Any, file: Path) -> str:
        session = Session.load(file, model, tokenizer)
        session.read("And then?")
        return "".join(session.ask("Who?", max_tokens=8))

    ours, theirs = directory / "ours.ahn", directory / f"theirs{ranks.rank}.ahn"
    read(part, ours)
    read(whole, theirs)
    answers = {asked(part, file) for file in (ours, theirs)}
    if ranks.rank:
        return {}
    answers |= {asked(whole, file) for file in (ours, theirs)}
    one, other = (mx.load(str(file), format="safetensors") for file in (ours, theirs))
    return {
        "answers": len(answers),
        "arrays": list(one) == list(other),
        "same": all(mx.array_equal(x, other[name]).item() for name, x in one.items()),
    }


# Steps that each rank can read before rank 0 takes anything: of a rank in between one, since what
# it sends has to go before it gets more.
AHEAD = {2: (0, 2), 3: (0, 1, 3)}


def ahead(ranks: Pipeline, directory: Path) -> list[bool]:
    """Whether each rank has read so many steps of a prompt before rank 0 begins. A step's hidden
    states are more than a socket holds."""
    config = {"num_hidden_layers": ranks.size, "hidden_size": 1024, "intermediate_size": 64}
    small = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    model = random_model("gated_deltanet", "clamped", None, **config, **small)
    ranks.cut(model)
    caches, most = model.make_cache(), AHEAD[ranks.size]
    done = [directory / f"read{rank}" for rank in range(ranks.size)]
    if ranks.rank == 0:
        until = time.monotonic() + 60
        while time.monotonic() < until and not all(file.exists() for file in done[1:]):
            time.sleep(0.02)
    found = [file.exists() for file in done[1:]] if ranks.rank == 0 else []
    for step in range(most[-1] + 1):
        if step == most[ranks.rank]:
            done[ranks.rank].touch()
        model(mx.zeros((1, 4096), dtype=mx.int32), cache=caches)
        mx.eval([cache.state for cache in caches])
    ranks.settle()
    return found


class Given:
    """Bytes given to mx.distributed meanwhile."""

    def __enter__(self) -> "Given":
        self.payload = 0
        self.before = {
            name: getattr(mx.distributed, name) for name in ("all_sum", "all_gather", "send")
        }
        for name, call in self.before.items():
            setattr(mx.distributed, name, self._counting(call))
        return self

    def _counting(self, call: Any) -> Any:
        def counted(x: mx.array, *arguments: Any, **named: Any) -> mx.array:
            self.payload += x.nbytes
            return call(x, *arguments, **named)

        return counted

    def __exit__(self, *_: Any) -> None:
        for name, call in self.before.items():
            setattr(mx.distributed, name, call)


def written() -> int:
    """Bytes that this process has given to its TCP connections, as Linux counts them."""
    total = 0
    if sys.platform != "linux":
        return total
    for fd in Path("/proc/self/fd").iterdir():
        if fd.is_symlink() and os.readlink(fd).startswith("socket:"):
            with socket.socket(fileno=os.dup(int(fd.name))) as found:
                if found.type == socket.SOCK_STREAM and found.family == socket.AF_INET:
                    facts = found.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 232)
                    waiting = struct.unpack_from("I", facts, 144)[0]  # tcpi_notsent_bytes
                    sent, again = struct.unpack_from("QQ", facts, 200)  # and tcpi_bytes_retrans
                    total += waiting + sent - again
    return total


def messages(ranks: Ranks, kind: str) -> dict[str, Any]:
    """Bytes for one generated token behind a full window, beside what estimate counts."""
    ahn = {"memory": kind, "window": 12, "sinks": 3, "sink_positions": "clamped"}
    model = random_model("", "", None, **LAYERS, ahn=ahn)
    config = {**vars(model.args), "ahn": ahn}
    shape = cost.shape_of(config)
    ranks.cut(model)
    pipeline = isinstance(ranks, Pipeline)
    caches = model.make_cache()
    mx.eval(model(mx.array([IDS]), cache=caches), [cache.state for cache in caches])
    with Given() as given:  # each layer's step is traced here, for the first time
        token = ranks.first(model(mx.array([[5]]), cache=caches)[:, -1].argmax(axis=-1))
        mx.eval(token, [cache.state for cache in caches])
        if not pipeline:
            ranks.any(False)  # as the command line does
    ranks.settle()
    wire = written()
    for _ in range(10):
        token = ranks.first(model(mx.array([[5]]), cache=caches)[:, -1].argmax(axis=-1))
        mx.eval(token, [cache.state for cache in caches])
        if not pipeline:
            ranks.any(False)  # as the command line does
    ranks.settle()
    wire = written() - wire
    pipeline = isinstance(ranks, Pipeline)
    counted = sent(shape, "ahn", ranks.size, pipeline, number=4)
    assert ranks.size == 2
    return {
        **{"case": f"{kind} {pipeline}", "given": given.payload, "counted": counted.payload},
        **{"wire": wire / 10, "ring": counted.ring},
    }


if __name__ == "__main__":
    directory, *parts = Path(sys.argv[1]), *sys.argv[2:]
    pipeline = join(Pipeline)
    assert isinstance(pipeline, Pipeline)
    found: dict[str, Any] = {}
    if "logits" in parts:
        found["logits"] = logits(pipeline)
    if "memories" in parts:
        found["memories"] = memories(pipeline, directory)
    if "ahead" in parts:
        found["ahead"] = ahead(pipeline, directory)
    if "messages" in parts:
        found["messages"] = [messages(pipeline, kind) for kind in KINDS]
        pipeline.settle()
        heads = Ranks(pipeline.group)
        found["messages"] += [messages(heads, kind) for kind in KINDS]
    print(json.dumps(found))
