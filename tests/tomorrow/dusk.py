"""A model file as mlx-lm has them, of no model that there is: with a logit of each head that takes
attention and gives nothing, a cap on all scores, and a window on every other layer."""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs, create_attention_mask
from mlx_lm.models.cache import KVCache, RotatingKVCache


@dataclass
class ModelArgs(BaseModelArgs):
    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    sliding_window: int
    softcap: float = 5.0


class Attention(nn.Module):
    def __init__(self, args):
        super().__init__()
        heads, pairs, width = args.num_attention_heads, args.num_key_value_heads, args.head_dim
        self.head_dim, self.softcap = width, args.softcap
        self.mix = nn.Linear(heads * width, args.hidden_size, bias=False)
        self.value = nn.Linear(args.hidden_size, pairs * width)
        self.query = nn.Linear(args.hidden_size, heads * width)
        self.key = nn.Linear(args.hidden_size, pairs * width)
        self.nothing = mx.zeros((heads,))
        self.rotary = nn.RoPE(width // 2, traditional=True)

    def __call__(self, x, mask=None, cache=None):
        B, L, _ = x.shape
        q, k, v = (
            part(x).reshape(B, L, -1, self.head_dim).swapaxes(1, 2)
            for part in (self.query, self.key, self.value)
        )
        at = 0 if cache is None else cache.offset
        q, k = self.rotary(q, offset=at), self.rotary(k, offset=at)
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        times = q.shape[1] // k.shape[1]
        k, v = mx.repeat(k, times, axis=1), mx.repeat(v, times, axis=1)
        scores = q @ k.swapaxes(-1, -2) * self.head_dim**-0.5
        scores = self.softcap * mx.tanh(scores / self.softcap)
        if mask is not None:
            scores = mx.where(mask, scores, -1e9)
        nothing = mx.broadcast_to(self.nothing[:, None, None], (*scores.shape[:3], 1))
        shares = mx.softmax(mx.concatenate([scores, nothing], axis=-1), axis=-1, precise=True)
        return self.mix((shares[..., :-1] @ v).swapaxes(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.self_attn = Attention(args)
        self.mlp = nn.Linear(args.hidden_size, args.hidden_size)
        self.before, self.between = nn.RMSNorm(args.hidden_size), nn.RMSNorm(args.hidden_size)

    def __call__(self, x, mask=None, cache=None):
        x = x + self.self_attn(self.before(x), mask, cache)
        return x + nn.gelu(self.mlp(self.between(x)))


class Decoder(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [Layer(args) for _ in range(args.num_hidden_layers)]
        self.norm = nn.RMSNorm(args.hidden_size)
        self.window = args.sliding_window

    def __call__(self, ids, cache=None):
        x = self.embed_tokens(ids)
        cache = cache or [None] * len(self.layers)
        masks = [create_attention_mask(x, one, return_array=True) for one in cache]
        for layer, mask, one in zip(self.layers, masks, cache, strict=True):
            x = layer(x, mask, one)
        return self.norm(x)


class Model(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args, self.model_type = args, args.model_type
        self.model = Decoder(args)
        self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(self, ids, cache=None):
        return self.lm_head(self.model(ids, cache))

    @property
    def layers(self):
        return self.model.layers

    def make_cache(self):
        window = self.args.sliding_window
        return [RotatingKVCache(window) if i % 2 else KVCache() for i in range(len(self.layers))]
