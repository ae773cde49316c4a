"""One normal form of a config.json, whoever wrote it: transformers 4 or 5, mlx-lm, the PyTorch
release, or what a GGUF file stands for. Every command reads configs through here, so all of
them see the same model. What no model here can run is refused by name.
"""

import math
import os
import re
from pathlib import Path
from typing import Any

from ..errors import AHNError, show
from .directory import read_json

# Counts in config.json and the largest that is not absurd.
LIMITS = {
    "hidden_size": 1 << 20,
    "head_dim": 1 << 12,
    "intermediate_size": 1 << 24,
    "num_hidden_layers": 1000,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 40,
}
# Of parts, by whatever name, at any depth: model files make lists of them. And the most there are.
COUNT = re.compile(r"(?:^|_)(?:n|num)_(?:\w+_)?(?:layers?|experts?|heads?|inputs|groups?|blocks)$")
MOST = 1 << 12
POSITIVE = {"rms_norm_eps": 1.0, "rope_theta": 1e15}
LARGEST = 1 << 63  # of any other number; what libraries take
FACTOR = 1e6  # positions are not stretched further
OBJECTS = (
    *("quantization", "quantization_config", "rope_parameters", "rope_scaling", "text_config"),
    "ahn_release",
)
THETA = 10_000.0  # that transformers assumes; mlx_lm's qwen2 would take another
# Families whose model files pass over settings that change the model.
OWN = ("llama", "qwen2", "qwen3")
# Rope types that count from the positions that the model was trained for.
FROM_TRAINED = ("yarn", "llama3", "longrope")

# A memory trained for one base is noise in another, even if its tensors fit.
SHARED_FIELDS = (
    *("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "intermediate_size", "rope_theta"),
)


def read_config(path: Path) -> dict[str, Any]:
    """The normal form of a directory's config.json: end tokens of generation_config.json
    included, numbers checked for sense. Raises AHNError on a bad file or setting."""
    if not os.path.isdir(path):
        what = "is a file" if os.path.exists(path) else "does not exist"
        raise AHNError(f"{path}: {what}; give a model directory")
    file = path / "config.json"
    if not os.path.lexists(file):
        raise AHNError(f"{path}: not a model directory, it has no config.json")
    return normalise(file, read_json(file))


def normalise(file: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The normal form of a config. What it may have been written as, and what becomes of it:

    rope_theta, rope_scaling, rope_parameters (flat or by type of layer): rope_theta, if any
    is stated, and rope_scaling, None or with rope_type. dtype, torch_dtype: torch_dtype.
    eos_token_id: a sorted list. file: names the culprit; its directory has the other files.
    """
    check_config(file, config)
    config = {**config, **_rope(file, config)}
    if family(config) in OWN:
        config.pop("rope_parameters", None)
    dtype, old = config.pop("dtype", None), config.get("torch_dtype")
    if dtype or old:
        config["torch_dtype"] = str(dtype or old).removeprefix("torch.")
    if config.get("num_key_value_heads") is None and "num_attention_heads" in config:
        config["num_key_value_heads"] = config["num_attention_heads"]
    if ends := _end_tokens(file, config):
        config["eos_token_id"] = ends
    check_config(file, config)
    _check_settings(file, config)
    return config


def family(config: dict[str, Any]) -> str:
    """The model file of mlx-lm that runs it: a mistral is a llama."""
    kind = str(config["model_type"])
    if kind in OWN:
        return kind
    from ..model.augment import family_of  # mlx-lm takes a second

    return family_of(kind)


def has_own_window(config: dict[str, Any]) -> bool:
    """Whether a converted model's base has layers with a window of their own."""
    in_use = config.get("use_sliding_window") is not False
    return family(config) not in OWN and config.get("sliding_window") is not None and in_use


def complete(config: dict[str, Any], tied: bool | None = None) -> dict[str, Any]:
    """A base's normal form with what it leaves unsaid, as transformers takes it."""
    unsaid: dict[str, Any] = {"tie_word_embeddings": bool(tied)}
    if family(config) in OWN:
        unsaid["rope_theta"] = THETA
    return {**config, **{k: v for k, v in unsaid.items() if config.get(k) is None}}


def check_config(file: Path, config: dict[str, Any]) -> None:
    """Raise AHNError if a number that matters makes no sense."""
    if not isinstance(config.get("model_type"), str):
        found = show(config.get("model_type"))
        raise AHNError(f"{file}: model_type must be a name such as qwen2, not {found}")
    for name, limit in LIMITS.items():
        value = config.get(name)
        if value is not None and (type(value) is not int or not 1 <= value <= limit):
            raise AHNError(
                f"{file}: {name} must be a whole number from 1 to {limit}, not {show(value)}"
            )
    for name, largest in POSITIVE.items():
        value = config.get(name)
        if value is not None and not _is_positive(value, largest):
            must = f"{name} must be a positive number of at most {largest:g}"
            raise AHNError(f"{file}: {must}, not {show(value)}")
    for name in OBJECTS:
        # mlx_lm looks into text_config without asking whether it is null
        allowed = dict if name == "text_config" else dict | None
        if not isinstance(config.get(name, {}), allowed):
            raise AHNError(f"{file}: {name} must be an object, not {show(config[name])}")
    types = config.get("layer_types")
    if types is not None and not (isinstance(types, list) and all(type(t) is str for t in types)):
        raise AHNError(f"{file}: layer_types must be a list of names, not {show(types)}")
    if not isinstance(config.get("architectures"), list | str | None):
        found = show(config["architectures"])
        raise AHNError(f"{file}: architectures must be a list of names, not {found}")
    if not isinstance(config.get("tie_word_embeddings"), bool | None):
        found = show(config["tie_word_embeddings"])
        raise AHNError(f"{file}: tie_word_embeddings must be true or false, not {found}")
    _check_numbers(file, config)


def _is_positive(value: Any, largest: float) -> bool:
    # type() and not isinstance(): true is an int in Python
    return type(value) in (int, float) and 0 < value <= largest


def _check_numbers(file: Path, config: dict[str, Any]) -> None:
    """No number in it is one that no setting can be, whatever reads it: NaN, or endless. Some
    settings are infinite."""
    left = list(config.items())
    while left:
        name, value = left.pop()
        if isinstance(value, dict):
            left += value.items()
        elif isinstance(value, list):
            left += ((name, x) for x in value)
        elif (isinstance(value, int) and abs(value) > LARGEST) or value != value:
            raise AHNError(f"{file}: {show(name)} is no setting, it is {show(value)}")
        elif type(value) is int and value > MOST and COUNT.search(name):
            raise AHNError(f"{file}: {show(name)} must be at most {MOST:,}, not {show(value)}")


def _rope(file: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings where mlx_lm looks for them. transformers 5 nests them in rope_parameters,
    perhaps one entry for each type of layer: those in use must agree, as mlx_lm's models have
    one for all."""
    parameters = config.get("rope_parameters") or {}
    others = family(config) not in OWN
    entries = {name: x for name, x in parameters.items() if isinstance(x, dict)}
    if not entries:
        return _rope_of(file, config, parameters)
    if others:
        return {"rope_scaling": config.get("rope_scaling")}  # for its model file to read
    used = sorted(set(map(str, config.get("layer_types") or entries)))
    found = [_rope_of(file, config, entries.get(name, {})) for name in used]
    for name, rope in zip(used, found, strict=True):
        if rope != found[0] or name not in entries:
            raise AHNError(
                f"{file}: rope_parameters of {show(used[0])} and {show(name)} layers differ;"
                " such a model is not supported"
            )
    return found[0]


def _rope_of(file: Path, config: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """As _rope. rope_scaling counts where both are given, as it is what cards say to add."""
    scaling = dict(config.get("rope_scaling") or given)
    thetas = [x for x in (d.get("rope_theta") for d in (config, given, scaling)) if x is not None]
    kinds = [scaling.pop(name, None) for name in ("rope_type", "type")]
    kinds = ["default" if kind == "mrope" else kind for kind in kinds if kind is not None]
    for name, stated in (("rope_theta", thetas), ("rope_type", kinds)):
        if any(x != stated[0] for x in stated):
            two = f"{show(stated[0])} and {show(stated[-1])}"
            raise AHNError(f"{file}: {name} is stated twice, as {two}; remove one")
    factor: Any = scaling.get("factor")
    if factor is not None and not _is_positive(factor, FACTOR):
        must = f"factor of RoPE must be a positive number of at most {FACTOR:g}"
        raise AHNError(f"{file}: {must}, not {show(factor)}")
    if factor is not None and not kinds:
        raise AHNError(f"{file}: rope_scaling has a factor and no rope_type")
    found: dict[str, Any] = {"rope_scaling": None}
    if thetas:
        found["rope_theta"] = thetas[0]
    scaling.pop("rope_theta", None)
    if (part := scaling.pop("partial_rotary_factor", None)) is not None:
        found["partial_rotary_factor"] = part
    if kinds and kinds[0] != "default":
        trained = config.get("original_max_position_embeddings")
        if kinds[0] in FROM_TRAINED and trained is None:
            trained = scaling.get("original_max_position_embeddings")
            trained = config.get("max_position_embeddings") if trained is None else trained
        if trained is not None:
            scaling["original_max_position_embeddings"] = trained
        found["rope_scaling"] = {**scaling, "rope_type": kinds[0]}
    return found


def _end_tokens(file: Path, config: dict[str, Any]) -> list[Any]:
    """Those of config.json and of generation_config.json: numbers, sorted; and texts of tokens
    where no vocabulary tells their numbers."""
    stated = [(file, config.get("eos_token_id"))]
    generation = file.parent / "generation_config.json"
    if file.name == "config.json" and os.path.lexists(generation):
        stated.append((generation, read_json(generation).get("eos_token_id")))
    numbers: set[int] = set()
    texts: set[str] = set()
    for where, value in stated:
        for end in value if isinstance(value, list) else [value]:
            if isinstance(end, str):
                number = _number(where, end)
                if number is None:
                    texts.add(end)
                else:
                    numbers.add(number)
            elif type(end) is int and 0 <= end < LIMITS["vocab_size"]:
                numbers.add(end)
            elif end is not None:
                raise AHNError(f"{where}: eos_token_id must be numbers of tokens, not {show(end)}")
    return [*sorted(numbers), *sorted(texts)]


def _number(file: Path, text: str) -> int | None:
    """A token's number in the vocabulary beside the file, if there is one."""
    from .tokenizer import has_vocabulary, load_tokenizer

    if not has_vocabulary(file.parent):
        return None
    vocabulary = load_tokenizer(file.parent, {}).get_vocab()
    if text not in vocabulary:
        raise AHNError(f"{file}: eos_token_id is {show(text)}, which the tokenizer does not know")
    return vocabulary[text]


def _check_settings(file: Path, config: dict[str, Any]) -> None:
    """Refuse what mlx_lm's classes pass over in silence, and which changes the model."""
    if family(config) not in OWN:
        return  # what mlx-lm's model file reads is what there is
    kind = config["model_type"]
    wide, heads = config.get("hidden_size") or 0, config.get("num_attention_heads") or 1
    scaling = config["rope_scaling"] or {}
    factor: Any = scaling.get("factor")
    # What mlx_lm's YaRN multiplies by when nothing else is asked for.
    usual = 0.1 * math.log(factor) + 1 if type(factor) in (int, float) and factor > 1 else 1.0
    passed_over = {
        "hidden_act": config.get("hidden_act") not in (None, "silu", "swish"),
        "partial_rotary_factor": config.get("partial_rotary_factor") not in (None, 1),
        "attention_bias": kind == "qwen3" and bool(config.get("attention_bias")),
        "head_dim": kind == "qwen2" and config.get("head_dim") not in (None, wide // heads),
        "layer_types": config.get("layer_types") is not None and not _full_attention(config),
        "use_sliding_window": _slides(config),
    }
    for name, wrong in passed_over.items():
        if wrong:
            found = show(config[name])
            raise AHNError(f"{file}: a {kind} model with {name} {found} is not supported")
    if scaling.get("rope_type") == "yarn":
        attention = scaling.get("attention_factor")
        for name, wrong in {
            "attention_factor": attention is not None and not _near(attention, usual),
            "truncate": scaling.get("truncate") is False,
        }.items():
            if wrong:
                found = show(scaling[name])
                raise AHNError(f"{file}: rope_scaling with {name} {found} is not supported")


def _near(value: Any, other: float) -> bool:
    return type(value) in (int, float) and math.isclose(value, other, rel_tol=1e-3)


def _full_attention(config: dict[str, Any]) -> bool:
    """Whether layer_types has one entry for each layer, all of full attention, or of a window
    that is not in use."""
    types, layers = config["layer_types"], config.get("num_hidden_layers")
    if not isinstance(types, list) or len(types) != layers:
        return False
    unused = family(config) != "llama" and not config.get("use_sliding_window")
    known = ("full_attention", "sliding_attention") if unused else ("full_attention",)
    return all(kind in known for kind in types)


def _slides(config: dict[str, Any]) -> bool:
    """Whether Qwen's own window is in use. A memory's window has its name."""
    if family(config) == "llama" or "_ahn_implementation" in config or "ahn" in config:
        return False
    if not config.get("use_sliding_window"):
        return False
    if "sliding_window" in config and config["sliding_window"] is None:  # unsaid, it is 4,096
        return False
    if config.get("layer_types") is not None:
        return False  # judged by themselves
    first = config.get("max_window_layers", 28)
    return type(first) is not int or first < (config.get("num_hidden_layers") or 0)


def check_same_base(
    base: Path, config: dict[str, Any], ahn: Path, ahn_config: dict[str, Any]
) -> None:
    """Raise AHNError if a memory was trained on another base, by the normal forms of both."""
    differing = [
        name
        for name in SHARED_FIELDS
        if None not in (config.get(name), ahn_config.get(name)) and config[name] != ahn_config[name]
    ]
    # A base may be stretched after the training, but not shrunk.
    if ahn_config.get("rope_scaling") not in (None, config.get("rope_scaling")):
        differing.append("rope_scaling")
    for name in differing:
        raise AHNError(
            f"{ahn}: was trained for another base, {name} is {show(ahn_config[name])} there "
            f"and {show(config.get(name))} in {base}"
        )


def check_quantization(path: Path, config: dict[str, Any]) -> None:
    """None, or MLX's own. mlx_lm would try to unpack what other programs write."""
    quantization = config.get("quantization")
    if quantization is None:
        foreign = config.get("quantization_config") is not None
        if foreign or os.path.lexists(path / "hf_quant_config.json"):
            raise AHNError(f"{path}: quantized, but not by MLX; use the unquantized model")
        return
    for name in ("bits", "group_size"):
        value = quantization.get(name)
        if type(value) is not int or not 1 <= value <= 1024:
            file = path / "config.json"
            raise AHNError(f"{file}: {name} under quantization is {show(value)}, not a number")
