"""The tail of a text: nothing waits to be read, and however a text was cut, the same file comes
out. What a file must hold is worked out here, by the rules of docs/memory-format.md."""

import functools
import itertools
import json
import signal
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import chat_tokenizer, talking_model
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm.models import llama

from ahn_mlx import AHNConfig, AHNError, augment, load
from ahn_mlx.cli.digest import digest
from ahn_mlx.model.augment import memory_layers
from ahn_mlx.model.cache import AHNCache
from ahn_mlx.model.trace import Trace
from ahn_mlx.reading import memoryfile
from ahn_mlx.reading.session import Session

TOKENIZER = chat_tokenizer()
# Window and sinks, smaller and larger than steps of 16.
WINDOWS = ((12, 4), (12, 0), (40, 8), (3, 2), (300, 4))


@functools.cache
def made(memory="gated_deltanet", window=12, sinks=4, **ahn):
    """A model with heads that can be quantized, and a memory that says something."""
    args = llama.ModelArgs("llama", 64, 3, 64, 2, rms_norm_eps=1e-5, vocab_size=260)
    mx.random.seed(0)
    model = augment(llama.Model(args), AHNConfig(memory, window, sinks, **ahn))
    for _, attention in memory_layers(model):
        weight = attention.ahn.o_proj.weight
        attention.ahn.o_proj.weight = mx.random.normal(weight.shape)
    mx.eval(model.parameters())
    return model


def ids_of(n: int) -> list[int]:
    return [(7 * t + t // 50) % 256 for t in range(n)]


def begun(model, step: int = 16, bits: int | None = None) -> Session:
    return Session(model, TOKENIZER, step=step, kv_bits=bits, kv_group_size=32)


def contents(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Facts without times and lists of texts, and bytes of arrays."""
    arrays, metadata = mx.load(str(file), format="safetensors", return_metadata=True)
    facts = json.loads(metadata["ahn"])
    facts = {k: v for k, v in facts.items() if k not in ("saved", "texts", "preview")}
    found = {
        name: (str(x.dtype), x.shape, bytes(memoryview(x.view(mx.uint8))))
        for name, x in arrays.items()
    }
    return facts, found


def written(session: Session, file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    session.save(file)
    memoryfile.verify(file)
    return contents(file)


@pytest.mark.parametrize(
    "options",
    [{"memory": "mamba2"}, {"fa_layer_ids": (0, 2)}, pytest.param({}, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize(("window", "sinks"), WINDOWS)
def test_a_file_holds_what_its_description_says(window, sinks, options, tmp_path):
    model = made(window=window, sinks=sinks, **options)
    # The last tail makes the buffers grow.
    for step, n in ((16, 1), (16, 16), (16, 27), (16, 43), (16, 95), (100, 270)):
        session = begun(model, step)
        session.read_ids(ids_of(n))
        session.save(tmp_path / "a.ahn")
        found: dict[str, mx.array] = mx.load(str(tmp_path / "a.ahn"), format="safetensors")
        full = n // step * step
        expected = of_caches(run(model, [*range(0, full, step), full]), "layers.{}.")
        seen = np.zeros(-(-model.args.vocab_size // 8), np.uint8)
        for token in ids_of(n):
            seen[token // 8] |= 1 << token % 8
        expected["seen"] = mx.array(seen)
        if n > full:
            expected["tail"] = mx.array(ids_of(n)[full:], dtype=mx.uint32)
            after = run(model, [*range(0, full, step), full, n])
            for i, cache in enumerate(after):
                expected |= of_tail(i, cache, full, window, sinks)
        assert found.keys() == expected.keys()
        for name, x in expected.items():
            assert found[name].dtype == x.dtype and mx.array_equal(found[name], x), name


def run(model, cuts: list[int]):
    """Caches of a plain run in these pieces."""
    caches = model.make_cache()
    for cache in caches:
        if isinstance(cache, AHNCache):
            cache.trace = Trace.start(2)
    for first, last in itertools.pairwise(cuts):
        if last > first:
            model(mx.array([ids_of(last)[first:]]), cache=caches)
    return caches


def of_caches(caches, name: str) -> dict[str, mx.array]:
    found = {}
    for i, cache in enumerate(caches):
        here = name.format(i)
        if isinstance(cache, AHNCache):
            found |= {f"{here}{j}": x for j, x in enumerate(cache.buffers or ())}
            found |= {f"{here}trace.{j}": x for j, x in enumerate(cache.trace)}
            if cache.offset > cache.window + cache.sinks:
                found[f"{here}memory"] = cache.memory
        elif cache.offset:
            found |= {f"{here}0": cache.keys, f"{here}1": cache.values}
    return found


def of_tail(i: int, cache, first: int, window: int, sinks: int) -> dict[str, mx.array]:
    n = cache.offset
    name = f"layers.{i}.tail."
    if not isinstance(cache, AHNCache):
        return {f"{name}{j}": x[:, :, first:n] for j, x in enumerate((cache.keys, cache.values))}
    kept = [t for t in range(first, n) if t < sinks or t >= n - window]
    slots = [t if t < sinks else sinks + (t - sinks) % window for t in kept]
    found = {f"{name}{j}": x[:, :, mx.array(slots)] for j, x in enumerate(cache.buffers)}
    if n > window + sinks:
        found |= {f"{name}memory": cache.memory}
        found |= {f"{name}trace.{j}": x for j, x in enumerate(cache.trace)}
    return found


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return talking_model("qwen2-gdn", tmp_path_factory.mktemp("model"))


def run_digest(*args: object) -> Any:
    done = CliRunner().invoke(digest, list(map(str, args)), catch_exceptions=False)
    assert done.exit_code in (0, 130), done.output
    return done


@pytest.mark.parametrize("n", [1, 11, 511, 512, 513, 5000])
def test_a_digest_leaves_nothing_unread(directory, n, tmp_path):
    """ask reads the question, and says what the session says that read the text."""
    text = "".join(chr(97 + i * i % 23) for i in range(n))
    (tmp_path / "book.txt").write_text(text)
    options = ("--model", directory, "--ignore-chat-template", "-o", tmp_path / "book.ahn")
    run_digest("--prompt-file", tmp_path / "book.txt", *options)
    model, tokenizer = load(directory)
    read = Session(model, tokenizer, chat=False, step=512)
    read.read(text)
    memory = Session.load(tmp_path / "book.ahn", model, tokenizer)
    assert memory.tokens == read.tokens == n
    seen: list[tuple[int, int]] = []
    for session in (memory, read):
        answer = "".join(
            session.ask("Who is it?", max_tokens=4, progress=lambda *s: seen.append(s))
        )
        assert seen[-1] == (10, 10) and {total for _, total in seen} == {10}
        seen.append((0, 10))
    assert answer and memory.tokens == read.tokens
    again = Session.load(tmp_path / "book.ahn", model, tokenizer)
    assert "".join(again.ask("Who is it?", max_tokens=4)) == answer


ahn = st.fixed_dictionaries(
    {
        "memory": st.sampled_from(["gated_deltanet", "deltanet", "mamba2"]),
        "sink_positions": st.sampled_from(["clamped", "absolute"]),
        "fa_layer_ids": st.sampled_from([(), (0,), (1,), (0, 1, 2)]),
    }
)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    options=ahn,
    window=st.sampled_from(WINDOWS),
    bits=st.sampled_from([None, 8, 4]),
    cuts=st.lists(st.integers(0, 40), max_size=6),
    data=st.data(),
)
def test_however_a_text_is_cut_the_same_file_comes_out(options, window, bits, cuts, data, tmp_path):
    model = made(window=window[0], sinks=window[1], **options)
    ids = ids_of(sum(cuts))
    whole = begun(model, bits=bits)
    whole.read_ids(ids)
    expected = written(whole, tmp_path / "whole.ahn")
    pieces, at = begun(model, bits=bits), 0
    for n in cuts:
        pieces.read_ids(ids[at : at + n])
        at += n
        match data.draw(st.sampled_from(["go on", "load", "fork"])):
            case "load":
                file = tmp_path / "piece.ahn"
                before = written(pieces, file)
                pieces = Session.load(file, model, TOKENIZER)
                assert written(pieces, file) == before
            case "fork":
                other = pieces
                pieces = pieces.fork()
                other.read_ids([3] * data.draw(st.integers(1, 20)))
    assert written(pieces, tmp_path / "pieces.ahn") == expected
    for session in (whole, pieces):
        list(session.ask("Why?", max_tokens=2))
        session.read_ids(ids_of(20))
    end = [written(s, tmp_path / "a.ahn") for s in (whole, pieces)]
    assert end[0] == end[1]


@pytest.mark.parametrize("cut", [1, 15, 16, 40])
def test_a_stopped_digest_goes_on_to_the_same_file(directory, cut, tmp_path, monkeypatch):
    """Stopped at a step, after the end, and over what another text has left."""
    (tmp_path / "one.txt").write_text("It was the best of times. " * cut)
    (tmp_path / "two.txt").write_text("It was the worst of times. " * 60)
    made = []
    for name in ("whole", "stopped"):
        out = tmp_path / f"{name}.ahn"
        run_digest("--prompt-file", tmp_path / "one.txt", "--model", directory, "-o", out)
        append = ("--prompt-file", tmp_path / "two.txt", "-o", out, "--append")
        append += ("--checkpoint-every", 1)
        stops = 0
        with monkeypatch.context() as patch:
            if name == "stopped":
                patch.setattr(Session, "read_ids", stopped_by_a_key(Session.read_ids))
            while run_digest(*append).exit_code == 130:
                stops += 1
        assert stops == (0 if name == "whole" else 4)
        made.append(contents(out))
        assert [t["tokens"] for t in memoryfile.read_facts(out)["texts"]][1:] == [1620]
        assert not out.with_name(f"{name}.ahn.partial").exists()
    assert made[0] == made[1]


def stopped_by_a_key(read_ids):
    """Ctrl-C during each call, as it comes."""

    def read(self, ids, progress=lambda read: None):
        signal.raise_signal(signal.SIGINT)
        read_ids(self, ids, progress)

    return read


def test_what_a_read_adds_to_a_tail_that_was_stopped(tmp_path):
    """An exception from progress leaves the session as after so many ids."""
    model = made()
    for stop_at in (6, 22, 32):
        session, other = begun(model), begun(model)
        for one in (session, other):
            one.read_ids(ids_of(10))

        def stop(read: int, at: int = stop_at) -> None:
            if read == at:
                raise KeyboardInterrupt

        more = ids_of(32)
        with pytest.raises(KeyboardInterrupt):
            session.read_ids(more, stop)
        other.read_ids(more[:stop_at])
        assert written(session, tmp_path / "a.ahn") == written(other, tmp_path / "b.ahn")


def test_a_text_goes_on_without_a_question():
    model = made()
    session = Session(model, TOKENIZER, step=16, chat=False)
    with pytest.raises(AHNError, match="nothing to continue from"):
        next(session.ask(""))
    session.read_ids(ids_of(43))
    fork = session.fork()
    said = "".join(fork.ask("", max_tokens=5))
    caches = run(model, [0, 16, 32])
    logits = model(mx.array([ids_of(43)[32:]]), cache=caches)
    first = int(mx.argmax(logits[0, -1]).item())
    assert said.startswith(TOKENIZER.decode([first]))
    assert fork.tokens > session.tokens == 43


def test_it_costs_one_state_and_not_two():
    """Beside the caches only what the tail has overwritten is held."""
    session = begun(made(window=300, sinks=4))
    session.read_ids(ids_of(16 * 30 + 3))
    held = sum(x.nbytes for past in session.tail.before for x in past.contents)
    buffers = sum(x.nbytes for cache in session.caches for x in cache.buffers)
    assert np.isclose(held / buffers, 3 / 304)
