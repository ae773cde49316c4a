"""A small engine by itself, for tests that ask it without HTTP."""

import queue
from contextlib import contextmanager

import mlx.core as mx
from mlx_lm.models import llama

from ahn_mlx import AHNConfig, augment
from ahn_mlx.reading.sampling import Sampling
from ahn_mlx.serve.answers import Done, Failed, Piece, Request
from ahn_mlx.serve.engine import Engine, fresh
from ahn_mlx.serve.sampling import Wish

# Within the window, just full, far beyond it; and one token alone.
PROMPTS = [[(7 * i + n) % 256 for i in range(n)] for n in (5, 1, 31, 70, 12, 200)]


def small(engine, **options):
    session = fresh(engine, options.get("bits"), options.get("group", 64))
    session.step = 16
    return session


@contextmanager
def running(*loaded, rows):
    engine = Engine(*loaded, rows=rows)
    try:
        yield engine
    finally:
        engine.stop()


WISHES = ("bias", "presence", "frequency", "top_logprobs")


def wish(**options):
    own = {k: options.pop(k) for k in WISHES if k in options}
    return Wish(Sampling(**{"max_tokens": 24, **options}), **own)


def start(engine, base, ids, n=1, first=0, **options):
    told: queue.SimpleQueue = queue.SimpleQueue()
    request = Request(base, ids, wish(**options), told.put, n, first)
    engine.reserve(n)
    engine.submit(request)
    return request, told


def finish(told, n=1, first=0):
    """Tokens of each answer, and how each ended."""
    tokens, done = {first + i: [] for i in range(n)}, {}
    while len(done) < n:
        event = told.get(timeout=60)
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Piece) and event.token:
            tokens[event.choice].append((event.token.id, event.token.logprob))
        if isinstance(event, Done):
            done[event.choice] = event
    return list(tokens.values()), done


def made(memory, hidden=64, heads=2, tied=True, window=12, sinks=4, **options):
    """A model of random parameters whose memory is heard."""
    args = llama.ModelArgs("llama", hidden, 2, hidden, heads, rms_norm_eps=1e-5, vocab_size=256)
    args.tie_word_embeddings = tied
    mx.random.seed(0)
    model = augment(llama.Model(args), AHNConfig(memory, window, sinks, "clamped", **options))
    for layer in model.layers:
        projection = layer.self_attn.ahn.o_proj
        projection.weight = mx.random.normal(projection.weight.shape)
    mx.eval(model.parameters())
    return model


def cancel(engine, *requests):
    for request in requests:
        request.cancelled = True
    engine.wake()
