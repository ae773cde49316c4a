"""How a question is put: prompts as data, what is cut, what a template gets, what is fetched."""

import hashlib
import json
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import serving
from checkpoints import chat_tokenizer, talking_model

from ahn_mlx import AHNError, load
from ahn_mlx.evaluate import normalize
from ahn_mlx.evaluate.prompts import FILES, TEMPLATES, Prompts, fill, read_prompts
from ahn_mlx.evaluate.protocol import Asker, checkpoint_penalty
from ahn_mlx.evaluate.records import spaced
from ahn_mlx.evaluate.results import Score, model_facts, paper_row, rows_of, score_of, table_of
from ahn_mlx.evaluate.run import reading_speed
from ahn_mlx.evaluate.suites import label_of, line_of, suite_of
from ahn_mlx.hub.datasets import checked_text
from ahn_mlx.reading.generate import prefill_step


def asker(limit: int, cut: str, template: bool = True) -> Asker:
    tokenizer = chat_tokenizer() if template else chat_tokenizer(template=None)
    return Asker(SimpleNamespace(), tokenizer, limit, cut, 1.0)


def said(asked: Asker, text: str, max_new: int = 10, chat: bool = True) -> str:
    return asked.tokenizer.decode(asked.prompt(text, max_new, chat))


TEXT = "".join(chr(ord("a") + i % 26) for i in range(300))
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def test_a_prompt_that_is_too_long_loses_its_begin_or_its_middle() -> None:
    assert said(asker(300, "end"), TEXT) == CHAT.format(TEXT)
    # As many tokens less as an answer may have.
    assert said(asker(100, "end"), TEXT) == CHAT.format(TEXT[-90:])
    assert said(asker(101, "both"), TEXT) == CHAT.format(TEXT[:50] + TEXT[-50:])
    assert said(asker(5, "end"), TEXT, 10) == CHAT.format(TEXT[-1:])


def test_what_is_no_message_goes_in_bare() -> None:
    assert said(asker(100, "both"), TEXT, chat=False) == TEXT[:50] + TEXT[-50:]
    assert said(asker(300, "end", template=False), TEXT) == TEXT


def test_answers_are_greedy_with_a_penalty_over_all_and_without_what_ends_them() -> None:
    model, tokenizer = serving.model(), serving.tokenizer()
    prompt, said = list(range(40, 90)), []
    cache = model.make_cache()
    logits = model(mx.array([prompt]), cache=cache)[0, -1]
    for _ in range(9):
        x = np.array(logits.astype(mx.float32))
        seen = sorted({*prompt, *said})
        x[seen] = np.where(x[seen] > 0, x[seen] / 1.7, x[seen] * 1.7)
        said.append(int(x.argmax()))
        logits = model(mx.array([[said[-1]]]), cache=cache)[0, -1]
    read: list[int] = []
    asked = Asker(model, tokenizer, 300, "end", 1.7)
    assert asked.answer(prompt, 9, read.append) == tokenizer.decode(said)
    assert read[-1] == len(prompt)
    tokenizer.add_eos_token(said[4])
    assert asked.answer(prompt, 9, read.append) == tokenizer.decode(said[: said.index(said[4])])


# The suites' own tables: tokens of an answer at most.
LONGEST = {
    "longbench": {
        32: "hotpotqa 2wikimqa musique triviaqa passage_count passage_retrieval_en"
        " passage_retrieval_zh",
        64: "multifieldqa_en multifieldqa_zh trec lsht lcc repobench-p",
        128: "narrativeqa qasper dureader samsum",
        512: "gov_report qmsum multi_news vcsum",
    },
    "infinitebench": {
        3: "math_find",
        5: "code_run code_debug",
        6: "passkey",
        12: "number_string",
        40: "longbook_qa_eng longbook_qa_chn longbook_choice_eng longdialogue_qa_eng",
        50: "kv_retrieval",
        1200: "longbook_sum_eng",
        30_000: "math_calc",
    },
    "lveval": {
        16: "factrecall_en factrecall_zh",
        64: "hotpotwikiqa_mixup loogle_SD_mixup loogle_CR_mixup loogle_MIR_mixup"
        " multifieldqa_en_mixup multifieldqa_zh_mixup cmrc_mixup lic_mixup dureader_mixup",
    },
}


@pytest.mark.parametrize("name", LONGEST)
def test_an_answer_is_as_long_as_its_suite_lets_it(name: str) -> None:
    table = {task: n for n, tasks in LONGEST[name].items() for task in tasks.split()}
    found = suite_of(name, "published", "128k").tasks
    assert {task: about.max_new["published"] for task, about in found.items()} == table
    for task, about in suite_of(name, "ahn", "128k").tasks.items():
        ours = {"longbench": min(500, table[task]), "infinitebench": 256, "lveval": table[task]}
        assert about.max_new["ahn"] == ours[name]


def test_control_tokens_of_a_text_stay_text() -> None:
    asked = asker(300, "end")
    ids = asked.prompt("a<|im_end|>b", 5, True)
    assert ids.count(258) == 1 and "a<|im_end|>b" in asked.tokenizer.decode(ids)


def test_templates_are_filled_once_and_braces_are_braces() -> None:
    record = {"context": "{input} {0} {x!r} %s", "input": "{context}?"}
    assert fill("C: {context} Q: {input} {y}", record) == (
        "C: {input} {0} {x!r} %s Q: {context}? {y}"
    )
    for wrong in ({"context": "x"}, {"context": "x", "input": 5}):
        with pytest.raises(AHNError, match="has no text 'input'"):
            fill("{context}{input}", wrong)


def test_prompts_are_read_as_data(tmp_path) -> None:
    trace = tmp_path / "trace"
    code = f"open({str(trace)!r}, 'w')\nDATASET_PROMPT = {{'lic_mixup': 'a' 'b', }}\n"
    (tmp_path / "config.py").write_text(code)
    assert read_prompts("lveval", tmp_path).texts == {"lic_mixup": "ab"}
    assert not trace.exists()
    for wrong in ("DATASET_PROMPT = dict(a='b')", "x = 5", "DATASET_PROMPT = [", "{", "[1]"):
        (tmp_path / "config.py").write_text(wrong)
        with pytest.raises(AHNError, match="has no table of prompts DATASET_PROMPT"):
            read_prompts("lveval", tmp_path)
    file = tmp_path / "dataset2prompt.json"
    with pytest.raises(AHNError, match=r"cannot be read \(No such file or directory\); it holds"):
        read_prompts("longbench", tmp_path)
    file.write_bytes(b'{"qmsum": "\xe9"}')
    with pytest.raises(AHNError, match=r"cannot be read \(it is no UTF-8\); it holds the prompts"):
        read_prompts("longbench", tmp_path)
    for wrong in ('{"qmsum": 5}', '{"qmsum": 5, "trec": "a"}'):
        file.write_text(wrong)
        with pytest.raises(AHNError, match="must be texts"):
            read_prompts("longbench", tmp_path)


def test_a_prompt_is_the_papers_by_its_check_sum(monkeypatch) -> None:
    prompts = Prompts({"qmsum": "Q {input}", "trec": "T"}, whole=False)
    assert not prompts.is_published("qmsum") and not prompts.is_published("trec")
    known = hashlib.sha256(b"Q {input}").hexdigest()[:16]
    monkeypatch.setitem(TEMPLATES, "qmsum", known)
    assert prompts.is_published("qmsum") and not prompts.is_published("trec")
    assert Prompts(prompts.texts, whole=True).is_published("trec")


@pytest.fixture
def server():
    """Serves one text, and counts."""
    served = {"text": b"", "asked": 0}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served["asked"] += 1
            self.send_response(200)
            self.end_headers()
            self.wfile.write(served["text"])

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    served["url"] = f"http://127.0.0.1:{server.server_port}/"
    yield served
    server.shutdown()
    server.server_close()


def test_a_text_is_fetched_once_and_only_if_it_is_the_right_one(
    server, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    server["text"] = b'{"qmsum": "Q"}'
    waits, real = [], urllib.request.urlopen

    def noted(url: str, timeout: float | None = None) -> object:
        waits.append(timeout)
        return real(url, timeout=timeout)

    monkeypatch.setattr(urllib.request, "urlopen", noted)
    right = hashlib.sha256(server["text"]).hexdigest()[:16]
    wrong = right[:-1] + ("0" if right[-1] != "0" else "1")
    with pytest.raises(AHNError, match=f"is not the text with check sum {wrong}"):
        checked_text(server["url"], wrong)
    assert checked_text(server["url"], right) == checked_text(server["url"], right)
    assert server["asked"] == 2 and waits == [30, 30]
    # Of at most a megabyte; the first is kept beside it.
    for size in (1 << 20, (1 << 20) + 1):
        server["text"] = b"x" * size
        known = hashlib.sha256(server["text"]).hexdigest()
        if size == 1 << 20:
            assert len(checked_text(server["url"], known)) == size
    with pytest.raises(AHNError, match="is not the text"):
        checked_text(server["url"], known)
    server["text"] = b'{"qmsum": "Q"}'
    monkeypatch.setitem(FILES, "longbench", ("a.json", right, ""))
    assert read_prompts("longbench", None, "http://127.0.0.1:1/").texts == {"qmsum": "Q"}
    monkeypatch.setitem(FILES, "longbench", ("a.json", "f" * 16, ""))
    with pytest.raises(AHNError, match=r"cannot be fetched .*--prompts DIR with a\.json"):
        read_prompts("longbench", None, "http://127.0.0.1:1/")


def test_the_penalty_is_the_checkpoints(tmp_path) -> None:
    path = talking_model("qwen2-gdn", tmp_path)
    model, _ = load(path)
    file = path / "generation_config.json"
    file.unlink(missing_ok=True)
    assert checkpoint_penalty(model) is None
    for value, expected in ((None, 1.0), (1.05, 1.05), (2, 2.0), (0.5, 0.5)):
        file.write_text(json.dumps({"repetition_penalty": value}))
        assert checkpoint_penalty(model) == expected
    for wrong in (0, "1.1", True, -1, 1.5e30):
        file.write_text(json.dumps({"repetition_penalty": wrong}))
        with pytest.raises(AHNError, match="must be a number above 0"):
            checkpoint_penalty(model)
    # Which has a name, and no such file.
    named = SimpleNamespace(origin=SimpleNamespace(name="ahn-gdn-smollm2-135m"))
    assert checkpoint_penalty(named) is None


def test_items_are_spaced_over_all_of_them() -> None:
    assert spaced(10, None) == list(range(10)) and spaced(3, 5) == [0, 1, 2]
    assert spaced(200, 4) == [0, 50, 100, 150] and spaced(0, 4) == []


def test_the_papers_rows_are_found_by_size_memory_and_mixer() -> None:
    facts = {"size": "3b", "memory": "gated_deltanet"}
    assert paper_row("lveval", "memory", facts, "128k")["factrecall_en"] == 12.51
    assert paper_row("lveval", "window", facts, "128k")["average"] == 4.59
    assert paper_row("lveval", "memory", facts, "64k") == {}
    assert paper_row("infinitebench", "full", facts, "")["longbook_qa_chn"] == 11.75
    assert paper_row("longbench", "full", facts, "") == {}
    assert paper_row("longbench", "memory", {"size": None, "memory": "x"}, "") == {}
    sizes = {}
    for kind, hidden in (("qwen2", 2048), ("qwen2", 3584), ("qwen2", 5120), ("llama", 2048)):
        args = SimpleNamespace(model_type=kind, hidden_size=hidden)
        model = SimpleNamespace(args=args, ahn=SimpleNamespace(memory="mamba2"))
        sizes[kind, hidden] = model_facts(model)
    assert [facts["size"] for facts in sizes.values()] == ["3b", "7b", "14b", None]
    assert paper_row("longbench", "memory", sizes["qwen2", 5120], "")["qmsum"] == 22.19


def test_suites_are_as_the_paper_ran_them() -> None:
    """Lengths, limits and exceptions, as they are published."""
    longbench = suite_of("longbench", "ahn", "")
    new = {t.name: t.max_new["ahn"] for t in longbench.chosen(())}
    assert new == {
        **{"dureader": 128, "hotpotqa": 32, "musique": 32, "narrativeqa": 128},
        **{"qmsum": 500, "triviaqa": 32},
    }
    assert longbench.tasks["qmsum"].max_new["published"] == 512
    bare = {t.name for t in longbench.tasks.values() if not t.chat}
    assert bare == {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
    infinitebench, lveval = suite_of("infinitebench", "ahn", ""), suite_of("lveval", "ahn", "128k")
    cuts = [(s.limit, s.cut["ahn"], s.window, s.sinks) for s in (longbench, infinitebench, lveval)]
    assert cuts == [
        *((32000, "end", 8064, 128), (128000, "end", 32640, 128), (256000, "both", 32640, 128))
    ]
    assert {t.max_new["ahn"] for t in infinitebench.tasks.values()} == {256}
    assert len(lveval.usual) == 11 and lveval.tasks["factrecall_en"].max_new["ahn"] == 16
    chinese = {t.name for t in lveval.tasks.values() if t.chinese}
    assert chinese == {
        *("multifieldqa_zh_mixup", "factrecall_zh", "cmrc_mixup", "lic_mixup", "dureader_mixup")
    }
    published = suite_of("infinitebench", "published", "")
    segmented = [
        {t.name for t in suite.tasks.values() if t.chinese}
        for suite in (longbench, infinitebench, published)
    ]
    assert segmented == [{"multifieldqa_zh", "dureader", "vcsum"}, {"longbook_qa_chn"}, set()]
    for suite in (infinitebench, published, lveval):
        assert all(t.chat for t in suite.tasks.values())
    assert infinitebench.tasks.keys() == {"longbook_qa_eng", "longbook_qa_chn"}
    templates = {name: t.template for name, t in published.tasks.items() if t.template != name}
    assert templates == dict.fromkeys(infinitebench.tasks, "infinitebench")
    with pytest.raises(AHNError, match="no task 'zzzzzzzz'; there are narrativeqa, qasper, "):
        longbench.chosen(("zzzzzzzz",))
    assert [t.name for t in longbench.chosen(("trec", "lcc", "trec"))] == ["trec", "lcc"]
    assert len(published.tasks) == 12 and published.tasks["passkey"].max_new["published"] == 6


def test_labels_of_the_hub_become_what_scorers_compare_with() -> None:
    options = {"options": ["x", "y", "z", "w"]}
    assert label_of("longbook_choice_eng", {"answer": ["z"], **options}) == ["z", "C"]
    assert label_of("code_debug", {"answer": ["f", "B"], **options}) == ["f", "B"]
    assert label_of("code_run", {"answer": ["-7"]}) == -7
    assert label_of("math_find", {"answer": ["7.5"]}) == 7.5
    whole = label_of("math_find", {"answer": ["7"]})
    assert whole == 7 and isinstance(whole, int)
    assert label_of("math_calc", {"answer": ["1", "2"]}) == [1, 2]
    assert label_of("kv_retrieval", {"answer": ["a-b"]}) == "a-b"
    assert label_of("longbook_qa_eng", {"answer": ["a", "b"]}) == ["a", "b"]
    # What is no list.
    assert label_of("passkey", {"answer": "12"}) == "12"
    assert label_of("longbook_qa_eng", {"answer": "ab"}) == ["ab"]
    line = line_of("infinitebench", "published", "code_run", {"id": 3, "answer": [7]}, "It is 7")
    assert line == {"id": 3, "prediction": "It is 7", "ground_truth": 7}


def test_the_bootstrap_is_the_standard_error_of_the_mean() -> None:
    score = score_of([0.0, 1.0] * 50)
    assert score.score == 50 and abs(score.standard_error - 5) < 0.5
    # The same thousand draws whenever they are made.
    assert score.standard_error == 5.17 and score_of([0.0, 1.0]).standard_error == 34.48


def test_an_average_is_of_all_tasks_of_the_paper_alike() -> None:
    suite = suite_of("longbench", "ahn", "")
    tasks = {name: Score(10.0 * i, 5 * i + 1, 0.5 * i) for i, name in enumerate(suite.usual, 1)}
    tasks["dureader"] = Score(10.13, 6, 0.5)
    tasks["trec"] = Score(99.0, 1000, 9.0)  # none of them
    found = table_of(suite, tasks, {"qmsum": 1.5, "average": 2.5}, ["a"])
    assert (found["average"], found["paper_average"]) == (35.02, 2.5)
    assert found["average_error"] == round(0.5 * (1 + 4 + 9 + 16 + 25 + 36) ** 0.5 / 6, 2) == 0.79
    assert found["tasks"]["qmsum"]["paper"] == 1.5 and found["tasks"]["trec"]["paper"] is None
    assert rows_of(found)[-1] == ["average", "", "35.02", "0.79", "2.50"]
    one = table_of(suite, {**tasks, "qmsum": Score(50.0, 1, None)}, {}, [])
    assert (one["average"], one["average_error"]) == (35.02, None)
    del tasks["qmsum"]
    part = table_of(suite, tasks, {}, [])
    assert part["average"] is part["average_error"] is part["paper_average"] is None
    assert len(rows_of(part)) == 6


def test_the_speed_of_reading_is_that_of_a_step_that_is_not_the_first(monkeypatch) -> None:
    """By a clock that goes on while the model works: kernels are compiled at the first step."""
    clock, read = [100.0], []

    class Slow:
        def make_cache(self) -> list["Slow"]:
            return [self]

        def __call__(self, ids: mx.array, cache: list["Slow"]) -> None:
            assert cache == [self]
            read.append(ids.shape)
            clock[0] += 4 / len(read)

        @property
        def state(self) -> mx.array:
            clock[0] += 0.5
            return mx.zeros(1)

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    assert reading_speed(Slow()) == prefill_step() / 2.5
    assert read == 2 * [(1, prefill_step())]


def test_words_are_found_without_a_word_of_how(capfd) -> None:
    pytest.importorskip("jieba")
    normalize._segmenter.cache_clear()
    assert normalize.jieba_cut("他来到了网易杭研大厦") == [
        "他",
        "来到",
        "了",
        "网易",
        "杭研",
        "大厦",
    ]
    assert capfd.readouterr() == ("", "")


def test_without_jieba_its_tasks_are_refused_in_a_sentence(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "jieba", None)
    normalize._segmenter.cache_clear()
    with pytest.raises(AHNError, match=r"scored with jieba: pip install 'ahn-mlx\[eval\]'"):
        normalize.jieba_cut("x")
    normalize._segmenter.cache_clear()
