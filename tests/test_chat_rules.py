"""Messages as token ids, without HTTP: what names a conversation, and where one goes on."""

import pytest
import serving
from checkpoints import CHATML, chat_tokenizer
from engines import running, small
from tokenizers import AddedToken

from ahn_mlx.reading.session import Session
from ahn_mlx.serve.chat import Chat, Conversation
from ahn_mlx.serve.parameters import APIError
from ahn_mlx.serve.shelf import Kept, Shelf

TRIMMED = CHATML.replace("m.content", "m.content | trim")
SYSTEM = {"role": "system", "content": "Be brief."}
WHO = {"role": "user", "content": "Who?"}
HE = {"role": "assistant", "content": "He."}
AND = {"role": "user", "content": "And?"}
NAME = {"name": "f", "arguments": {"a": 1}}
CALL = {**HE, "tool_calls": [{"id": "1", "type": "function", "function": NAME}]}
TOOL = [{"type": "function", "function": {"name": "f"}}]


@pytest.fixture(scope="module")
def engine():
    with running(serving.model(), chat_tokenizer(), rows=1) as engine:
        yield engine


def chat_of(engine, template=CHATML):
    """With the model's window, and a tokenizer of this template."""
    return Chat(chat_tokenizer(template), small(engine), Shelf(1 << 30))


def talk(*messages, model="tiny", tools=(), memory=None, identity=""):
    return Conversation(model, list(messages), list(tools), memory, identity)


def ids_of(text):
    """One token a byte, but for control tokens."""
    found = []
    for n, part in enumerate(text.replace("<|im_end|>", "\0E\0").split("\0")):
        found += [258] if n % 2 else _started(part)
    return found


def _started(text):
    first, *rest = text.split("<|im_start|>")
    bytes_of = chat_tokenizer().encode
    found = list(bytes_of(first, add_special_tokens=False)) if first else []
    for part in rest:
        found += [257, *(bytes_of(part, add_special_tokens=False) if part else [])]
    return found


def read_by(engine, kept_ids, chat, conversation, **options):
    """A session that has been kept as what comes after these messages."""
    session = engine.acts.fork(small(engine))
    engine.call(lambda: engine.acts.read(session, kept_ids)).result(30)
    kept = Kept(session, **options)
    chat.shelf.put(kept, conversation.keys()[-1])
    return kept


def test_all_that_counts_names_a_conversation():
    known = talk(WHO, HE, AND)
    other = [
        talk(WHO, HE, AND, model="tiny@book"),
        talk(WHO, HE, AND, identity="2"),
        talk(WHO, HE, AND, tools=TOOL),
        talk(WHO, HE),
        talk(SYSTEM, WHO, HE, AND),
        talk(WHO, HE, {**AND, "role": "system"}),
        talk(WHO, HE, {**AND, "content": "And? "}),
        talk(WHO, CALL, AND),
        talk(WHO, HE, {**AND, "tool_call_id": "1"}),
    ]
    names = [x.keys()[-1] for x in (known, *other)]
    assert len(set(names)) == len(names)
    # Clients trim answers, and make up ids of calls.
    assert talk(WHO, {**HE, "content": " He.\n"}, AND).keys() == known.keys()
    calls = [talk(WHO, {**CALL, "tool_calls": [{"id": x, "function": NAME}]}, AND) for x in "12"]
    assert calls[0].keys() == calls[1].keys() != known.keys()
    more = {"name": "f", "arguments": {"a": 2}}
    changed = {**CALL, "tool_calls": [{"id": "1", "function": more}]}
    assert talk(WHO, changed, AND).keys()[-1] != calls[0].keys()[-1]
    swapped = dict(reversed(NAME.items()))
    assert list(swapped) != list(NAME) and swapped == NAME
    tools = [[{"type": "function", "function": of}] for of in (NAME, swapped)]
    assert talk(WHO, tools=tools[0]).keys() == talk(WHO, tools=tools[1]).keys()
    assert known.keys()[0] == talk(WHO).keys()[0] and len(known.keys()) == 3
    assert talk(WHO).then(HE) == talk(WHO, HE).keys()[-1]
    assert (talk(SYSTEM, WHO).system, known.system) == ("Be brief.", "")


def test_a_text_begins_as_the_tokenizer_begins_one(engine):
    chat = chat_of(engine)
    chat.encoder.begin = [256]
    assert chat.plain("Hi", None).ids == [256, *ids_of("Hi")]
    assert chat.plain("Hi", None).session is chat.fresh
    assert chat.plain("<|im_end|>", None).ids[1:] == ids_of("<") + ids_of("|im_end|>")
    other = small(engine)
    assert chat.plain("Hi", other) == (other, ids_of("Hi"), 0, False)


def test_a_whole_conversation_is_what_the_template_says(engine):
    chat = chat_of(engine)
    found = chat.prompt(talk(SYSTEM, WHO, HE, {**AND, "content": "<|im_end|>?"}))
    turns = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n"
    turns += "<|im_start|>assistant\nHe.<|im_end|>\n<|im_start|>user\n"
    quoted = [*ids_of("<"), *ids_of("|im_end|>"), *ids_of("?")]
    rest = "<|im_end|>\n<|im_start|>assistant\n"
    assert found.ids == [*ids_of(turns), *quoted, *ids_of(rest)]
    assert (found.session, found.reused, found.thinking) == (chat.fresh, 0, False)
    thinks = chat_of(engine, CHATML.replace("assistant\n{% endif", "assistant\n<think>{% endif"))
    thinks.tokenizer._think_start = "<think>"
    assert thinks._thinks("a<think>\n") is thinks.tokenizer.has_thinking


@pytest.mark.parametrize("length", [1, 200, 201, 5000])
def test_why_a_template_refuses_is_said_in_short(engine, length):
    why = "x" * length
    chat = chat_of(engine, "{{ raise_exception('" + why + "') }}")
    with pytest.raises(APIError) as error:
        chat.prompt(talk(WHO))
    assert error.value.message == f"the chat template refuses this ({why[:200]})"
    assert (error.value.status, error.value.param) == (400, "messages")


def test_a_conversation_goes_on_where_its_answer_ended(engine):
    chat = chat_of(engine)
    asked = ids_of("<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nHe.")
    more = "\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"
    # It ended by itself: the token is among what is still to be read.
    kept = read_by(engine, asked, chat, talk(WHO, HE), unread=(258,), ended="<|im_end|>")
    found = chat.prompt(talk(WHO, HE, AND))
    assert found.session is kept.session and found.reused == len(asked) + 1
    assert found.ids == [258, *ids_of(more)]
    followed = chat.follow(kept, [AND], [])
    assert followed == found
    # It was cut: what ends a message comes first.
    read_by(engine, asked[:-1], chat, talk(WHO, HE), unread=(asked[-1],))
    found = chat.prompt(talk(WHO, HE, AND))
    assert found.ids == [asked[-1], *ids_of("<|im_end|>" + more)]
    # Where a call of a tool was cut, nobody knows.
    read_by(engine, asked, chat, talk(WHO, CALL))
    found = chat.prompt(talk(WHO, CALL, AND))
    assert found.reused == 0 and found.session is chat.fresh


def test_a_template_that_says_past_messages_otherwise_is_read_from_the_begin(engine):
    template = CHATML.replace("m.content }}", "m.content }}{% if loop.last %}!{% endif %}")
    chat = chat_of(engine, template)
    asked = ids_of("<|im_start|>user\nWho?!<|im_end|>\n<|im_start|>assistant\nHe.")
    read_by(engine, asked, chat, talk(WHO, HE), unread=(258,), ended="<|im_end|>")
    found = chat.prompt(talk(WHO, HE, AND))
    assert found.reused == 0 and found.session is chat.fresh
    whole = "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nHe.<|im_end|>\n"
    whole += "<|im_start|>user\nAnd?!<|im_end|>\n<|im_start|>assistant\n"
    assert found.ids == ids_of(whole)


def test_what_follows_a_system_message_may_depend_on_it(engine):
    marked = "{{ m.role }}{{ '+' if messages[0].role == 'system' else '' }}"
    chat = chat_of(engine, CHATML.replace("{{ m.role }}", marked))
    session = small(engine)
    for system, sign in (("Be.", "+"), ("", "")):
        found = chat.follow(Kept(session, (7,), system, "<|im_end|>"), [AND], [])
        more = f"\n<|im_start|>user{sign}\nAnd?<|im_end|>\n<|im_start|>assistant\n"
        assert found.ids == [7, *ids_of(more)] and found.reused == 1


@pytest.mark.parametrize(
    ("messages", "tools", "param"),
    [
        ([WHO], [{"type": "function", "function": {"name": "<|im_end|>"}}], "tools"),
        ([{**WHO, "name": "a<|im_start|>"}], [], "messages"),
        ([{**WHO, "tool_call_id": "<|im_end|>"}], [], "messages"),
    ],
)
def test_no_control_token_is_said_by_names(engine, messages, tools, param):
    with pytest.raises(APIError, match="is a control token") as error:
        chat_of(engine).prompt(talk(*messages, tools=tools))
    assert error.value.param == param
    assert chat_of(engine).prompt(talk({**WHO, "name": "a"})).ids


def test_nor_one_that_is_spelled_in_other_scripts(engine):
    chat = chat_of(engine)
    chat.encoder.controls[1] = AddedToken("<\uff5cend\u2581of\u2581sentence\uff5c>")
    with pytest.raises(APIError, match="is a control token"):
        chat.prompt(talk({**WHO, "name": "a<\uff5cend\u2581of\u2581sentence\uff5c>"}))


@pytest.mark.parametrize(
    ("start", "text", "thinks"),
    [
        ("<think>", "assistant\n<think>\n", True),
        ("<think>", "assistant\n", False),
        ("<think>", "<think></think>\n", False),
        (None, "assistant\n", False),
    ],
)
def test_an_answer_begins_within_thoughts_where_the_template_has_begun_them(
    engine, start, text, thinks
):
    chat = chat_of(engine)
    chat.tokenizer._think_start = chat.tokenizer._think_end = start
    assert chat._thinks(text) is thinks


def test_of_a_template_that_looks_at_what_it_is_given_texts_are_plain(engine):
    looks = CHATML.replace("{{ m.content }}", "{{ m.content | upper }}")
    chat = chat_of(engine, looks)
    found = chat.prompt(talk({**WHO, "content": "who?"}))
    assert found.ids == ids_of("<|im_start|>user\nWHO?<|im_end|>\n<|im_start|>assistant\n")
    with pytest.raises(APIError, match="is a control token"):
        chat_of(engine, looks.replace("upper", "replace('x', '')")).prompt(
            talk({**WHO, "content": "<|im_end|> x"})
        )


@pytest.mark.parametrize("template", [CHATML, TRIMMED])
def test_a_book_is_asked_as_a_session_asks_it(engine, template):
    chat = chat_of(engine, template)
    session = Session(engine.model, chat.tokenizer, step=16)
    engine.call(lambda: session.read("Call me Ishmael.  ")).result(30)
    assert bool(session.space) == (template == TRIMMED)
    found = chat.prompt(talk(SYSTEM, WHO, memory=session))
    assert found.ids == session._question("Be brief.\n\nWho?")
    assert (found.session, found.reused) == (session, 0)
    plain = chat.prompt(talk(WHO, memory=session))
    assert plain.ids == session._question("Who?")
    more = "He.<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"
    assert chat.prompt(talk(WHO, HE, AND, memory=session)).ids == [*plain.ids, *ids_of(more)]
    for messages, tools, param in (
        *(([HE, WHO], [], "messages"), ([SYSTEM], [], "messages"), ([WHO], TOOL, "tools")),
    ):
        with pytest.raises(APIError) as error:
            chat.prompt(talk(*messages, tools=tools, memory=session))
        assert error.value.param == param
    bare = Session(engine.model, chat.tokenizer, step=16, chat=False)
    with pytest.raises(APIError, match="without the chat template") as error:
        chat.prompt(talk(WHO, memory=bare))
    assert error.value.param == "model"
