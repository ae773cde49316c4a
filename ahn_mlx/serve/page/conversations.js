// Conversations: what was asked and answered, kept in this tab. The server knows an answer by its
// id; what it has not kept, or no longer, is sent along.

import { events, post, sentence } from "./api.js";
import { server } from "./gauges.js";

const STORED = "conversations";
const PATIENCE = 1000; // milliseconds, at least, before asking a busy server again

// Of each: id, title, book ("" for none), tokens, draft, and turns of {role, text, id, note,
// rate}. While an answer comes, `running` is what stops it.
export const all = load();
export const running = new Map();

function load() {
  let found = [];
  try {
    found = JSON.parse(sessionStorage.getItem(STORED)) ?? [];
  } catch {
    // None that can be read.
  }
  for (const conversation of found) settle(conversation);
  return found;
}

// What was left when the page went away.
function settle(conversation) {
  const last = conversation.turns.at(-1);
  if (last?.role === "assistant" && last.busy) stopped(conversation, last, "stopped");
}

export function store() {
  try {
    sessionStorage.setItem(STORED, JSON.stringify(all));
  } catch {
    // The tab has no more room: they stay until it is left.
  }
}

export function create() {
  const id = crypto.getRandomValues(new Uint32Array(2)).join("-");
  const made = { id, title: "", book: "", tokens: 0, draft: "", turns: [] };
  all.unshift(made);
  store();
  return made;
}

// A second conversation that has the same begin, up to turn i.
export function fork(conversation, i) {
  const turns = structuredClone(conversation.turns.slice(0, i + 1));
  const made = create();
  const n = all.filter((other) => other.origin === conversation.id).length + 2;
  const title = `${conversation.title} (${n})`;
  const tokens = turns.at(-1).total;
  Object.assign(made, { turns, tokens, title, book: conversation.book, origin: conversation.id });
  store();
  return made;
}

export function close(conversation) {
  running.get(conversation.id)?.abort();
  all.splice(all.indexOf(conversation), 1);
  store();
}

// The id of the last answer, if the server has all of the conversation up to it.
export const kept = (conversation) => conversation.turns.at(-1)?.id ?? "";

// A question and its answer. changed(turn, text): called whenever the answer has grown by text,
// and for everything else.
export async function ask(conversation, question, changed) {
  const answer = { role: "assistant", text: "", busy: true, note: "waits" };
  conversation.turns.push({ role: "user", text: question }, answer);
  conversation.title ||= question.slice(0, 200);
  const abort = new AbortController();
  running.set(conversation.id, abort);
  store();
  changed(answer, "");
  try {
    const response = await begin(conversation, answer, abort.signal, changed);
    for await (const event of events(response)) take(conversation, answer, event, changed);
    if (answer.busy) throw new Error("The server ended the answer too early.");
  } catch (error) {
    const note = error.name === "AbortError" ? "stopped" : error.message;
    stopped(conversation, answer, note);
    if (error.name !== "AbortError") throw error;
  } finally {
    running.delete(conversation.id);
    store();
    changed(answer, "");
  }
}

// Without a word of an answer, the question goes back to where it was written.
function stopped(conversation, answer, note) {
  Object.assign(answer, { busy: false, note });
  if (answer.text) return;
  const [question] = conversation.turns.splice(-2);
  conversation.draft = question.text;
}

async function begin(conversation, answer, signal, changed) {
  const base = server().model;
  const model = conversation.book ? `${base}@${conversation.book}` : base;
  for (;;) {
    const turns = conversation.turns.slice(0, -1);
    const at = turns.findLastIndex((turn) => turn.id);
    const input = turns.slice(at + 1).map(({ role, text }) => ({ role, content: text }));
    const body = { model, input, stream: true };
    if (at >= 0) body.previous_response_id = turns[at].id;
    try {
      return await post("/v1/responses", body, signal);
    } catch (error) {
      if (error.status === 429) {
        answer.note = "all rows are busy; waits for one";
        changed(answer, "");
        await pause(Math.max(PATIENCE, error.after * 1000), signal);
      } else if (error.status === 404 && error.code === "not_found" && at >= 0) {
        for (const turn of turns) delete turn.id; // it has been forgotten, as those before it
      } else {
        throw error;
      }
    }
  }
}

function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const end = setTimeout(resolve, milliseconds);
    signal.addEventListener("abort", () => {
      clearTimeout(end);
      reject(signal.reason);
    });
  });
}

function take(conversation, answer, event, changed) {
  const now = performance.now() / 1000;
  if (event.type === "read") {
    answer.note = `reads ${event.read} of ${event.total} tokens`;
    changed(answer, "");
  } else if (event.type === "response.output_text.delta") {
    answer.began ??= now;
    answer.note = "";
    // Pieces of text are tokens, but for those that end in half a character.
    answer.pieces = (answer.pieces ?? 0) + 1;
    answer.rate = rateOf(answer.pieces, now - answer.began);
    answer.text += event.delta;
    changed(answer, event.delta);
  } else if (event.type === "error") {
    throw new Error(sentence(event.message ?? "the server failed"));
  } else if (event.response?.usage) {
    ended(conversation, answer, event.response, now);
  }
}

const rateOf = (tokens, seconds) => (tokens > 1 && seconds > 0.2 ? (tokens - 1) / seconds : 0);

function ended(conversation, answer, response, now) {
  const { output_tokens: said, total_tokens: total } = response.usage;
  const cut = response.incomplete_details?.reason === "max_output_tokens";
  Object.assign(answer, {
    id: response.id,
    busy: false,
    total,
    said,
    rate: rateOf(said, now - (answer.began ?? now)),
    note: cut ? "cut at the limit of tokens" : answer.text ? "" : "ended without a word",
  });
  delete answer.began;
  delete answer.pieces;
  conversation.tokens = total;
}
