"""How many launches a GPU would need, counted on any machine from MLX's own graph.

MLX takes its fused operations apart where there is no GPU, so stand-ins take their place
while a graph is built: one node of the right shape that hangs on its inputs. Nothing of
such a graph is meant to be evaluated.
"""

import io
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import qwen2
from mlx_lm.models.cache import RotatingKVCache

from ahn_mlx import AHNConfig, augment
from ahn_mlx.model.attention import AHNAttention
from ahn_mlx.model.augment import FLOAT32
from ahn_mlx.model.cache import AHNCache
from ahn_mlx.ops import kernels
from ahn_mlx.train import loop, streams
from ahn_mlx.train.settings import Settings

# Another look at the same memory, or nothing at all. Of Reshape, Flatten and Contiguous that is
# not always so, and the copies they then make are not counted.
VIEWS = {
    *("AsStrided", "Broadcast", "BroadcastAxes", "Contiguous", "Copy", "CustomTransforms"),
    *("Depends", "ExpandDims", "Flatten", "NumberOfElements", "Reshape", "Slice", "Split"),
    *("Squeeze", "StopGradient", "Transpose", "Unflatten", "View"),
}

# MLX launches a copy for each part that it joins, fills before it pads, and adds up an offset
# that is an array with a kernel of its own.
SEVERAL = {"DynamicSlice": 2, "DynamicSliceUpdate": 2, "Pad": 2}

_NODE = re.compile(r'\{ \d+ \[label ="(\w+)"')
_INPUT = re.compile(r'"(\w+)" -> \d+')


class Launches:
    """Stand-ins for what is one launch, and the counter of a graph that has them."""

    def __init__(self) -> None:
        self.marks: dict[str, mx.array] = {}  # by name of what is stood in for

    def one(self, name: str, like: Sequence[mx.array], inputs: Sequence[Any]) -> list[mx.array]:
        """Arrays like these, of one launch that needs the inputs."""
        mark = self.marks.setdefault(name, mx.array([float(len(self.marks))]))
        empty = [mx.broadcast_to(mx.array(0, dtype=x.dtype), x.shape) for x in like]
        mx.eval(mark, empty)
        needed = [x for x in inputs if isinstance(x, mx.array)]
        return mx.depends([*empty, mark], needed)[:-1]

    def count(self, outputs: Any) -> Counter[str]:
        """Launches by name, of all that these arrays need and that is not evaluated."""
        flat: Any = tree_flatten(outputs)
        text = io.StringIO()
        arrays = [x for _, x in flat if isinstance(x, mx.array)]
        mx.export_to_dot(text, *arrays, **self.marks)
        found: Counter[str] = Counter()
        for name, inputs in _nodes(text.getvalue()):
            stood_for = [x for x in inputs if x in self.marks]
            if stood_for:
                found[stood_for[0]] += 1
            elif name == "Concatenate":
                found[name] += len(inputs)
            elif name not in VIEWS:
                found["Compiled" if name.startswith("Compiled") else name] += SEVERAL.get(name, 1)
        return found

    def differentiable(self, name: str) -> Callable[..., mx.array]:
        """Of a fused operation whose result is like its first input; its gradient is one too."""

        def call(*args: Any, **options: Any) -> mx.array:
            arrays = [x for x in (*args, *options.values()) if isinstance(x, mx.array)]

            @mx.custom_function
            def fused(*given: mx.array) -> mx.array:
                return self.one(name, given[:1], given)[0]

            @fused.vjp
            def _(primals: Any, cotangents: Any, outputs: Any) -> Any:
                # Of one argument MLX gives the array itself.
                given = (primals,) if isinstance(primals, mx.array) else primals
                like = self.one(f"{name}VJP", given, (*given, cotangents))
                return like[0] if isinstance(primals, mx.array) else tuple(like)

            result: Any = fused(*arrays)
            return result

        return call

    def metal_kernel(self, name: str, *args: Any, **options: Any) -> Callable[..., list[mx.array]]:
        """As mx.fast.metal_kernel."""

        def call(
            *, inputs: Any, output_shapes: Any, output_dtypes: Any, **options: Any
        ) -> list[mx.array]:
            shapes = zip(output_shapes, output_dtypes, strict=True)
            return self.one(name, [mx.zeros(*x) for x in shapes], inputs)

        return call


@contextmanager
def counting(ours: bool, gradients: bool = False) -> Iterator[Launches]:
    """While this lasts MLX seems to have a GPU, with our Metal kernels or without, and builds
    graphs that can be counted. gradients: they are wanted."""
    found, gpu = Launches(), mx.Device(mx.gpu)
    stand_ins = {name: found.differentiable(name) for name in ("rms_norm", "layer_norm", "rope")}
    with ExitStack() as stack:
        # What is compiled now serves on this stream alone.
        stack.enter_context(mx.stream(mx.new_stream(mx.cpu)))
        for place, name, stand_in in (
            *((mx.fast, name, stand_in) for name, stand_in in stand_ins.items()),
            (mx.fast, "scaled_dot_product_attention", _attention(found, gradients)),
            (mx, "softmax", _softmax(found)),
            (mx, "dequantize", _dequantize(found)),
            (mx.fast, "gated_delta_update", _delta(found)),
            (mx.fast, "metal_kernel", found.metal_kernel),
            (mx.metal, "is_available", lambda: ours),
            (mx, "default_device", lambda: gpu),
            (mx, "device_info", lambda: {"memory_size": 80 << 30}),
            (kernels, "_agrees", lambda *_: True),
            (kernels, "_faster", lambda *_: True),
        ):
            stack.enter_context(mock.patch.object(place, name, stand_in))
        kernels.kernel.cache_clear()
        stack.callback(kernels.kernel.cache_clear)
        yield found


def _attention(found: Launches, gradients: bool) -> Callable[..., mx.array]:
    def call(
        q: mx.array,
        k: mx.array,
        v: mx.array,
        scale: float,
        mask: mx.array | str | None = None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        if not gradients:
            return found.one("attention", [q], [q, k, v, mask])[0]
        # What MLX makes of it on a Mac where a gradient is wanted.
        B, H, L, D = q.shape
        q = (q * scale).reshape(B, k.shape[1], -1, L, D)
        s = q @ k[:, :, None].swapaxes(-1, -2)
        s = s if mask is None else mx.where(mask, s, -1e9)
        return (mx.softmax(s, axis=-1) @ v[:, :, None]).reshape(B, H, L, D)

    return call


def _softmax(found: Launches) -> Callable[..., mx.array]:
    """MLX takes it apart on some machines, its gradient everywhere."""

    @mx.custom_function
    def softmax(x: mx.array) -> mx.array:
        return found.one("softmax", [x], [x])[0]

    @softmax.vjp
    def _(x: mx.array, cotangent: mx.array, y: mx.array) -> mx.array:
        z = y * cotangent
        return z - y * z.sum(axis=-1, keepdims=True)

    def call(x: mx.array, axis: int = -1, precise: bool = False) -> mx.array:
        result: Any = softmax(x)
        return result

    return call


def _dequantize(found: Launches) -> Callable[..., mx.array]:
    real = mx.dequantize

    def call(*args: mx.array, **options: Any) -> mx.array:
        return found.one("dequantize", [real(*args, **options)], args)[0]

    return call


def _delta(found: Launches) -> Callable[..., list[mx.array]]:
    def call(q: mx.array, k: mx.array, v: mx.array, *rest: mx.array) -> list[mx.array]:
        return found.one("gated_delta_update", [v, rest[-1]], [q, k, v, *rest])

    return call


def _nodes(dot: str) -> Iterator[tuple[str, list[str]]]:
    """Name and inputs of each operation in a graph that MLX has written."""
    name, inputs = "", []
    for line in dot.splitlines():
        if node := _NODE.match(line):
            if name:
                yield name, inputs
            name, inputs = node[1], []
        elif source := _INPUT.match(line):
            inputs.append(source[1])
    if name:
        yield name, inputs


SIZES: dict[str, int] = {"hidden_size": 128, "intermediate_size": 96}
HEADS: dict[str, int] = {"num_attention_heads": 4, "num_key_value_heads": 2}
ROPE: dict[str, Any] = {"rms_norm_eps": 1e-6, "rope_theta": 1e4}
WINDOW, SINKS = 1024, 64
CHUNK, SEQUENCE, WORDS = 2048, 2048, 49152


def model(
    memory: str | None, sinks: str = "clamped", layers: int = 1, words: int = 128
) -> nn.Module:
    """A Qwen2 of mlx-lm's, in bfloat16, plain or with a memory."""
    sizes = {**SIZES, "vocab_size": words}
    args = qwen2.ModelArgs("qwen2", num_hidden_layers=layers, **sizes, **HEADS, **ROPE)
    made = qwen2.Model(args)
    if memory:
        config = AHNConfig(memory=memory, window=WINDOW, sinks=SINKS, sink_positions=sinks)
        made = augment(made, config)
    pairs: Any = tree_flatten(made.parameters())
    kept = [(n, x if n.endswith(FLOAT32) else x.astype(mx.bfloat16)) for n, x in pairs]
    made.load_weights(kept)
    made.eval()
    mx.eval(made.parameters())
    return made


def full(made: nn.Module, bits: int | None = None) -> Any:
    """The cache of one layer whose window is full, after a chunk and two tokens more."""
    attention = made.layers[0].self_attn
    if isinstance(attention, AHNAttention):
        cache = AHNCache(WINDOW, SINKS, bits, 32)
    else:
        cache = RotatingKVCache(WINDOW + SINKS, keep=SINKS)
    for n in (WINDOW + SINKS + 7, 1, 1):
        x = mx.zeros((1, n, SIZES["hidden_size"]), mx.bfloat16)
        mx.eval(made.layers[0](x, cache.make_mask(n), cache), _kept(cache))
    return cache


def step(
    memory: str | None, sinks: str, ours: bool, L: int, bits: int | None = None
) -> Counter[str]:
    """Launches of one layer for L tokens behind a full window, of a plain model if memory is
    None."""
    made = model(memory, sinks)
    cache = full(made, bits)
    x, mask = mx.zeros((1, L, SIZES["hidden_size"]), mx.bfloat16), cache.make_mask(L)
    mask = None if memory else mask
    mx.eval(x, [] if mask is None else mask)
    with counting(ours) as found:
        return found.count([made.layers[0](x, mask, cache), _kept(cache)])


def _kept(cache: Any) -> Any:
    """All that the next step needs, what leaves the window then included."""
    return [cache.state, getattr(cache, "_next", None)]


TRAINED = Settings(256, 32, SEQUENCE, 3, 1e-4, "kl", 0, 1, 0, 0.0, False, False, 0)


class Texts:
    """Of one length, and of no words."""

    def of(self, length: int) -> "Texts":
        return self


def training(memory: str, sinks: str, batch: int = 1, layers: int = 30) -> Counter[str]:
    """Launches of a training step on so many sequences at once, of the words of SmolLM2: the
    teacher, the student, its gradient and what the optimizer does. Counted of one layer and two."""
    one, two = (_training(memory, sinks, batch, n) for n in (1, 2))
    return Counter({k: one[k] + (layers - 1) * (two[k] - one[k]) for k in one | two})


def _training(memory: str, sinks: str, batch: int, layers: int) -> Counter[str]:
    made = model(memory, sinks, layers, WORDS)
    trainer = loop.Trainer(made, Texts(), TRAINED)  # type: ignore[arg-type]
    tokens = mx.zeros((batch, SEQUENCE), mx.int32)
    taught = streams.Stream(mx.zeros((batch, SEQUENCE, SIZES["hidden_size"]), mx.bfloat16), [])
    flat = [(name, mx.ones_like(x)) for name, x in trainer.parameters.items()]
    gradients: Any = tree_unflatten(flat)
    trainer.optimizer.init(gradients)
    states = trainer.optimizer.state
    mx.eval(tokens, taught, gradients, states, trainer.parameters, made.parameters())
    with counting(ours=False) as found:
        counted = found.count(streams.teach(made, tokens).hidden)
        counted += found.count([trainer.updated(gradients), trainer.optimizer.state])
    with counting(ours=False, gradients=True) as found:
        return counted + found.count(trainer.gradients_of(taught, tokens, 256, 32))
