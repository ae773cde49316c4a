"""What users of Anthropic's Python client do. Arguments: address, key."""

import sys
import time

import anthropic
import httpx

URL, KEY = sys.argv[1:]
HI = [{"role": "user", "content": "Hi"}]
client = anthropic.Anthropic(base_url=URL, api_key=KEY, max_retries=0)
asked = {"model": "model", "messages": HI, "max_tokens": 12}


def free():
    for _ in range(200):
        found = httpx.get(f"{URL}/health", headers={"x-api-key": KEY}).json()
        if found["rows_free"] == found["rows"]:
            return True
        time.sleep(0.05)
    return False


def raises(kind, call):
    try:
        call()
    except kind:
        return
    raise AssertionError(f"no {kind.__name__}")


whole = client.messages.create(**asked)
said = whole.content[0].text
count = client.messages.count_tokens(model="model", messages=HI).input_tokens
assert whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0) == count
assert 0 < whole.usage.output_tokens <= 12
assert whole.stop_reason in ("max_tokens", "end_turn")

with client.messages.stream(**asked) as stream:
    assert "".join(stream.text_stream) == said
    final = stream.get_final_message()
assert (final.stop_reason, final.usage.output_tokens) == (
    whole.stop_reason,
    whole.usage.output_tokens,
)

stop = said[4:6]
cut = client.messages.create(**asked, stop_sequences=[stop])
assert (cut.stop_reason, cut.stop_sequence) == ("stop_sequence", stop)
assert cut.content[0].text == said[: said.index(stop)]

wrong = anthropic.Anthropic(base_url=URL, api_key="wrong", max_retries=0)
raises(anthropic.AuthenticationError, lambda: wrong.messages.create(**asked))
raises(anthropic.NotFoundError, lambda: client.messages.create(**{**asked, "model": "none"}))
raises(anthropic.BadRequestError, lambda: client.messages.create(**asked, extra_body={"top_k": -1}))

with client.messages.stream(**{**asked, "max_tokens": 1_000_000}) as stream:
    next(iter(stream.text_stream))
assert free()
