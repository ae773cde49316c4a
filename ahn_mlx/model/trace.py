"""What the memory of a layer did while a text was read in chunks; `ahn-mlx inspect` shows it.

Kept beside a cache, a few kilobytes for a book. Single tokens of an answer are not counted.
"""

from typing import NamedTuple

import mlx.core as mx

# Tokens of the text in one cell of the heat map.
BLOCK = 64


class Trace(NamedTuple):
    """strengths: [2, blocks], for each BLOCK of tokens the sum of their write strengths (mean
    over heads) and how many were written. heads: [3, H], sums over tokens of write strength
    and of the squares of the local and of the memory's output. All float32."""

    strengths: mx.array
    heads: mx.array

    @staticmethod
    def start(heads: int) -> "Trace":
        trace = Trace(mx.zeros((2, 0)), mx.zeros((3, heads)))
        mx.eval(trace)  # another thread may go on
        return trace

    def add(self, first: int, strength: mx.array, local: mx.array, m: mx.array) -> "Trace":
        """T tokens from number `first` on were written with strength [1, H, T]; the output at
        the T tokens that read after them is local + m, each [1, H, T, D]."""
        T = strength.shape[-1]
        strength = strength.astype(mx.float32)
        before = first - first % BLOCK
        end = -(-(first + T) // BLOCK) * BLOCK
        cells = mx.stack([strength.mean(axis=(0, 1)), mx.ones(T)])
        cells = mx.pad(cells, [(0, 0), (first - before, end - first - T)])
        cells = cells.reshape(2, -1, BLOCK).sum(axis=-1)
        held = self.strengths.shape[1]
        old = mx.pad(self.strengths, [(0, 0), (0, end // BLOCK - held)])
        new = mx.pad(cells, [(0, 0), (before // BLOCK, 0)])
        squares = [x.astype(mx.float32).square().sum(axis=(0, 2, 3)) for x in (local, m)]
        heads = mx.stack([strength.sum(axis=(0, 2)), *squares])
        trace = Trace(old + new, self.heads + heads)
        # Nothing else asks for it, and unevaluated it would hold all activations.
        mx.async_eval(trace)
        return trace
