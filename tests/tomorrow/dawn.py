"""A model file as mlx-lm has them, of no model that there is: one linear map for keys, values and
queries of each head in turn, norms of queries and keys, and no name that another file has."""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs, create_attention_mask


@dataclass
class ModelArgs(BaseModelArgs):
    model_type: str
    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    temperature: float = 0.3


class Attention(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.queries, self.pairs = args.num_attention_heads, args.num_key_value_heads
        width = args.hidden_size // args.num_attention_heads
        self.everything = nn.Linear(args.hidden_size, (self.queries + 2 * self.pairs) * width)
        self.back = nn.Linear(args.hidden_size, args.hidden_size)
        self.ln_one, self.ln_two = nn.RMSNorm(width), nn.RMSNorm(width)
        self.where = nn.RoPE(width, base=5_000)
        self.temperature = args.temperature

    def __call__(self, x, mask=None, cache=None):
        B, L, _ = x.shape
        y = self.everything(x).reshape(B, L, self.pairs, self.queries // self.pairs + 2, -1)
        k, v, q = y[..., 0, :], y[..., 1, :], y[..., 2:, :].reshape(B, L, self.queries, -1)
        k, q = self.ln_two(k), self.ln_one(q)
        q, k, v = (part.swapaxes(1, 2) for part in (q, k, v))
        at = 0 if cache is None else cache.offset
        q, k = self.where(q, offset=at), self.where(k, offset=at)
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=self.temperature, mask=mask)
        return self.back(y.swapaxes(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.self_attn = Attention(args)
        self.up = nn.Linear(args.hidden_size, args.intermediate_size)
        self.down = nn.Linear(args.intermediate_size, args.hidden_size)
        self.before, self.between = nn.LayerNorm(args.hidden_size), nn.LayerNorm(args.hidden_size)

    def __call__(self, x, mask=None, cache=None):
        x = x + self.self_attn(self.before(x), mask, cache)
        return x + self.down(nn.relu(self.up(self.between(x))))


class Decoder(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [Layer(args) for _ in range(args.num_hidden_layers)]
        self.norm = nn.RMSNorm(args.hidden_size)

    def __call__(self, ids, cache=None):
        x = self.embed_tokens(ids)
        cache = cache or [None] * len(self.layers)
        mask = create_attention_mask(x, cache[0])
        for layer, one in zip(self.layers, cache, strict=True):
            x = layer(x, mask, one)
        return self.norm(x)


class Model(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args, self.model_type = args, args.model_type
        self.model = Decoder(args)

    def __call__(self, ids, cache=None):
        return self.model.embed_tokens.as_linear(self.model(ids, cache))

    @property
    def layers(self):
        return self.model.layers
