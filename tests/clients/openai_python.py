"""What users of OpenAI's Python client and of LangChain do. Arguments: address, key."""

import asyncio
import sys
import time

import openai
from langchain_openai import ChatOpenAI

URL, KEY = sys.argv[1:]
MODEL, HI = "model", [{"role": "user", "content": "Hi"}]
client = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0)
create = client.chat.completions.create


def text(answer):
    return answer.choices[0].message.content


def free():
    for _ in range(200):
        found = client.get(f"{URL}/health", cast_to=object)
        if found["rows_free"] == found["rows"]:
            return True
        time.sleep(0.05)
    return False


def raises(kind, call):
    try:
        call()
    except kind as e:
        return e
    raise AssertionError(f"no {kind.__name__}")


assert [m.id for m in client.models.list()] == [MODEL]
whole = create(model=MODEL, messages=HI, max_tokens=12)
assert whole.choices[0].finish_reason in ("stop", "length")
usage = whole.usage
assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens

options = {"stream": True, "stream_options": {"include_usage": True}}
chunks = list(create(model=MODEL, messages=HI, max_tokens=12, **options))
said = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
assert (said, chunks[-1].usage.completion_tokens) == (text(whole), usage.completion_tokens)
stop = said[4:6]
cut = create(model=MODEL, messages=HI, max_tokens=12, stop=stop)
assert (text(cut), cut.choices[0].finish_reason) == (said[: said.index(stop)], "stop")
with client.chat.completions.stream(model=MODEL, messages=HI, stop=stop) as stream:
    stream.until_done()
    assert text(stream.get_final_completion()) == text(cut)

wrong = openai.OpenAI(base_url=f"{URL}/v1", api_key="wrong", max_retries=0)
raises(openai.AuthenticationError, lambda: wrong.models.list())
raises(openai.NotFoundError, lambda: create(model="none", messages=HI))
raises(openai.NotFoundError, lambda: create(model=f"{MODEL}@none", messages=HI))
bad = raises(openai.BadRequestError, lambda: create(model=MODEL, messages=HI, top_p=7))
assert bad.param == "top_p"

endless = {"max_tokens": 1_000_000}
stream = create(model=MODEL, messages=HI, stream=True, **endless)
next(iter(stream))
stream.close()
assert free()
timed = client.with_options(timeout=1).chat.completions.create
raises(openai.APITimeoutError, lambda: timed(model=MODEL, messages=HI, **endless))
assert free()


async def cancelled():
    other = openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0)
    asking = other.chat.completions.create(model=MODEL, messages=HI, **endless)
    task = asyncio.create_task(asking)
    await asyncio.sleep(0.5)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


asyncio.run(cancelled())
assert free()

# A chain of responses is a conversation, and may be forked.
respond = client.responses.create
options = {"model": MODEL, "max_output_tokens": 12}
first = respond(input="Hi", **options)
assert first.output_text == said
second, fork = (respond(input="And?", previous_response_id=first.id, **options) for _ in "ab")
conversation = [*HI, {"role": "assistant", "content": said}, {"role": "user", "content": "And?"}]
again = create(model=MODEL, messages=conversation, max_tokens=12)
assert second.output_text == fork.output_text == text(again)
assert second.usage.input_tokens_details.cached_tokens > 0

# An answer that is cut ends with an event of its own, as OpenAI's do.
with client.responses.stream(input="Hi", **options) as events:
    found = list(events)
last = found[-1].response
assert (found[-1].type, last.output_text) == ("response.incomplete", said)
assert last.incomplete_details.reason == "max_output_tokens"
assert last.output[0].status == "incomplete"

chain = ChatOpenAI(base_url=f"{URL}/v1", api_key=KEY, model=MODEL, max_tokens=12, temperature=0)
assert chain.invoke("Hi").content == said
assert "".join(c.content for c in chain.stream("Hi")) == said
assert chain.invoke("Hi").usage_metadata["output_tokens"] == usage.completion_tokens

answers = client.completions.create(model=MODEL, prompt=["One", "Two"], max_tokens=3, n=2)
assert [c.index for c in answers.choices] == [0, 1, 2, 3]
