"""From a checkpoint to a model that can be used, and its tokenizer. Every way in is the same:
describe, build, quantize as given, and take each tensor from the file that has it.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import infer_quant_config

from ..errors import AHNError, show
from ..model.augment import FLOAT32, AHNModel, augment, build_base
from ..model.config import AHNConfig
from ..model.division import Part
from ..model.names import is_memory, published_name, rename_published
from ..model.ranks import Ranks
from ..platform import default_dtype
from .claims import check_layers, check_size
from .directory import Source, unreplaced
from .formats import Reader, describe
from .identity import note_whole
from .safetensors import DTYPES, FLOATS, STORED, WRITTEN, Layout, not_finite, read_part
from .tokenizer import load_tokenizer

# What MLX packs.
GROUPS, BITS = (16, 32, 64, 128), (2, 3, 4, 5, 6, 8)


def load_plain(path: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """Any base, a directory or a GGUF file, as mlx-lm's own model; and its config in the
    normal form. Tensors are read when they are evaluated. Raises AHNError on a bad base.
    """
    path = Path(path)
    config, sources = describe(path)
    check_plain(path, sources)
    model = _base(path, config, sources)
    _fill(model, config, sources, path)
    return model, config


def load_model(
    path: str | Path,
    *,
    window: int | None = None,
    sinks: int | None = None,
    dtype: str | None = None,
    ranks: Ranks | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Load a converted directory, or a merged checkpoint of the PyTorch release.

    window, sinks: override the config's. dtype: "float32", "bfloat16" or "float16";
    by default the checkpoint's own on Metal and float32 on the CPU, where it is fast.
    ranks: of a model that several processes run, of which each keeps its part.
    Returns the model and its config in the normal form. Raises AHNError on a bad directory.

    >>> model, config = ahn_mlx.load_model("path/to/converted/model", window=4096)
    """
    path = Path(path)
    with unreplaced(path):
        config, sources = describe(path)
        ahn = built(path, AHNConfig.from_dict, config)
        if all(map(is_memory, sources)):
            raise AHNError(f"{path}: holds only AHN tensors; convert it with its base model first")
        ahn = replace(
            ahn,
            window=ahn.window if window is None else window,
            sinks=ahn.sinks if sinks is None else sinks,
        )
        config["ahn"] = ahn.to_dict()
        model = build_as(path, config, sources)
        _fill(model, config, sources, path)
        finish(model, dtype, path, ranks)
        return model, config


def load(
    path: str | Path,
    *,
    window: int | None = None,
    sinks: int | None = None,
    dtype: str | None = None,
    ranks: Ranks | None = None,
) -> tuple[nn.Module, TokenizerWrapper]:
    """As load_model, with the tokenizer, as mlx_lm.load returns them."""
    path = Path(path)
    with unreplaced(path):
        model, config = load_model(path, window=window, sinks=sinks, dtype=dtype, ranks=ranks)
        return model, load_tokenizer(path, config)


def built(path: Path, make: Callable[[Any], Any], config: Any) -> Any:
    """What `make` makes of the config. Its AHNError gets the path."""
    try:
        return make(config)
    except AHNError as e:
        raise AHNError(f"{path}: {str(e)[:400]}") from None


def build_as(path: Path, config: dict[str, Any], sources: dict[str, Source]) -> nn.Module:
    """The AHN model that the config of a checkpoint describes, with random parameters. Finding out
    what its attention does computes with it, so that its base is held against the tensors first."""
    return built(path, partial(augment, _base(path, config, sources)), AHNConfig.from_dict(config))


def _base(path: Path, config: dict[str, Any], sources: dict[str, Source]) -> Any:
    """The plain model of a config that claims no more than there is."""
    check_layers(path, config, sources)
    base = built(path, build_base, config)
    check_size(path, base, sources)
    return base


def check_plain(base: Path, sources: dict[str, Source]) -> None:
    """Raise AHNError if a base has a memory already."""
    memory = next((name for name in sources if is_memory(name)), None)
    if memory is not None:
        raise AHNError(f"{base}: holds AHN tensors itself ({show(memory)}); give a plain base")


def _fill(model: nn.Module, config: dict[str, Any], sources: dict[str, Source], path: Path) -> None:
    """Give a new model its tensors, not read until they are used."""
    read = Reader()
    found = fit(model, config, sources, path, path)
    model.load_weights([(name, read(source)) for name, source in found.items()], strict=True)
    model.eval()
    vars(model)["sources"] = found  # of which a rank may read its part


def fit(
    model: nn.Module, config: dict[str, Any], sources: dict[str, Source], base: Path, ahn: Path
) -> dict[str, Source]:
    """The model's parameters, exactly those, by its own names. Layers whose tensors are
    quantized become so. base, ahn: where its parts are. Raises AHNError if they do not fit."""
    layers = model.ahn.fa_layer_ids if isinstance(model, AHNModel) else ()
    sources = rename_published(sources, layers)
    if config["tie_word_embeddings"]:  # mlx_lm drops the weight, and no scales
        sources = {name: s for name, s in sources.items() if not name.startswith("lm_head.")}
    sources = _sanitized(model, config, sources, base)
    _quantize_as_given(model, config, sources, base)
    _check_shapes(model, config, sources, base, ahn)
    return sources


def _sanitized(
    model: nn.Module, config: dict[str, Any], sources: dict[str, Source], base: Path
) -> dict[str, Source]:
    """By the names that mlx_lm gives them. Where it would compute, as when it stacks experts,
    they must be as it leaves them."""
    try:
        return dict(getattr(model, "sanitize", dict)(dict(sources)))
    except (AttributeError, TypeError, KeyError):
        parameters: Any = tree_flatten(model.parameters())
        packed = (".scales", ".biases")
        if {n for n in sources if not n.endswith(packed)} == {name for name, _ in parameters}:
            return sources
    raise AHNError(
        f"{base}: mlx_lm rearranges the tensors of a {config['model_type']} model when it loads"
        " them; write it anew with mlx_lm.convert, and use that"
    )


def _quantize_as_given(
    model: nn.Module, config: dict[str, Any], sources: dict[str, Source], path: Path
) -> None:
    """Make the layers quantized whose tensors are, as mlx_lm does."""
    settings = config.get("quantization")
    if not settings:
        return
    if not any(name.endswith(".scales") for name in sources):
        raise AHNError(f"{path}: config.json says it is quantized, its tensors are not")
    # What mlx_lm asks of a tensor.
    tensors = {
        name: SimpleNamespace(shape=source.info.shape, dtype=STORED.get(source.info.dtype))
        for name, source in sources.items()
    }

    def how(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if path in settings:
            found = settings[path]
        elif hasattr(module, "to_quantized") and f"{path}.scales" in tensors:
            found = infer_quant_config(path, module, tensors)
        else:
            return False
        if isinstance(found, dict):
            _check_groups({**settings, **found})
        return found

    try:
        _check_groups(settings)
        nn.quantize(
            model,
            settings["group_size"],
            settings["bits"],
            mode=settings.get("mode", "affine"),
            class_predicate=how,
        )
    except (ValueError, TypeError, KeyError, IndexError, ZeroDivisionError) as e:
        reason = " ".join(str(e).split())[:200]
        raise AHNError(f"{path}: not quantized as MLX does it ({reason})") from None


def _check_groups(settings: dict[str, Any]) -> None:
    """Raise ValueError for what ends the whole process in MLX: it divides by some of these. None is
    what its mode has."""
    size, bits = settings.get("group_size"), settings.get("bits")
    for value, known in ((size, GROUPS), (bits, BITS)):
        if value is not None and (type(value) is not int or value not in known):
            raise ValueError(f"groups of {show(size)} in {show(bits)} bits")


def _check_shapes(
    model: nn.Module, config: dict[str, Any], sources: dict[str, Source], base: Path, ahn: Path
) -> None:
    """The checkpoint must hold the model's parameters, in their shapes, and no others."""
    kind = f"{config['model_type']} model"
    if isinstance(model, AHNModel):
        kind += f" with {model.ahn.memory} memory"
    parameters: Any = tree_flatten(model.parameters())
    expected = {name: Layout(x.dtype, x.shape) for name, x in parameters}
    for name, (given, file, info) in sorted(sources.items()):
        if name not in expected:
            raise AHNError(f"{file}: unexpected tensor {show(given)}, a {kind} has none")
        needed = expected[name]
        if info.shape != needed.shape:
            raise AHNError(
                f"{file}: tensor {show(given)} has shape {list(info.shape)}, "
                f"this {kind} needs {list(needed.shape)}"
            )
        allowed = FLOATS if mx.issubdtype(needed.dtype, mx.floating) else (WRITTEN[needed.dtype],)
        if info.dtype not in allowed:
            raise AHNError(
                f"{file}: tensor {show(given)} is {info.dtype}, not one of {', '.join(allowed)}"
            )
    missing = sorted(set(expected) - set(sources))
    if missing:
        where = ahn if is_memory(missing[0]) else base
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise AHNError(
            f"{where}: tensor {show(published_name(missing[0]))} of shape "
            f"{list(expected[missing[0]].shape)} is missing{more}, a {kind} needs it"
        )


def finish(model: nn.Module, dtype: str | None, source: Path, ranks: Ranks | None = None) -> None:
    """Cast to the dtype asked for, or the fast one on the CPU, leave what is this rank's, and
    read the weights.

    Raises AHNError naming `source` and the first tensor that holds NaN or infinity.
    """
    if dtype is not None and dtype not in DTYPES:
        raise AHNError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    chosen = DTYPES[dtype] if dtype else default_dtype()
    if chosen is not None:
        cast(model, chosen)
    sources: dict[str, Source] = vars(model).pop("sources", {})
    if ranks is not None:
        note_whole(model)
        parts = built(source, ranks.parts, model)
        built(source, ranks.cut, model)
        _read_parts(model, parts, sources)
    parameters: Any = tree_flatten(model.parameters())
    mx.eval(model.parameters())
    if name := not_finite(parameters):
        raise AHNError(f"{source}: tensor {name} holds NaN or infinity; fetch or convert it again")


def _read_parts(model: nn.Module, parts: dict[str, Part], sources: dict[str, Source]) -> None:
    """Read what a rank has, one tensor after the other: of those that a file has in rows no more
    than that, of others the whole and then its part."""
    parameters: Any = tree_flatten(model.parameters())
    for name, x in parameters:
        source, part = sources.get(name), parts.get(name)
        if source and part and source.file.suffix == ".safetensors" and source.info.dtype in STORED:
            x = read_part(source.file, source.info, part).astype(x.dtype)
            model.load_weights([(name, x)], strict=False)
        mx.eval(x)


def cast(model: nn.Module, dtype: mx.Dtype) -> None:
    """Cast floating-point parameters, except those that stay float32."""

    def convert(path: str, x: mx.array) -> mx.array:
        keep = path.rsplit(".", 1)[-1] in FLOAT32 or not mx.issubdtype(x.dtype, mx.floating)
        return x if keep else x.astype(dtype)

    model.update(tree_map_with_path(convert, model.parameters()))
