"""Processes that run one model together, as mlx.launch starts them; and, run as one of them,
what its part of a model computes beside the whole."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from itertools import product
from pathlib import Path
from typing import Any

KINDS = ("gated_deltanet", "deltanet", "mamba2")
CONFIG = {
    **{"model_type": "qwen3", "hidden_size": 128, "num_hidden_layers": 2, "head_dim": 32},
    **{"intermediate_size": 384, "num_attention_heads": 24, "num_key_value_heads": 12},
    # A vocabulary that no number of processes divides.
    **{"rms_norm_eps": 1e-6, "vocab_size": 265, "max_position_embeddings": 512},
    **{"rope_theta": 5e5, "tie_word_embeddings": True},
}


DEFAULT = "ahn-gdn-smollm2-135m"


def free_ports(n: int) -> list[int]:
    """Below those that a system gives to connections: a rank that tries to reach one of those
    before it is listened on may reach itself. Each of pytest's workers draws from its own: until
    a rank listens, a port looks free, and MLX would share it with another's."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    own = 10_000 + int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    held: dict[int, socket.socket] = {}
    while len(held) < n:
        port, one = random.randrange(own, 32_768, workers), socket.socket()
        try:
            one.bind(("127.0.0.1", port))
        except OSError:  # it is taken, perhaps by one of ours
            one.close()
        else:
            held[port] = one
    for one in held.values():
        one.close()
    return list(held)


def environments(n: int, directory: Path) -> list[dict[str, str]]:
    """Of n processes that are to find each other."""
    file = directory / "hosts.json"
    file.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(n)]))
    quiet = {"OPENBLAS_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    return [
        {**os.environ, **quiet, "MLX_HOSTFILE": str(file), "MLX_RANK": str(rank)}
        for rank in range(n)
    ]


Stop = tuple[int, int, str]  # a rank, a signal for it, and the file that it comes after
Ended = list[Any]  # a process's exit code, stdout, stderr

# Seconds for one call, and for the others after one has failed: until they are told to end, as
# mlx.launch tells them, and until they are killed. MLX may wait for ever for one that is gone.
MOST, TOLD, AFTER = 400.0, 20.0, 60.0

# What MLX's ring has said then: a process may be told to end for nothing else.
GIVEN_UP = "Failing pending tasks"


def run(*calls: tuple[Any, ...], late: bool = False) -> list[list[Ended]]:
    """Calls one after the other, each as so many processes: how each of them ended.

    A call is a number and arguments of the command line, or goldens or DEFAULT for what this file
    compares; and perhaps a Stop. All are forks of one process that has imported everything: that
    takes longer than all else. late: what a rank passes on leaves long after it was told to.
    """
    told = json.dumps([[n, list(map(str, arguments)), *stop] for n, arguments, *stop in calls])
    command = [sys.executable, __file__, told, *["late"] * late]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def last_words(rank: subprocess.Popen[str]) -> str:
    """What a rank has said on stderr when it ends, as another has died: by itself, or told to."""
    try:
        return rank.communicate(timeout=TOLD)[1]
    except subprocess.TimeoutExpired:
        rank.terminate()
        return rank.communicate(timeout=AFTER)[1]


def report(ended: list[Ended]) -> str:
    """What each rank said, for a test that fails."""
    return "".join(
        f"\n-- rank {rank}: exit code {code}\n{said}{wrong}"
        for rank, (code, said, wrong) in enumerate(ended)
    )


def fork(directory: Path, n: int, arguments: list[str], stop: Stop | None = None) -> list[Ended]:
    """How n processes ended, which this one waits for."""
    children, files = [], []
    for rank, environment in enumerate(environments(n, directory)):
        files.append([directory / f"{rank}.{name}" for name in ("out", "err")])
        child = os.fork()
        if child == 0:
            os.environ.update(environment)
            for number, file in enumerate(files[-1], 1):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            become(arguments)
        children.append(child)
    codes = wait(children, stop)
    return [
        [codes[child], *(f.read_text() for f in pair)]
        for child, pair in zip(children, files, strict=True)
    ]


def wait(children: list[int], stop: Stop | None) -> dict[int, int]:
    """The exit code of each. What hangs is killed."""
    until, codes = time.monotonic() + MOST, {}
    told = until
    begun = os.path.getmtime(stop[2]) if stop and os.path.exists(stop[2]) else 0.0
    while len(codes) < len(children):
        for child in children:
            pid, status = (0, 0) if child in codes else os.waitpid(child, os.WNOHANG)
            if pid:
                codes[child] = os.waitstatus_to_exitcode(status)
                if codes[child]:
                    told = min(told, time.monotonic() + TOLD)
                    until = min(until, time.monotonic() + AFTER)
        if stop and os.path.exists(stop[2]) and os.path.getmtime(stop[2]) != begun:
            os.kill(children[stop[0]], stop[1])
            stop = None
        late = signal.SIGKILL if time.monotonic() > until else signal.SIGTERM
        if time.monotonic() > told:
            for child in set(children) - set(codes):
                os.kill(child, late)
        time.sleep(0.01)
    return codes


def become(arguments: list[str]) -> None:
    """Be one of them; does not return."""
    code: Any = 1
    try:
        if arguments == [DEFAULT]:
            compare_default()
        elif arguments and not os.path.isdir(arguments[0]):
            from ahn_mlx.cli import main

            sys.argv = ["ahn-mlx", *arguments]
            main()
        else:
            compare_all(arguments)
        code = 0
    except SystemExit as e:
        code = e.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


def random_model(kind: str, sinks: str, bits: int | None, **config: Any) -> Any:
    """The same in every process, with a memory that says something."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_map

    from ahn_mlx.model.augment import build

    ahn = {"memory": kind, "window": 12, "sinks": 3, "sink_positions": sinks}
    ahn |= {"router": True, "window_gain": True}
    model = build({**CONFIG, "ahn": ahn, **config})
    mx.random.seed(5)
    weights = tree_map(lambda x: mx.random.normal(x.shape) * 0.3, model.parameters())
    model.update(weights)
    if bits:
        nn.quantize(model, group_size=32, bits=bits)
    model.eval()
    mx.eval(model.parameters())
    return model


def follow(model: Any, kv_bits: int | None) -> tuple[list[Any], list[int], int]:
    """Logits of a prompt longer than the window and of a greedy answer, its ids, cache bytes."""
    import mlx.core as mx

    caches = model.make_cache()
    if kv_bits:
        caches = [cache.to_quantized(32, kv_bits) for cache in caches]
    ids, logits, said = [n * 7 % 256 for n in range(40)], [], []
    for chunk in (ids[:9], ids[9:31], ids[31:]):
        logits.append(model(mx.array([chunk]), cache=caches)[0])
    for _ in range(6):
        said.append(int(logits[-1][-1].argmax().item()))
        logits.append(model(mx.array([said[-1:]]), cache=caches)[0])
    mx.eval(logits)
    return logits, said, sum(cache.nbytes for cache in caches)


def weights_of(model: Any) -> int:
    from mlx.utils import tree_flatten

    return sum(x.nbytes for _, x in tree_flatten(model.parameters()))


def compare(ranks: Any, kind: str, sinks: str, bits: int | None, kv_bits: int | None) -> Any:
    import mlx.core as mx

    whole, part = (random_model(kind, sinks, bits) for _ in range(2))
    ranks.cut(part)
    theirs, ids, cache = follow(whole, kv_bits)
    ours, said, own = follow(part, kv_bits)
    off = max(mx.abs(a - b).max().item() for a, b in zip(ours, theirs, strict=True))
    largest = max(mx.abs(x).max().item() for x in theirs)
    return {
        **{"case": f"{kind} {sinks} base {bits} window {kv_bits}", "same": said == ids},
        **{"off": off / largest, "cache": own / cache},
        "weights": weights_of(part) / weights_of(whole),
    }


def golden(ranks: Any, directory: Path) -> Any:
    """Of a converted golden model its logits beside the published ones, and a refusal of it."""
    import mlx.core as mx

    from ahn_mlx import load_model

    model = load_model(directory, dtype="float32", ranks=ranks)[0]
    facts = mx.load(str(directory.parent / "golden.safetensors"))
    logits = model(facts["input_ids"], cache=(cache := model.make_cache()))
    off = mx.abs(logits - facts["prefill_logits"]).max().item()
    said = []
    for _ in facts["decode_tokens"][0].tolist():
        said.append(int(logits[0, -1].argmax().item()))
        logits = model(mx.array([said[-1:]]), cache=cache)
    same = said == facts["decode_tokens"][0].tolist()
    return {"case": directory.parent.name, "off": off, "same": same}


def refusal(ranks: Any, heads: int) -> str:
    """What is said of a model with so many key/value heads."""
    from ahn_mlx import AHNError

    config = {"num_attention_heads": heads, "num_key_value_heads": heads}
    try:
        ranks.cut(random_model("deltanet", "absolute", None, **config))
    except AHNError as e:
        return str(e)
    return ""


def compare_all(goldens: list[str]) -> None:
    from ahn_mlx.model.ranks import join

    cases = [(k, s, None, None) for k, s in product(KINDS, ("absolute", "clamped"))]
    cases += [("gated_deltanet", "clamped", 4, None), ("mamba2", "absolute", 8, 8)]
    cases += [("deltanet", "absolute", None, 4)]
    ranks = join()
    found = [compare(ranks, *case) for case in cases]
    found += [golden(ranks, Path(directory)) for directory in goldens]
    print(json.dumps([found, refusal(ranks, 3 * ranks.size + 1)]))


def compare_default() -> None:
    """The default model, of 9 heads for 3 keys and values, behind a window that is full."""
    import mlx.core as mx

    from ahn_mlx.hub.zoo import load
    from ahn_mlx.model.ranks import join

    found = []
    for ranks in (join(), None):
        model = load(DEFAULT, window=12, sinks=3, dtype="float32", ranks=ranks)[0]
        found.append((*follow(model, None), weights_of(model)))
    (ours, said, own, part), (theirs, ids, cache, whole) = found
    off = max(mx.abs(a - b).max().item() for a, b in zip(ours, theirs, strict=True))
    largest = max(mx.abs(x).max().item() for x in theirs)
    shares = {"cache": own / cache, "weights": part / whole}
    print(json.dumps({"case": DEFAULT, "off": off / largest, "same": said == ids, **shares}))


def send_late() -> None:
    """As over a slow network: something else comes first in the stream of messages."""
    import mlx.core as mx

    from ahn_mlx.model import pipeline

    send = pipeline.Pipeline.send

    def late(self: Any, x: mx.array) -> None:
        with mx.stream(pipeline._stream):
            work = mx.ones((1500, 1500))
            for _ in range(3):
                work = work @ work / 1500
        send(self, mx.depends([x], [work])[0])

    pipeline.Pipeline.send = late  # type: ignore[method-assign]


if __name__ == "__main__":
    import ahn_mlx
    import ahn_mlx.cli.ask
    import ahn_mlx.cli.digest
    import ahn_mlx.hub.zoo
    import ahn_mlx.model.ranks
    import ahn_mlx.reading.session  # noqa: F401

    if sys.argv[2:]:
        send_late()
    results = []
    with tempfile.TemporaryDirectory() as place:
        for call in json.loads(sys.argv[1]):
            results.append(fork(Path(place), *call))
    print(json.dumps(results))
