"""An option that changes nothing is refused, before anything is read or loaded."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from checkpoints import GDN, make_base, memory_of, talking_model
from click.testing import CliRunner

from ahn_mlx import AHNError, Session, load
from ahn_mlx.cli import cli
from ahn_mlx.hub.published import DEFAULT
from ahn_mlx.platform import enough_memory

TEXT = "It is a far, far better thing that I do, than I have ever done. "
NOWHERE = ["--model", "no-such/model"]  # which a command that goes on does not find


def run(*args: object, said: str = "") -> str:
    done = CliRunner().invoke(cli, list(map(str, args)), input=said, catch_exceptions=False)
    return done.output


ask = ["ask", "--memory", "absent.ahn", "Why?"]
chat = ["chat", "--memory", "absent.ahn"]
append = ["digest", "-o", "absent.ahn", "--append"]
compare = ["compare", "--text", "absent.txt"]
digest = ["digest", "-o", "absent.ahn"]
generate = ["generate", "--prompt", "Hi"]
paper = ["estimate", "--paper"]
train = ["train", "--data", "absent.txt", "--out", "absent"]

SETTINGS = [["--window", 9], ["--sinks", 2], ["--dtype", "float32"], ["--q-bits", "8"]]
STEPS = [["--lr", 0.1], ["--warmup", 3], ["--weight-decay", 0.1], ["--loss", "ce"]]
STEPS += [
    ["--accumulate", 2],
    ["--batch-size", 2],
    ["--grad-checkpoint"],
    ["--save-every", 2],
    ["--random-window"],
]
PAPER = [["--model", "a/b"], ["--context", 9], ["--window", 9], ["--sinks", 2], ["--json"]]
PAPER += [["--kind", "mamba2"], ["--kv-bits", "8"], ["--q-bits", "8"], ["--force"]]
PAPER += [["--compare", "ahn"], ["--chip", "m1"], ["--out", "a.png"]]

# A command, the options that do nothing in it, and what the refusal says.
IDLE = [
    *((a, o, "at --temp 0") for a in (generate, ask, ["chat"], chat) for o in (["--top-p", 0.5],)),
    *((a, o, "at --temp 0") for a in (generate, ask, ["chat"], chat) for o in (["--seed", 3],)),
    *((a, ["--kv-group-size", 32], "without --kv-bits") for a in (generate, ["chat"])),
    *(
        (
            [*a, "--system-prompt", "Be kind.", "--ignore-chat-template"],
            [],
            "--system-prompt has no effect",
        )
        for a in (generate, digest)
    ),
    *((append, o, "with --append: absent.ahn") for o in SETTINGS),
    *((append, o, "with --append") for o in (["--kv-bits", "8"], ["--ignore-chat-template"])),
    (append, ["--system-prompt", "Be kind."], "with --append"),
    *((chat, o, "with --memory: absent.ahn") for o in SETTINGS),
    *((chat, o, "with --memory") for o in (["--kv-bits", "8"], ["--kv-group-size", 32])),
    (chat, ["--system-prompt", "Be kind."], "with --memory"),
    *((a, ["--q-bits", "8"], f"on {DEFAULT}: it is converted") for a in (generate, ["chat"])),
    *((a, ["--q-bits", "4"], f"on {DEFAULT}: it is converted") for a in (digest, compare)),
    (["bench"], ["--q-bits", "0"], f"on {DEFAULT}: it is converted"),
    ([*generate, "--quiet"], ["--verbose"], "with --quiet"),
    *((a, [o, 1], "at --temp 0") for a in (generate, ask) for o in ("--top-k", "--min-p")),
    (generate, ["--repetition-context-size", 9], "without --repetition-penalty"),
    (["bench", "--json"], ["--chip", "m1"], "with --json"),
    ([*generate, "--model", "me/mine"], ["--q-bits", "8"], "on me/mine: it is converted"),
    ([*generate, "--model", str(GDN)], ["--q-bits", "8"], "it is converted"),
    (["pull", "me/mine"], ["--q-bits", "8"], "on me/mine: it is converted"),
    (["pull", "me/mine"], ["--base-revision", "v1"], "use --revision"),
    *((paper, o, "with --paper") for o in PAPER),
    (["estimate", "--json"], ["--chip", "m1"], "with --json"),
    *((["estimate", "--compare", "full"], o, "on full attention") for o in SETTINGS[:2]),
    (["estimate", "--compare", "full"], ["--kv-bits", "8"], "on full attention"),
    (["estimate", "--compare", "full,window"], ["--kind", "mamba2"], "without ahn"),
    *((a, ["--force"], "without --out") for a in (["estimate"], compare)),
    *(
        ([*a, "--ahn", "a"], ["--q-bits", "8"], "with --ahn")
        for a in (compare, generate, ["bench"])
    ),
    ([*compare, "--ahn", "a", "--model", "ahn-gdn-3b"], ["--q-bits", "8"], "with --ahn"),
    ([*compare, "--stream", 99], ["--segments", 2], "with --stream"),
    ([*compare, "--stream", 99], ["--seq-len", 64], "with --stream"),
    (compare, ["--stream-from", 5], "without --stream"),
    *(([*train, "--steps", 0], o, "with --steps 0") for o in STEPS),
    ([*train, "--ahn", "a"], ["--kind", "mamba2"], "with --ahn: a has"),
    ([*train, "--ahn", "a"], ["--layerwise", 4], "with --ahn: a has"),
]


@pytest.mark.parametrize(("command", "option", "reason"), IDLE)
def test_what_changes_nothing_is_refused(command, option, reason):
    with pytest.raises(AHNError) as error:
        run(*command, *option)
    said = str(error.value)
    assert reason in said and "\n" not in said
    assert not option or option[0] in said


# The same options where they do something: the command goes on, and misses what it reads.
WORKING = [
    ([*generate, "--temp", 0.5], ["--top-p", 0.5]),
    ([*generate, "--temp", 0.5], ["--seed", 3]),
    ([*generate, "--kv-bits", "8"], ["--kv-group-size", 32]),
    (generate, ["--system-prompt", "Be kind."]),
    (generate, ["--ignore-chat-template"]),
    ([*generate, "--temp", 1], ["--top-k", 5, "--min-p", 0.1]),
    (generate, ["--repetition-penalty", 1.2, "--repetition-context-size", 9, "--stop", "."]),
    (generate, ["--verbose", "--json"]),
    (generate, ["--window", 9, "--sinks", 2, "--dtype", "float16"]),
    (["chat"], ["--window", 9, "--sinks", 2, "--kv-bits", "4", "--system-prompt", "Be kind."]),
    (["chat", "--temp", 1], ["--seed", 1, "--top-p", 0.5]),
    (compare, ["--stream", 99, "--stream-from", 5]),
    (compare, ["--segments", 2, "--seq-len", 64]),
    (compare, ["--window", 9]),
    (["bench"], ["--context", 9, "--tokens", 2, "--chip", "m1"]),
    (["estimate"], ["--window", 9, "--kv-bits", "8", "--kind", "mamba2", "--chip", "m1"]),
    (["estimate", "--compare", "full,ahn"], ["--window", 9, "--json"]),
    (["estimate"], ["--chip", "M4-Pro"]),
]


@pytest.mark.parametrize(("command", "option"), WORKING)
def test_what_changes_something_is_taken(command, option):
    with pytest.raises(AHNError, match=r"no-such/model|absent\.txt"):
        run(*command, *option, "--model", "no-such/model/")


def test_defaults_are_not_options_that_were_given():
    assert "window" in run("estimate", "--paper")
    assert '"cache_bytes"' in run("estimate", "--json")


@pytest.mark.parametrize(
    "options", [["--steps", 0, "--layerwise", 0], ["--random-window"], ["--ahn", GDN / "ahn_only"]]
)
def test_train_takes_what_the_checkpoint_keeps(options, tmp_path, monkeypatch):
    """Window and sinks are written down, also where steps draw their own."""
    monkeypatch.chdir(tmp_path)  # where --out is made
    with pytest.raises(AHNError, match="no-such"):
        run(*train, "--window", 9, "--sinks", 2, "--model", "no-such", *options)


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> tuple[Path, list[object]]:
    """Heads that can be quantized: two layers, one head of keys of 32 numbers."""
    place = tmp_path_factory.mktemp("wide")
    base = make_base(place / "base", vocab_size=256)
    return place, ["--model", base, "--ahn", memory_of(base, place / "memory")]


@pytest.mark.parametrize(("bits", "group"), [(8, 32), (4, 32)])
def test_a_window_is_kept_in_the_bits_that_were_asked_for(wide, tmp_path, bits, group):
    place, model = wide
    (tmp_path / "a.txt").write_text(TEXT * 2)
    command = ["generate", "--prompt-file", tmp_path / "a.txt", "--max-tokens", 1, "--json", *model]
    quantized = ["--kv-bits", bits, "--kv-group-size", group]
    plain, small = (
        json.loads(run(*command, *more).splitlines()[-1])["cache_bytes"] for more in ([], quantized)
    )
    # Codes, and a scale and a bias in float32 for each group, instead of 32 numbers in float32.
    spared = 4 * 32 - (32 * bits // 8 + 32 // group * 2 * 4)
    # Keys and values, two layers: 4 sinks, a window of 60, and what leaves it next.
    assert plain - small == 2 * 2 * (4 + 60 + 1) * spared
    said = "Hi\n/save chat.ahn\n/quit\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        run("digest", "--prompt-file", "a.txt", "-o", "book.ahn", *quantized, *model)
        run("chat", "--max-tokens", 1, *quantized, *model, said=said)
    for name in ("book.ahn", "chat.ahn"):
        _, metadata = mx.load(str(tmp_path / name), format="safetensors", return_metadata=True)
        layers = json.loads(metadata["ahn"])["layers"]
        assert [layer[3:] for layer in layers] == [[bits, group]] * 2


# --- where a model is now ---


@pytest.fixture(scope="module")
def moved(tmp_path_factory) -> tuple[Path, Path]:
    """Memories, and their model, which is not where it was."""
    place = tmp_path_factory.mktemp("moved")
    path = talking_model("qwen2-gdn", place)
    session = Session(*load(path), origin={"name": str(path)})
    session.read(TEXT * 4)
    session.save(place / "book.ahn")
    session.origin = {"name": "ahn-gdn-3b", "q_bits": "8"}
    session.save(place / "named.ahn")
    return place, path.rename(place / "elsewhere")


@pytest.mark.parametrize("file", ["book.ahn", "named.ahn"])
def test_a_moved_model_is_given_with_a_memory(moved, tmp_path, file):
    place, model = moved
    text = tmp_path / "more.txt"
    text.write_text(TEXT)
    memory, few = Path(shutil.copy(place / file, tmp_path)), ["--max-tokens", 1]
    commands = [
        (["ask", "--memory", memory, "Why?", *few], "first token after"),
        (["chat", "--memory", memory, *few], "tokens, "),
        (["inspect", "--memory", memory, "-o", tmp_path / "a.html"], "wrote"),
        (["digest", "-o", memory, "--append", "--prompt-file", text], "tokens in"),
    ]
    for command, _ in commands if file == "book.ahn" else ():
        with pytest.raises(AHNError, match="is not there; --model says where"):
            run(*command, said="/stats\n")
    for command, message in commands:
        assert message in run(*command, "--model", model, said="/stats\n")


# --- memory that is not there ---


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("std::bad_alloc"),
        RuntimeError("[malloc] Unable to allocate 9437184000 bytes."),
        RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory (00000008)"),
        RuntimeError("cudaMallocAsync(&data, size, stream) failed: out of memory"),
        RuntimeError("can't start new thread"),
        RuntimeError("Resource temporarily unavailable"),
    ],
)
def test_too_little_memory_is_one_line_with_advice(error):
    @enough_memory("take a smaller --window")
    def load_much():
        raise error

    with pytest.raises(AHNError, match=r"not enough memory \(.+\); take a smaller --window"):
        load_much()


def test_other_errors_of_mlx_are_not_explained_away():
    with pytest.raises(RuntimeError, match="shapes"), enough_memory("take less"):
        raise RuntimeError("[matmul] shapes do not fit")
