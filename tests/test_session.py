"""Sessions and memory files: whatever way the tokens came, the same numbers."""

import asyncio
import json
import random
import struct
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest
from checkpoints import talking_model
from mlx_lm.models import llama
from mlx_lm.tokenizer_utils import load as load_tokenizer

from ahn_mlx import AHNConfig, AHNError, augment, load_model
from ahn_mlx.reading import memoryfile
from ahn_mlx.reading.session import Session

VARIANTS = ("qwen2-gdn", "qwen2-dn", "qwen2-mamba2")
TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 3
MORE = "It was the season of Light, it was the season of Darkness. " * 2


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> dict[str, Path]:
    found = {}
    for variant in VARIANTS:
        found[variant] = talking_model(variant, tmp_path_factory.mktemp(variant))
    return found


@pytest.fixture(scope="module", params=VARIANTS)
def loaded(request, directories):
    path = directories[request.param]
    model, _ = load_model(path, dtype="float32")
    return model, load_tokenizer(path), str(path)


def new(loaded, **options) -> Session:
    model, tokenizer, name = loaded
    return Session(model, tokenizer, origin={"name": name}, step=16, **options)


def logits(session: Session) -> mx.array:
    """What the model makes of the next tokens; the session stays as it is."""
    other = session.fork()
    return other.model(mx.array([[7, 8, 9]]), cache=other.caches)


def arrays(cache) -> list[mx.array]:
    return [x for x in cache.state if isinstance(x, mx.array)]


def same(a: Session, b: Session) -> bool:
    states = zip(a.caches, b.caches, strict=True)
    return (
        a.tail.ids == b.tail.ids
        and a.tokens == b.tokens
        and all(
            mx.array_equal(x, y)
            for c, d in states
            for x, y in zip(arrays(c), arrays(d), strict=True)
        )
        and mx.array_equal(logits(a), logits(b)).item()
    )


@pytest.fixture(params=["gated_deltanet", "deltanet", "mamba2"])
def wide(request, directories):
    """A model with heads that can be quantized, and a layer of full attention."""
    args = llama.ModelArgs("llama", 64, 3, 64, 2, rms_norm_eps=1e-5, vocab_size=256)
    mx.random.seed(0)
    config = AHNConfig(request.param, 12, 4, "clamped", fa_layer_ids=(1,))
    model = augment(llama.Model(args), config)
    for layer in (model.layers[0], model.layers[2]):
        projection = layer.self_attn.ahn.o_proj
        projection.weight = mx.random.normal(projection.weight.shape)
    return model, load_tokenizer(directories[VARIANTS[0]]), "wide"


@pytest.mark.parametrize("bits", [8, 4])
def test_the_same_with_a_quantized_window(wide, bits, tmp_path):
    check_one_go(wide, tmp_path, kv_bits=bits, kv_group_size=32)


def test_saved_forked_and_appended_are_bit_for_bit_one_go(loaded, tmp_path):
    check_one_go(loaded, tmp_path)


def check_one_go(loaded, tmp_path, **group):
    whole, first = new(loaded, **group), new(loaded, **group)
    whole.read(TEXT + MORE)
    first.read(TEXT)
    first.save(tmp_path / "a.ahn")
    model, tokenizer, _ = loaded
    second = Session.load(tmp_path / "a.ahn", model, tokenizer)
    assert same(first, second)
    fork = second.fork()
    second.read(MORE)
    assert same(whole, second)
    assert same(first, fork)  # untouched by what the other read
    fork.read(MORE)
    assert same(whole, fork)
    assert "".join(whole.ask("Why?", max_tokens=5)) == "".join(fork.ask("Why?", max_tokens=5))
    whole.save(tmp_path / "b.ahn")
    assert same(whole, Session.load(tmp_path / "b.ahn", model, tokenizer))


def test_read_in_pieces(loaded):
    whole, pieces = new(loaded), new(loaded)
    whole.read(TEXT)
    ids = new(loaded).encode(TEXT)
    pieces.encode("")
    for at in range(0, len(ids), 21):
        pieces.read_ids(ids[at : at + 21])
    assert same(whole, pieces)


def test_stopping_between_steps_and_inside_of_one(loaded):
    session, other = new(loaded), new(loaded)
    ids = session.encode(TEXT)

    def stop(read: int) -> None:
        if read >= 32:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.read_ids(ids, stop)
    other.encode("")
    other.read_ids(ids[:32])
    assert same(session, other)
    session.read_ids(ids[32:])
    other.read_ids(ids[32:])
    assert same(session, other)
    model = session.model

    class Broken:
        args = model.args

        def __call__(self, *_, **__):
            return 1 / 0

    session.model = Broken()
    with pytest.raises(ZeroDivisionError):
        session.read_ids(ids)
    session.model = model
    for act in (lambda: session.read("x"), lambda: session.save("x"), session.ask("x").__next__):
        with pytest.raises(AHNError, match="interrupted inside"):
            act()


def test_an_answer_that_is_closed_or_fails(loaded):
    session, before = new(loaded), new(loaded)
    for s in (session, before):
        s.read(TEXT)
    answer = session.ask("Why?", max_tokens=9)
    next(answer)
    next(answer)
    answer.close()
    assert session.turn == "cut"
    assert session.tokens > before.tokens and session.tail.ids == ()

    def stop(read: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(before.ask("Why?", progress=stop))
    untouched = new(loaded)
    untouched.read(TEXT)
    assert same(before, untouched)


def test_a_conversation_is_what_the_chat_template_says(loaded):
    session = new(loaded, system="Be brief.")
    session.step = 1000  # all is tail
    session.read("One.")
    tokenizer = session.tokenizer
    said = [*session.tail.ids, *session._question("Two?")]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One.\n\nTwo?"},
    ]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode(said) == expected
    session.turn = "cut"
    messages += [{"role": "assistant", "content": "A."}, {"role": "user", "content": "B?"}]
    whole = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert whole == expected + "A." + tokenizer.decode(session._question("B?"))


def test_what_comes_while_a_session_answers_is_not_lost(loaded):
    session, other = new(loaded), new(loaded)
    for one in (session, other):
        one.read(TEXT)
    answer = session.ask("Why?", max_tokens=3)
    next(answer)
    for act in (lambda: session.read("more"), session.ask("And?").__next__):
        with pytest.raises(AHNError, match="is answering"):
            act()
    assert "".join(session.fork().ask("Why?", max_tokens=3)) == "".join(
        other.fork().ask("Why?", max_tokens=3)
    )
    answer.close()
    next(other.ask("Why?", max_tokens=3))  # dropped, which closes it
    for one in (session, other):
        one.read("more")
    assert same(session, other)


def test_forks_answer_at_once_from_several_threads(directories):
    """Each says what it says alone, while others trace the same layers; and the process ends
    as one that has used a single thread."""
    program = f"""
import ahn_mlx
from concurrent.futures import ThreadPoolExecutor
model, tokenizer = ahn_mlx.load({str(directories[VARIANTS[0]])!r})
session = ahn_mlx.Session(model, tokenizer)
session.read("It is a truth universally acknowledged. " * 3)
ask = lambda n: "".join(session.fork().ask("Why? " * (n % 4), max_tokens=8 + n % 2))
together = []
for _ in range(6):  # new threads each time, which trace anew
    with ThreadPoolExecutor(4) as pool:
        together += pool.map(ask, range(4))
print(together == 6 * [ask(n) for n in range(4)], len(set(together)) > 1)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "True True\n", done.stderr


def test_threads_that_answered_leave_a_process_that_can_end(directories):
    """MLX's own threads outlive those that made them, which ends a process by a signal."""
    program = f"""
import ahn_mlx
from concurrent.futures import ThreadPoolExecutor
session = ahn_mlx.Session(*ahn_mlx.load({str(directories[VARIANTS[0]])!r}))
session.read("It is a truth universally acknowledged. " * 20)
with ThreadPoolExecutor(4) as pool:
    list(pool.map(lambda n: "".join(session.fork().ask("Who?", max_tokens=8)), range(8)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_asynchronous(loaded):
    one, other = new(loaded), new(loaded)
    for s in (one, other):
        s.read(TEXT)

    async def answer() -> str:
        return "".join([text async for text in one.stream("Why?", max_tokens=5)])

    assert asyncio.run(answer()) == "".join(other.ask("Why?", max_tokens=5))
    assert same(one, other)


@pytest.fixture
def saved(loaded, tmp_path):
    session = new(loaded)
    session.read(TEXT)
    session.save(tmp_path / "book.ahn")
    return tmp_path / "book.ahn"


def test_bit_flips_and_truncation(saved):
    data = saved.read_bytes()
    for at in (3, 20, 200, len(data) // 2, len(data) - 1):
        saved.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        with pytest.raises(AHNError, match=r"book\.ahn"):
            memoryfile.verify(saved)
    for size in (0, 5, 100, len(data) - 1):
        saved.write_bytes(data[:size])
        with pytest.raises(AHNError, match=r"book\.ahn"):
            memoryfile.verify(saved)


def rewrite(file: Path, **facts) -> None:
    """Change facts, with a checksum that fits."""
    arrays, metadata = mx.load(str(file), format="safetensors", return_metadata=True)
    text = json.dumps({**json.loads(metadata["ahn"]), **facts}, sort_keys=True)
    mx.eval(arrays)
    target = file.with_suffix(".safetensors")
    checked = memoryfile._checksum(text, arrays)
    mx.save_safetensors(str(target), arrays, {"ahn": text, "sha256": checked})
    target.rename(file)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"version": 4}, "version 4, this program reads 3"),
        ({"window": 99}, "has window 99, not 12"),
        ({"sinks": 9}, "has sinks 9, not 4"),
        ({"tokenizer": "x"}, "another tokenizer"),
        ({"model": {"name": "other"}}, "another model, 'other'"),
        ({"layers": [[1, 2]]}, "damaged"),
        ({"layers": None}, "damaged"),
        ({"layers": []}, "damaged"),
    ],
)
def test_what_does_not_fit(loaded, saved, facts, message):
    rewrite(saved, **facts)
    with pytest.raises(AHNError, match=message):
        Session.load(saved, loaded[0], loaded[1])


def test_a_memory_that_says_too_little(loaded, saved):
    arrays, metadata = mx.load(str(saved), format="safetensors", return_metadata=True)
    mx.eval(arrays)
    facts = json.loads(metadata["ahn"])
    for missing in facts:
        text = json.dumps({k: v for k, v in facts.items() if k != missing})
        checked = memoryfile._checksum(text, arrays)
        mx.save_safetensors(str(saved) + ".safetensors", arrays, {"ahn": text, "sha256": checked})
        with pytest.raises(AHNError, match="damaged"):
            Session.load(str(saved) + ".safetensors", loaded[0], loaded[1])


def test_other_weights_and_other_files(directories, saved, loaded, tmp_path):
    other, _ = load_model(Path(loaded[2]), dtype="float32")
    other.layers[0].self_attn.ahn.o_proj.weight += 1
    with pytest.raises(AHNError, match="weights differ"):
        Session.load(saved, other, loaded[1])
    with pytest.raises(AHNError, match="no such file"):
        memoryfile.verify(tmp_path / "none.ahn")
    with pytest.raises(AHNError, match="is not a memory"):
        memoryfile.verify(Path(loaded[2]) / "model.safetensors")
    (tmp_path / "huge.ahn").write_bytes(struct.pack("<Q", 1 << 60))
    with pytest.raises(AHNError, match="claims"):
        memoryfile.verify(tmp_path / "huge.ahn")


def test_disk_full_keeps_the_old_file(saved, loaded):
    before = saved.read_bytes()
    session = new(loaded)
    session.read(MORE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memoryfile.TensorWriter, "put", lambda *_: (_ for _ in ()).throw(OSError(28)))
        with pytest.raises(AHNError, match="cannot be written"):
            session.save(saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def run(*args: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ahn_mlx", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, **options)


@pytest.mark.slow
def test_commands(directories, tmp_path):
    book, memory = tmp_path / "book.txt", tmp_path / "book.ahn"
    book.write_text(10 * TEXT)
    model = directories["qwen2-gdn"]
    done = run("digest", "--model", model, "--prompt-file", book, "-o", memory)
    assert done.returncode == 0, done.stderr
    assert "tokens in" in done.stderr
    before = memory.read_bytes()
    done = run("ask", "--memory", memory, "Why?", "--max-tokens", 3)
    assert done.returncode == 0 and "first token after" in done.stderr, done.stderr
    assert memory.read_bytes() == before
    info = run("memory", "info", memory)
    assert "It was the best of times" in info.stdout and "state" in info.stdout
    assert run("memory", "verify", memory).stdout.strip().endswith("sound")
    lines = f"Hello\n/stats\n/read {book}\n/save {tmp_path}/c.ahn\n/reset\n/load {tmp_path}/c.ahn\n"
    lines += "/nonsense\n/save\n/stats\n/quit\nnever said\n"
    done = run("chat", "--memory", memory, "--max-tokens", 2, input=lines)
    assert done.returncode == 0, done.stderr
    assert "no such command: /nonsense" in done.stderr and "needs a file" in done.stderr
    assert run("memory", "verify", tmp_path / "c.ahn").returncode == 0
    done = run("digest", "--model", model, "--prompt-file", book, "-o", memory)
    assert done.returncode == 2 and "--append" in done.stderr
    done = run("digest", "--prompt-file", book, "-o", memory, "--append")
    assert done.returncode == 0, done.stderr
    data = bytearray(memory.read_bytes())
    data[-1] ^= 1
    memory.write_bytes(data)
    for command in (["memory", "verify", memory], ["ask", "--memory", memory, "Why?"]):
        done = run(*command)
        assert done.returncode == 2 and "checksum" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])  # fifty kills, on two cores
def test_kills_lose_at_most_a_checkpoint(directories, tmp_path, seed):
    book, memory, once = tmp_path / "book.txt", tmp_path / "book.ahn", tmp_path / "once.ahn"
    book.write_text(60 * TEXT)
    options = ["--model", directories["qwen2-gdn"], "--prompt-file", book]
    command = ["digest", *options, "--checkpoint-every", 512, "-o"]
    begin = time.perf_counter()
    assert run(*command, once).returncode == 0
    seconds = time.perf_counter() - begin
    partial = tmp_path / "book.ahn.partial"
    chance, kills, done = random.Random(seed), 0, 0
    while kills < 25:
        arguments = [sys.executable, "-m", "ahn_mlx", *map(str, command), str(memory)]
        child = subprocess.Popen(arguments, stderr=subprocess.DEVNULL)
        try:
            assert child.wait(chance.uniform(0.3, 1.0) * seconds) == 0
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            kills += 1
        if memory.exists():
            assert content(memory) == content(once)
            memory.unlink()
            partial.unlink(missing_ok=True)
            done = 0
        elif partial.exists():
            read = memoryfile.read_facts(partial)["done"]
            assert read % 512 == 0 and read >= done
            done = read
    assert run(*command, memory).returncode == 0
    assert content(memory) == content(once)
    assert {f.name for f in tmp_path.iterdir()} == {"book.txt", "book.ahn", "once.ahn"}


def content(file: Path) -> tuple:
    """All of a memory but when it was saved, and its texts read."""
    arrays = mx.load(str(file), format="safetensors")
    facts = memoryfile.read_facts(file)
    facts["texts"] = [{**text, "read": 0} for text in facts["texts"]]
    return {k: v for k, v in facts.items() if k != "saved"}, {
        name: bytes(memoryview(x.view(mx.uint8))) for name, x in arrays.items()
    }
