"""End tokens: numbers, lists and texts of config.json and of generation_config.json, with a BOM
or without. None is lost, in our own loading and in stock mlx-lm."""

import json
import logging
import warnings
from contextlib import nullcontext
from pathlib import Path

import mlx_lm.utils
import pytest
from checkpoints import BOM, TRAINING, byte_tokenizer, edit_config, make_base, memory_of, read_json
from mlx_lm.tokenizer_utils import load as load_tokenizer
from transformers.utils import logging as transformers_logging

from ahn_mlx import AHNError, load
from ahn_mlx.checkpoints.baseconfig import read_config
from ahn_mlx.checkpoints.convert import convert
from ahn_mlx.checkpoints.export import export_pytorch
from ahn_mlx.checkpoints.formats import describe
from ahn_mlx.checkpoints.tokenizer import load_tokenizer as load_ours
from ahn_mlx.train.output import load_base


def spoken(path: Path) -> set[int]:
    """Where stock mlx-lm stops in a converted directory."""
    config = mlx_lm.utils.load_config(path)
    return load_tokenizer(path, eos_token_ids=config.get("eos_token_id")).eos_token_ids


ENDS = [
    (7, None, [7]),
    ([9, 7], None, [7, 9]),
    (None, 7, [7]),
    (None, [9, 7], [7, 9]),
    (7, [9], [7, 9]),
    (7, 9, [7, 9]),
    ([7, 9], 7, [7, 9]),
    ([7, 11], [9, 7], [7, 9, 11]),
    ("a", None, [64]),
    ("a", ["b", 7], [7, 64, 65]),
    (0, [7], [0, 7]),
]


BOMS = [("config.json",), ("generation_config.json",), ("config.json", "generation_config.json")]


@pytest.mark.parametrize(
    "in_config, in_generation, ends, boms",
    [(*case, ()) for case in ENDS] + [(7, [9], [7, 9], boms) for boms in BOMS],
)
def test_no_end_token_is_lost(in_config, in_generation, ends, boms, tmp_path):
    """In our own loading, and in stock mlx-lm, for which generation_config.json counts."""
    base = make_base(tmp_path / "base")
    edit_config(base, eos_token_id=in_config)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": in_generation}))
    for name in boms:
        (base / name).write_bytes(BOM + (base / name).read_bytes())
    assert read_config(base)["eos_token_id"] == ends
    memory = memory_of(base, tmp_path / "memory")
    convert(base, memory, tmp_path / "out")
    tokenizer = load_base({**TRAINING, "base": str(base)}).tokenizer
    known = {*ends, tokenizer.eos_token_id}  # the tokenizer has one of its own
    assert tokenizer.eos_token_ids == load(tmp_path / "out")[1].eos_token_ids == known
    assert spoken(tmp_path / "out") == known


def test_end_tokens_on_the_way_back(tmp_path):
    """One number stays one, as the release writes it."""
    base = make_base(tmp_path / "base", eos_token_id=7)
    memory = memory_of(base, tmp_path / "memory")
    assert read_json(memory)["eos_token_id"] == 7
    convert(base, memory, tmp_path / "out")
    export_pytorch(tmp_path / "out", tmp_path / "back")
    assert read_json(tmp_path / "back")["eos_token_id"] == 7


@pytest.mark.parametrize(("in_base", "ends"), [(None, [7]), (5, [5]), (0, [0])])
def test_ends_of_the_memorys_config_count_where_the_base_has_none(in_base, ends, tmp_path):
    base = make_base(tmp_path / "base")
    memory = memory_of(base, tmp_path / "memory")
    edit_config(base, eos_token_id=in_base)
    edit_config(memory, eos_token_id=7)
    for path, value in ((base, 0.5), (memory, 0.9)):
        (path / "generation_config.json").write_text(json.dumps({"temperature": value}))
    convert(base, memory, tmp_path / "out")
    assert read_json(tmp_path / "out")["eos_token_id"] == ends
    written = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert written == {"eos_token_id": ends, "temperature": 0.5}


def test_text_of_an_end_token(tmp_path):
    base = make_base(tmp_path / "base", eos_token_id="<|end|>")
    with pytest.raises(AHNError, match=r"config.json: eos_token_id is '<\|end\|>'.*not know"):
        describe(base)
    # Without a vocabulary nobody knows yet.
    (base / "tokenizer.json").unlink()
    assert describe(base)[0]["eos_token_id"] == ["<|end|>"]


@pytest.mark.parametrize("value", [True, {}, [[7]], -1, 1.0, ["a", None, True]])
def test_end_tokens_that_are_none(value, tmp_path):
    base = make_base(tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(AHNError, match=r"generation_config.json: eos_token_id must be"):
        describe(base)


@pytest.mark.parametrize("kind", ["\x1b[31mred\nEVIL", "llama", "qwen3"])
@pytest.mark.parametrize("damaged", [False, True])
def test_nobody_hears_a_config_in_its_own_words(kind, damaged, tmp_path, monkeypatch, recwarn):
    """transformers warns of what is there twice, is old, or of another family, and quotes it."""
    base = byte_tokenizer(tmp_path / "base")
    rope = {"rope_scaling": None, "rope_theta": 1e4}
    config = {"model_type": kind, "bos_token_id": 10**6, "vocab_size": 3, **rope}
    (base / "config.json").write_text(json.dumps(config))
    if damaged:
        (base / "tokenizer.json").write_text("{}")
    heard: list[str] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: heard.append(record.getMessage()))
    logger = transformers_logging.get_logger("transformers")
    logger.addHandler(handler)
    warnings.simplefilter("always")  # also what was said before
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_info()
    try:
        if not damaged:
            load_tokenizer(base, {"trust_remote_code": False})
            assert heard and (recwarn.list or kind in ("llama", "qwen3"))
        heard.clear()
        recwarn.clear()
        with pytest.raises(AHNError) if damaged else nullcontext():
            load_ours(base, {})
        assert transformers_logging.get_verbosity() == transformers_logging.INFO
    finally:
        transformers_logging.set_verbosity(before)
        logger.removeHandler(handler)
    assert not heard and not recwarn.list


def test_json_with_a_bom_is_read_everywhere(tmp_path):
    base = make_base(tmp_path / "base", eos_token_id=7)
    for file in base.glob("*.json"):
        file.write_bytes(BOM + file.read_bytes())
    memory = memory_of(base, tmp_path / "memory")
    (memory / "config.json").write_bytes(BOM + (memory / "config.json").read_bytes())
    convert(base, memory, tmp_path / "out")
    _, ours = load(tmp_path / "out")
    assert ours.encode("window") and ours.apply_chat_template(
        [{"role": "user", "content": "x"}], tokenize=False
    )
    assert spoken(tmp_path / "out") == {7, ours.eos_token_id}
    assert not any(f.read_bytes().startswith(BOM) for f in (tmp_path / "out").glob("*.json"))


@pytest.mark.parametrize("ends", ["a", [1, "a"], ["a", "b"]])
def test_ends_in_words_are_read_beside_any_tokenizer(ends, tmp_path):
    """transformers would take config.json's word for a number."""
    base = make_base(tmp_path / "base", eos_token_id=ends)
    assert load_ours(base, {}).encode("window")
    with pytest.raises(AHNError, match=r"elsewhere: no usable tokenizer; copy tokenizer\.json"):
        (tmp_path / "elsewhere").mkdir()
        load_ours(tmp_path / "elsewhere", {})
