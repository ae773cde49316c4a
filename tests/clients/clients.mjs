// What users of OpenAI's and Anthropic's clients for JavaScript do. Arguments: address, key.
import assert from "node:assert/strict";
import Anthropic from "@anthropic-ai/sdk";
import OpenAI from "openai";

const [url, key] = process.argv.slice(2);
const messages = [{ role: "user", content: "Hi" }];
const asked = { model: "model", messages, max_tokens: 12 };

async function free() {
  for (let i = 0; i < 200; i++) {
    const response = await fetch(`${url}/health`, { headers: { "x-api-key": key } });
    const found = await response.json();
    if (found.rows_free === found.rows) return true;
    await new Promise((done) => setTimeout(done, 50));
  }
  return false;
}

const openai = new OpenAI({ baseURL: `${url}/v1`, apiKey: key, maxRetries: 0 });
const create = (more) => openai.chat.completions.create({ ...asked, ...more });
const whole = await create({});
const said = whole.choices[0].message.content;
assert.equal(whole.usage.total_tokens, whole.usage.prompt_tokens + whole.usage.completion_tokens);

let text = "", usage = null;
for await (const chunk of await create({ stream: true, stream_options: { include_usage: true } })) {
  text += chunk.choices[0]?.delta.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.deepEqual([text, usage.completion_tokens], [said, whole.usage.completion_tokens]);

const stop = said.slice(4, 6);
const cut = await create({ stop });
assert.equal(cut.choices[0].message.content, said.slice(0, said.indexOf(stop)));
assert.equal(cut.choices[0].finish_reason, "stop");

const wrong = new OpenAI({ baseURL: `${url}/v1`, apiKey: "wrong", maxRetries: 0 });
await assert.rejects(wrong.models.list(), { status: 401 });
await assert.rejects(create({ model: "none" }), { status: 404 });

const endless = { max_tokens: 1000000 };
const stream = await create({ stream: true, ...endless });
for await (const _ of stream) break;
stream.controller.abort();
assert(await free());
const leaving = new AbortController();
setTimeout(() => leaving.abort(), 500);
await assert.rejects(
  openai.chat.completions.create({ ...asked, ...endless }, { signal: leaving.signal }),
);
assert(await free());

const options = { model: "model", max_output_tokens: 12 };
const first = await openai.responses.create({ input: "Hi", ...options });
assert.equal(first.output_text, said);
const next = { input: "And?", previous_response_id: first.id, ...options };
const second = await openai.responses.create(next);
const fork = await openai.responses.stream(next).finalResponse();
assert.equal(fork.output_text, second.output_text);

const anthropic = new Anthropic({ baseURL: url, apiKey: key, maxRetries: 0 });
const message = await anthropic.messages.create(asked);
assert.equal(message.content[0].text, said);
assert.equal(message.usage.output_tokens, whole.usage.completion_tokens);
assert.equal(await anthropic.messages.stream(asked).finalText(), said);
const ended = await anthropic.messages.create({ ...asked, stop_sequences: [stop] });
assert.deepEqual([ended.stop_reason, ended.stop_sequence], ["stop_sequence", stop]);
const stranger = new Anthropic({ baseURL: url, apiKey: "wrong", maxRetries: 0 });
await assert.rejects(stranger.messages.create(asked), { status: 401 });
await assert.rejects(anthropic.messages.create({ ...asked, model: "none" }), { status: 404 });
const long = anthropic.messages.stream({ ...asked, max_tokens: 1000000 });
await new Promise((heard) => long.once("text", heard));
long.abort();
await long.done().catch(() => {});
assert(await free());
