"""The optional router: how loud each head's memory is, by how much it has compressed."""

import mlx.core as mx
import mlx.nn as nn

# How loud a router that has learned nothing leaves a memory.
UNLEARNED = 0.5


class Router(nn.Module):
    """sigmoid(alpha ln(n / W) + beta) per head, n tokens evicted so far, window W."""

    def __init__(self, heads: int):
        super().__init__()
        self.alpha = mx.zeros((heads,))
        self.beta = mx.zeros((heads,))

    def __call__(self, n: mx.array, window: int) -> mx.array:
        """n [..., T] -> [..., H, T, 1]."""
        ratio = mx.log(n.astype(mx.float32) / window)[..., None, :]
        return mx.sigmoid(self.alpha[:, None] * ratio + self.beta[:, None])[..., None]
