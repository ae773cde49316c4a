"""The optional router: how loud each head's memory is, by how much it has compressed."""

import math

import mlx.core as mx
import mlx.nn as nn

# How loud a router that has learned nothing leaves a memory.
UNLEARNED = 0.5

# The window at which a gain by window is none.
NO_GAIN = 256


class Router(nn.Module):
    """sigmoid(alpha ln(n / W) + beta) per head, n tokens evicted so far, window W; with a gain by
    window sigmoid(alpha ln(n / W) + beta + gamma ln(W / 256))."""

    def __init__(self, heads: int, window_gain: bool = False):
        super().__init__()
        self.alpha = mx.zeros((heads,))
        self.beta = mx.zeros((heads,))
        if window_gain:
            self.gamma = mx.zeros((heads,))

    def __call__(self, n: mx.array, window: int) -> mx.array:
        """n [..., T] -> [..., H, T, 1]."""
        ratio = mx.log(n.astype(mx.float32) / window)[..., None, :]
        beta = self.beta + gain(self.gamma, window) if "gamma" in self else self.beta
        return mx.sigmoid(self.alpha[:, None] * ratio + beta[:, None])[..., None]


def gain(gamma: mx.array, window: int) -> mx.array:
    """What a router's beta is more at a window W: gamma ln(W / 256), [H] float32."""
    return gamma.astype(mx.float32) * math.log(window / NO_GAIN)
