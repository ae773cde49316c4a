"""The repetition penalty over all that was read: transformers' rule, without the text."""

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import talking_model
from mlx_lm.tokenizer_utils import load as load_tokenizer
from transformers import RepetitionPenaltyLogitsProcessor

from ahn_mlx import AHNError, load_model
from ahn_mlx.reading.generate import Run
from ahn_mlx.reading.penalty import WholeTextPenalty, note, nothing_seen, pack, unpack
from ahn_mlx.reading.sampling import Sampling
from ahn_mlx.reading.session import Session
from ahn_mlx.serve.openai import CHAT, wish_of
from ahn_mlx.serve.parameters import parse
from ahn_mlx.serve.sampling import Sampler

TEXT = "It was the best of times, it was the worst of times. " * 4
OLD = {"repetition_penalty": 1.3, "repetition_context_size": 0, "max_tokens": 24}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    path = talking_model("qwen2-gdn", tmp_path_factory.mktemp("model"))
    model, _ = load_model(path, dtype="float32")
    return model, load_tokenizer(path)


def by_hand(model, prompt: list[int], penalty: float, n: int, ends: list[int]) -> list[int]:
    """Greedy answers by the rule, from the ids of all the text."""
    cache, ids, said = model.make_cache(), list(prompt), []
    x = mx.array([prompt])
    while len(said) < n:
        logits = np.array(model(x, cache=cache)[0, -1])
        for i in set(ids):
            logits[i] = logits[i] / penalty if logits[i] >= 0 else logits[i] * penalty
        said.append(int(logits.argmax()))
        ids.append(said[-1])
        if said[-1] in ends:
            break
        x = mx.array([[said[-1]]])
    return said


def test_the_rule_is_that_of_transformers() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    ids, logits = rng.integers(0, 50, 30), rng.normal(size=(1, 50)).astype(np.float32)
    theirs = RepetitionPenaltyLogitsProcessor(1.05)(torch.tensor(ids[None]), torch.tensor(logits))
    ours = WholeTextPenalty(1.05, note(nothing_seen(50), ids[:-1]))
    assert np.allclose(np.array(ours(mx.array(ids), mx.array(logits))), theirs.numpy())


def test_flags_survive_their_packing() -> None:
    seen = note(nothing_seen(259), [0, 7, 8, 255, 258])
    assert np.flatnonzero(unpack(pack(seen), 259)).tolist() == [0, 7, 8, 255, 258]
    assert pack(seen).size == 33


def test_generate_looks_back_over_all_of_the_prompt(loaded) -> None:
    model, tokenizer = loaded
    prompt = list(TEXT.encode())
    said = by_hand(model, prompt, 1.3, 24, list(tokenizer.eos_token_ids))
    run = Run(model, tokenizer, prompt, Sampling(**OLD), step=16)
    assert "".join(run) == tokenizer.decode(said)
    assert tokenizer.decode(said) != "".join(
        Run(model, tokenizer, prompt, Sampling(max_tokens=24), step=16)
    )


def test_a_session_looks_back_over_what_it_read_and_said(loaded, tmp_path) -> None:
    model, tokenizer = loaded
    session = Session(model, tokenizer, step=16)
    session.read(TEXT)
    first = "".join(session.ask("Who?", **OLD))
    prompt = session.encoder(*session.template.question("start", TEXT + "\n\nWho?"))
    said = by_hand(model, prompt, 1.3, 24, list(tokenizer.eos_token_ids))
    assert first == tokenizer.decode(said)
    assert set(np.flatnonzero(session.seen).tolist()) == {*prompt, *said}
    session.save(tmp_path / "a.ahn")
    again = Session.load(tmp_path / "a.ahn", model, tokenizer)
    assert np.array_equal(again.seen, session.seen)
    assert list(again.ask("Why?", **OLD)) == list(session.ask("Why?", **OLD))


def test_cuts_between_readings_change_nothing(loaded) -> None:
    model, tokenizer = loaded
    one, other = Session(model, tokenizer, step=16), Session(model, tokenizer, step=16)
    one.read(TEXT)
    for at in range(0, len(TEXT), 37):
        other.read(TEXT[at : at + 37])
    fork = one.fork()
    list(fork.ask("Zebra?", **OLD))
    assert np.array_equal(one.seen, other.seen)
    assert fork.seen.sum() > one.seen.sum()


def test_a_memory_of_before_says_that_it_does_not_know(loaded) -> None:
    model, tokenizer = loaded
    session = Session(model, tokenizer, step=16)
    session.read(TEXT)
    session.seen = None  # as a file without the array leaves it
    session.read(TEXT)
    with pytest.raises(AHNError, match="does not say which tokens"):
        list(session.ask("Who?", **OLD))
    assert list(session.ask("Who?", max_tokens=3))


def read_chat(**more) -> dict:
    return parse({"model": "x", "messages": [{"role": "user", "content": "x"}], **more}, CHAT)


def test_a_servers_answers_look_back_too() -> None:
    """Logits of 0 and up, so that the penalty divides: 3 was read, then 5 is said."""
    wish = wish_of(read_chat(repetition_penalty=2.0), 8, None)
    sampler = Sampler(wish, 0, note(nothing_seen(8), [3]))
    assert not sampler.plain
    logits = mx.array([0, 1, 2, 9, 4, 5, 0, 0], dtype=mx.float32)
    assert sampler(logits).token.item() == 5
    sampler.took(5)
    assert sampler(logits).token.item() == 3
    assert Sampler(wish_of(read_chat(), 8, None), 0, None).plain
    with pytest.raises(AHNError, match="does not say which tokens"):
        Sampler(wish, 0, None)


@pytest.mark.parametrize("vocabulary", [1, 7, 8, 9, 259])
def test_what_was_seen_is_a_bit_for_each_token(vocabulary: int) -> None:
    seen = note(nothing_seen(vocabulary), [0, vocabulary - 1])
    packed = pack(seen)
    assert packed.shape == (-(-vocabulary // 8),) and packed.dtype == mx.uint8
    assert packed[0].item() & 1 and packed[-1].item() >> (vocabulary - 1) % 8 == 1
    found = unpack(packed, vocabulary)
    assert found.dtype == np.bool_ and found.shape == (vocabulary,)
    assert np.flatnonzero(found).tolist() == sorted({0, vocabulary - 1})
