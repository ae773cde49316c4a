"""Reading a document and streaming an answer: the prompt, the run, and its numbers.

The loop is mlx-lm's; this module feeds it and counts. Interrupting it keeps what was
generated so far.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import stream_generate
from mlx_lm.models.cache import KVCache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import AHNError
from ..model.augment import dtype_of, shape_of_attention
from ..model.cache import AHNCache
from ..model.pipeline import own_layers
from ..platform import default_dtype
from .caches import each, quantized
from .penalty import note, nothing_seen
from .sampling import Cutter, Sampling
from .template import Template
from .tokens import Encoder, check_ids

# (tokens read, cache bytes), after each step of the prompt.
Progress = Callable[[int, int], None]


def make_prompt(
    tokenizer: TokenizerWrapper,
    document: str = "",
    question: str = "",
    system: str = "",
    chat_template: bool = True,
) -> list[int]:
    """Token ids of one user message: the document, a blank line, the question.

    Raises AHNError if there is nothing to say or no chat template to say it in.
    """
    text = "\n\n".join(part for part in (document.rstrip("\n"), question) if part.strip())
    if not text:
        raise AHNError("the prompt is empty; give a text to read or --prompt")
    encoder = Encoder(tokenizer)
    if chat_template:
        return encoder(*Template(tokenizer, system).question("start", text))
    if system:
        raise AHNError("--system-prompt needs the chat template; drop --ignore-chat-template")
    return [*encoder.begin, *encoder("", text)]


def prefill_step() -> int:
    """Tokens per step. Fewer on the CPU: equally fast there, and less memory."""
    return 512 if default_dtype() is mx.float32 else 2048


@dataclass
class Run:
    """One prompt and its answer. Iterate over it once for the pieces of text.

    The numbers are valid at any time, also after an interrupt. kv_bits, kv_group_size:
    keep sinks and window quantized, as in mlx-lm.
    """

    model: nn.Module
    tokenizer: TokenizerWrapper
    prompt: list[int]
    sampling: Sampling = field(default_factory=Sampling)
    step: int | None = None
    kv_bits: int | None = None
    kv_group_size: int = 64
    progress: Progress = lambda read, cache_bytes: None
    cache: list[Any] = field(init=False)
    read: int = field(default=0, init=False)
    generated: int = field(default=0, init=False)
    finish_reason: str = field(default="", init=False)
    said: list[int] = field(default_factory=list, init=False)  # ids, the end's included
    _times: list[float] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if not self.prompt:
            raise AHNError("the tokenizer makes no token of the prompt; it knows none of this text")
        check_ids(self.prompt, self.model)
        self.cache = self.model.make_cache()
        if self.kv_bits is not None:
            self.cache = quantized(self.cache, self.kv_bits, self.kv_group_size)

    def __iter__(self) -> Iterator[str]:
        mx.reset_peak_memory()
        start = time.perf_counter()
        cutter, vocabulary = Cutter(self.sampling.stop), self.model.args.vocab_size
        self._times = [start, start, start]  # start, prompt read, last token
        try:
            for response in stream_generate(
                self.model,
                self.tokenizer,
                self.prompt,
                prompt_cache=self.cache,
                prefill_step_size=self.step or prefill_step(),
                prompt_progress_callback=self._count,
                **self.sampling.begin(
                    vocabulary, note(nothing_seen(vocabulary), self.prompt), self.model.ranks
                ),
            ):
                self.generated = response.generation_tokens
                self.said.append(response.token)
                self.finish_reason = response.finish_reason or ""
                self._times[2] = time.perf_counter()
                yield cutter.add(response.text) + (cutter.rest() if self.finish_reason else "")
                if cutter.found:
                    self.finish_reason = "stop"
                    return
        finally:
            if self.model.ranks is not None:
                self.model.ranks.settle()

    def _count(self, read: int, total: int) -> None:
        self.read = read
        self._times[1] = self._times[2] = time.perf_counter()
        self.progress(read, self.cache_bytes)

    @property
    def cache_bytes(self) -> int:
        return sum(c.nbytes for c in self.cache)

    @property
    def full_attention_bytes(self) -> int:
        """What the plain model's caches would hold after as many tokens."""
        fit = shape_of_attention(self.model)
        tokens = self.read + self.generated
        width = fit.n_kv_heads * fit.head_dim * dtype_of(self.model).size
        caches = each(self.cache[i] for i in own_layers(self.model))
        own = [c for c in caches if not isinstance(c, AHNCache | KVCache)]
        return 2 * (len(caches) - len(own)) * width * tokens + sum(c.nbytes for c in own)

    def facts(self) -> dict[str, Any]:
        """The numbers for a program: tokens, seconds, bytes, and why the answer ended: "stop",
        "length", or "interrupted"."""
        start, read, last = self._times or (0.0, 0.0, 0.0)
        return {
            "finish_reason": self.finish_reason or "interrupted",
            "prompt_tokens": self.read,
            "generation_tokens": self.generated,
            "prompt_seconds": read - start,
            "generation_seconds": last - read,
            "peak_memory_bytes": mx.get_peak_memory(),
            "cache_bytes": self.cache_bytes,
            "full_attention_bytes": self.full_attention_bytes,
        }

    def summary(self) -> str:
        """The closing line: speeds, peak memory, and cache: against full attention once window
        and sinks, whose room is taken at once, are full."""
        start, read, last = self._times or (0.0, 0.0, 0.0)
        capacity = self.model.ahn.capacity
        if self.read + self.generated > capacity:
            beside = f"full attention {self.full_attention_bytes / 1e6:.1f} MB"
        else:
            beside = f"full at {capacity:,} tokens"
        return (
            f"prompt {self.read:,} tokens, {_rate(self.read, read - start)}"
            f" | generation {self.generated:,} tokens, {_rate(self.generated, last - read)}"
            f" | peak memory {mx.get_peak_memory() / 1e9:.2f} GB"
            f" | cache {self.cache_bytes / 1e6:.1f} MB, {beside}"
        )


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens / seconds if tokens and seconds > 0 else 0:.1f} tokens/s"
