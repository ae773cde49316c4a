"""Chat templates taken apart: the parts are what the template says, or it is refused."""

import os
import re
import shutil
import signal
import threading
import time
from itertools import chain, pairwise, repeat

import mlx.core as mx
import pytest
from checkpoints import CHATML, chat_tokenizer, talking_model
from click.testing import CliRunner
from mlx_lm.tokenizer_utils import load as load_tokenizer

from ahn_mlx import AHNError, load_model
from ahn_mlx.cli import cli
from ahn_mlx.cli.digest import _job
from ahn_mlx.reading import memoryfile, template
from ahn_mlx.reading.generate import make_prompt
from ahn_mlx.reading.session import Session
from ahn_mlx.reading.template import Template, TemplateError

THINK = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
TRIMMED = CHATML.replace("m.content", "m.content | trim")
PARTS = CHATML.replace("{{ m.content }}", "{% for p in m.content %}{{ p.text }}{% endfor %}")
# At one end only.
LEFT, RIGHT = (
    CHATML.replace("m.content", f"(m.content.{trim}() if m.role == 'user' else m.content)")
    for trim in ("lstrip", "rstrip")
)
SYSTEM_LAST = (
    "{% set sys = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {% if loop.last and sys %}{{ sys }}"
    "\n\n{% endif %}{{ m.content }}[/INST]{% elif m.role == 'assistant' %}{{ m.content }}<|im_end|>"
    "{% endif %}{% endfor %}"
)
SYSTEM_AT_END = CHATML.replace(
    "{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"
).replace("{% if add", "({{ messages[0].content if messages[0].role == 'system' }}){% if add")
REASONS = (  # says what it thought in the last answer only
    "{% for m in messages %}{% if m.role == 'user' %}<U>{{ m.content }}"
    "{% elif m.role == 'assistant' %}<A>{{ m.content.split('</think>')[-1] }}<|im_end|>"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<A><think>\n{% endif %}"
)
NUMBERED = (
    "{% for m in messages %}{% if m.role == 'user' %}[Round {{ loop.index0 // 2 + 1 }}]\n"
    "Q: {{ m.content }}\nA: {% else %}{{ m.content }}\n{% endif %}{% endfor %}"
)
EMPTY_THOUGHTS = CHATML.replace(
    "{{ m.content }}", "{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}"
)
TRIMS_LATER = CHATML.replace("m.content", "m.content if loop.first else m.content | trim")
ONE_TURN = "{% if messages | length > 3 %}{{ raise_exception('one turn') }}{% endif %}" + CHATML
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
)
DATED = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\n"
    "It is {{ strftime_now('%H:%M:%S') }}{{ '.' * (strftime_now('%S') | int) }}<|im_end|>\n"
    "{% endif %}" + CHATML
)
SAID = ["One.", "1", "Two?", "2", "Three", "3", "Four!"]


def rendered(tokenizer, contents, system="", listed=False) -> str:
    """By the tokenizer, all of it."""
    roles = ("user", "assistant") * len(contents)
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    messages = [{"role": "system", "content": system}] * bool(system) + messages
    if listed:
        messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def conversation(template: Template, contents: list[str]) -> str:
    """The parts put together; what the prompt of a past answer says more is left out."""
    text, turn = "", "start"
    for n, content in enumerate(contents):
        if n % 2:
            text = text.removesuffix("<think>\n") + content
        else:
            text += "".join(template.question(turn, content))
        turn = "cut"
    return text


WHOLE = {
    "chatml": CHATML,
    "think": THINK,
    "trimmed": TRIMMED,
    "trimmed left": LEFT,
    "trimmed right": RIGHT,
    "parts": PARTS,
    "reasons": REASONS,
    "dated": DATED,
}


def test_a_template_that_writes_a_book_of_its_own_is_refused():
    most = 1 << 20
    for n, fits in ((most // 1000, True), (most, False)):
        tokenizer = chat_tokenizer(f"{{{{ 'x' * {n} }}}}[{{{{ messages[-1].content }}}}]")
        if fits:
            assert len("".join(Template(tokenizer, "").question("start", "Why?"))) == n + 6
            continue
        with pytest.raises(TemplateError, match=r"the chat template writes 1,048,\d{3} characters"):
            Template(tokenizer, "")


def test_a_template_that_fails_for_a_text_may_take_a_list_of_parts():
    tokenizer = chat_tokenizer(
        "{% for m in messages %}{% if m.content is string %}{{ raise_exception('a list') }}"
        "{% endif %}[{{ m.content[0].text }}]{% endfor %}"
    )
    assert "".join(Template(tokenizer, "").question("start", "Why?")) == "[Why?]"


@pytest.mark.parametrize("system", ["", "Be brief.", " Be\nbrief. \n"])
@pytest.mark.parametrize("name", WHOLE)
def test_the_parts_are_what_the_template_says(name, system):
    tokenizer = chat_tokenizer(WHOLE[name])
    # A second may pass while a template that prints the time is at work.
    for _ in range(3):
        expected = rendered(tokenizer, SAID, system, listed=name == "parts")
        template = Template(tokenizer, system)
        if rendered(tokenizer, SAID, system, listed=name == "parts") == expected:
            break
    assert conversation(template, SAID) == expected
    one = rendered(tokenizer, [" \n<x> {{ y }} \n"], system, listed=name == "parts")
    if name != "dated":
        assert "".join(template.question("start", " \n<x> {{ y }} \n")) == one


@pytest.mark.parametrize(
    ("source", "system"),
    [
        (SYSTEM_LAST, "Be brief."),
        (NUMBERED, ""),
        (EMPTY_THOUGHTS, ""),
        (TRIMS_LATER, ""),
        (ONE_TURN, "Be brief."),
        (SYSTEM_AT_END, "Be brief."),
    ],
)
def test_a_template_of_one_turn_is_enough_for_one(source, system):
    tokenizer = chat_tokenizer(source)
    template = Template(tokenizer, system)
    whole = rendered(tokenizer, ["One."], system)
    assert "".join(template.question("start", "One.")) == whole
    assert tokenizer.decode(make_prompt(tokenizer, "One.", system=system)) == whole
    for turn in ("answered", "cut"):
        with pytest.raises(TemplateError, match="allows one question and no second"):
            template.question(turn, "Two?")


def test_the_system_message_is_content_wherever_it_stands():
    for source in (SYSTEM_LAST, SYSTEM_AT_END, CHATML):
        pieces = Template(chat_tokenizer(source), "Be brief.").question("start", "One.")
        assert sorted(pieces[1::2]) == ["Be brief.", "One."]
    # Without one, later turns of this template are as the first.
    Template(chat_tokenizer(SYSTEM_LAST)).opening("answered")


def test_a_question_after_a_text_keeps_the_space_before_it():
    found = Template(chat_tokenizer(TRIMMED), "")
    assert found.question("read", "  why ")[:2] == ("", "\n\n  why")
    assert found.question("read", "  ")[:2] == ("", "")
    assert found.question("start", "  why ")[1] == "why"


def test_a_second_may_change_while_a_template_is_taken_apart(monkeypatch):
    clock = chain([1, 1, 1, 2], repeat(3))  # within the first attempt
    whole = template.render

    def render(*given, **named):
        return f"[{next(clock)}]{whole(*given, **named)}"

    monkeypatch.setattr(template, "render", render)
    found = Template(chat_tokenizer(CHATML), "")
    assert found.start[0].startswith("[3]") and found.opening("answered")


def test_a_document_in_pieces_and_then_a_question():
    template = Template(chat_tokenizer(TRIMMED))
    pieces = (*template.opening("start"), template.begin(" \n One. "), *template.opening("read"))
    text = "".join((*pieces, *template.question("read", "Two? \n")))
    assert text == rendered(chat_tokenizer(CHATML), ["One. \n\nTwo?"])
    assert "".join(template.question("read", " ")) == "".join(template.answer)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (None, "has no chat template"),
        ("{% for m in messages %}{{ m.a.b }}{% endfor %}", "failed .*no attribute 'a'"),
        ("{% for m in messages %}{{ m.content ", "failed .*unexpected end of template"),
        ("{{ ''.__class__.__mro__ }}" + CHATML, "failed .*unsafe"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "failed .*recursion"),
        ("{{ 1 // 0 }}", "failed .*zero"),
        ("{% for i in range(10**9) %}{% endfor %}" + CHATML, "failed .*[Rr]ange"),
        ("{% for i in range(99999) %}twelve chars{% endfor %}" + CHATML, "1,199,988|1,200,0"),
        ("{% for i in range(99999) %}" * 2 + "." + "{% endfor %}" * 2 + CHATML, "without end"),
        ("Hello!", "does not say a message just once"),
        (CHATML + "{{ messages[-1].content }}", "does not say a message just once"),
        (CHATML.replace("m.content", "m.content | e"), "changes what it is given"),
        (CHATML.replace("m.content", "m.content[:20]"), "changes what|just once"),
        (CHATML + "{{ range(99999) | random }}", "something else each time"),
    ],
)
def test_what_cannot_be_taken_apart_is_refused(source, reason):
    with pytest.raises(TemplateError, match=reason) as refusal:
        Template(chat_tokenizer(source))
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 300


def test_a_template_without_end_is_given_up(monkeypatch):
    monkeypatch.setattr("ahn_mlx.reading.template.SECONDS", 0.01)
    loops = "{% for i in range(9999) %}" * 2 + "{% endfor %}" * 2
    with pytest.raises(TemplateError, match="does not end"):
        Template(chat_tokenizer(loops + CHATML))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (NO_SYSTEM + CHATML, r"no system role here.*drop --system"),
        (CHATML.replace("in messages", "in messages if m.role != 'system'"), "no place for a sys"),
    ],
)
def test_a_system_message_that_the_template_does_not_take(source, reason):
    Template(chat_tokenizer(source))
    with pytest.raises(AHNError, match=reason):
        Template(chat_tokenizer(source), "Be brief.")


def test_an_answer_ends_as_the_template_ends_it():
    template = Template(chat_tokenizer())
    assert template.opening("answered") == ("\n<|im_start|>user\n",)  # the model said its end
    assert template.opening("cut") == ("<|im_end|>\n<|im_start|>user\n",)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return talking_model("qwen2-gdn", tmp_path_factory.mktemp("model"))


@pytest.fixture
def speaking(model, tmp_path):
    """The model with another template."""

    def change(source: str | None):
        path = shutil.copytree(model, tmp_path / "model")
        config = '{"tokenizer_class": "PreTrainedTokenizerFast"}'
        (path / "tokenizer_config.json").write_text(config)
        if source is not None:
            (path / "chat_template.jinja").write_text(source)
        return path

    return change


def run(*args: object, stdin: str = ""):
    return CliRunner().invoke(cli, [*map(str, args)], input=stdin)


def refusal(*args: object, stdin: str = "") -> str:
    error = run(*args, stdin=stdin).exception
    assert isinstance(error, AHNError)
    return str(error)


@pytest.mark.parametrize("source", [None, "Hello!"])
def test_each_command_advises_what_it_has(speaking, tmp_path, source):
    path = speaking(source)
    for command in (["generate", "--prompt", "Hi"], ["digest", "-o", tmp_path / "a.ahn"]):
        said = refusal(*command, "--model", path, stdin="A text.")
        assert said.endswith("use --ignore-chat-template")
    said = refusal("chat", "--model", path, stdin="Hi\n")
    assert "--ignore-chat-template" not in said and "ahn-mlx digest and ask" in said
    done = run(
        *("digest", "--model", path, "--ignore-chat-template", "-o", tmp_path / "a.ahn"),
        stdin="A text.",
    )
    assert done.exit_code == 0, done.output


def test_one_turn_is_enough_to_digest_and_ask(speaking, tmp_path):
    path, memory = speaking(NUMBERED), tmp_path / "a.ahn"
    assert "ahn-mlx digest and ask" in refusal("chat", "--model", path, stdin="Hi\n")
    assert run("digest", "--model", path, "-o", memory, stdin="A text. " * 9).exit_code == 0
    asked = run("ask", "--memory", memory, "--interactive", "--max-tokens", 2, stdin="Why?\nSo?\n")
    assert asked.exit_code == 0 and asked.output.count("first token after") == 2
    assert run("digest", "-o", memory, "--append", stdin="More. " * 9).exit_code == 0
    loaded, tokenizer = load_model(path)[0], load_tokenizer(path)
    session = Session.load(memory, loaded, tokenizer)
    list(session.ask("Why?", max_tokens=1))
    session.save(memory)
    said = refusal("digest", "-o", memory, "--append", stdin="More.")
    assert "a.ahn" in said and "without --append" in said


def test_a_template_that_prints_the_time_does_not_stop_a_digest(speaking, tmp_path):
    path, memory, partial = speaking(DATED), tmp_path / "a.ahn", tmp_path / "a.ahn.partial"
    text = "It was the best of times, it was the worst of times. " * 120
    (tmp_path / "a.txt").write_text(text)
    command = ["digest", "--model", path, "--prompt-file", tmp_path / "a.txt", "-o", memory]
    command += ["--checkpoint-every", 512]

    def interrupt() -> None:
        while not partial.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    watcher = threading.Thread(target=interrupt)
    watcher.start()
    stopped = run(*command)
    watcher.join()
    assert stopped.exit_code == 130, stopped.output
    opening = memoryfile.read_facts(partial)["opening"]
    assert re.search(r"It is \d\d:\d\d:\d\d", opening[0])
    time.sleep(1.1)
    done = run(*command)
    assert done.exit_code == 0 and "going on after" in done.output, done.output
    assert "starting anew" not in done.output
    model, tokenizer = load_model(path)[0], load_tokenizer(path)
    found, whole = Session.load(memory, model, tokenizer), Session(model, tokenizer)
    whole.read_ids(whole.encode(text, opening))
    assert found.tokens == whole.tokens
    for a, b in zip(found.caches, whole.caches, strict=True):
        for x, y in zip(a.state, b.state, strict=True):
            assert mx.array_equal(x, y) if isinstance(x, mx.array) else x == y


def test_another_text_or_setting_is_another_job(speaking, tmp_path):
    path = speaking(CHATML)
    loaded, tokenizer = load_model(path)[0], load_tokenizer(path)
    sessions = [Session(loaded, tokenizer), Session(loaded, tokenizer, system="Be brief.")]
    sessions += [Session(loaded, tokenizer, chat=False)]
    jobs = [_job(s, "A text.", {"kv_bits": None, "kv_group_size": 64}) for s in sessions]
    jobs += [
        _job(sessions[0], "Another.", {"kv_bits": None, "kv_group_size": 64}),
        _job(sessions[0], "A text.", {"kv_bits": "8", "kv_group_size": 64}),
    ]
    assert all(a != b for a, b in pairwise(sorted(jobs)))
    assert jobs[0] == _job(
        Session(loaded, tokenizer), "A text.", {"kv_bits": None, "kv_group_size": 64}
    )


def test_facts_of_a_template_that_allows_one_question():
    once = "{% if messages | length > 1 %}{{ raise_exception('one') }}{% endif %}"
    facts = Template(chat_tokenizer(once + "[{{ messages[0].content }}]")).facts()
    assert facts["between"] is None and "one" in facts["why"] and facts["end"] == ""
    whole = Template(chat_tokenizer(CHATML), "Be brief.").facts()
    assert whole["start"][1] is None and whole["why"] == "" and whole["end"] == "<|im_end|>"
    assert "".join(x for x in whole["between"] if x).endswith("user\n") and whole["trim"] == "str"
