// The server: requests with the key, errors in its words, and streams of events.

import { dialog } from "./dom.js";

let key = sessionStorage.getItem("key") ?? "";
let renewing = null;

export const hasKey = () => key !== "";

// status: 0 if the server could not be reached.
export class Trouble extends Error {
  constructor(message, status, code = "", after = 0) {
    super(message);
    Object.assign(this, { status, code, after });
  }
}

async function askForKey(wrong) {
  let given = null;
  const text = wrong
    ? "The server does not take that key. It is the line in the file of --api-key-file."
    : "It is the line in the file of --api-key-file, and is kept until this tab is closed.";
  // The server cannot be used without; whoever has none closes the tab.
  while (!given || !/^[!-~]+$/.test(given)) {
    given = await dialog({ title: "This server needs a key", text, label: "Key", type: "password" });
  }
  key = given;
  sessionStorage.setItem("key", key);
}

export async function request(method, path, { body, type, signal } = {}) {
  for (;;) {
    const used = key;
    const headers = {};
    if (used) headers.Authorization = `Bearer ${used}`;
    if (type) headers["Content-Type"] = type;
    let response;
    try {
      response = await fetch(path, { method, headers, body, signal, cache: "no-store" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Trouble("The server does not answer. Is it running?", 0);
    }
    if (response.ok) return response;
    if (response.status !== 401) throw await troubleOf(response);
    if (used === key) {
      renewing ??= askForKey(used !== "").finally(() => (renewing = null));
      await renewing;
    }
  }
}

async function troubleOf(response) {
  const after = Number(response.headers.get("Retry-After")) || 0;
  let known = {};
  try {
    known = (await response.json()).error ?? {};
  } catch {
    // Not ours: its status is all there is to say.
  }
  const message = known.message ?? `The server failed with status ${response.status}.`;
  return new Trouble(sentence(message), response.status, known.code ?? "", after);
}

// A name of a file at its begin stays as it is.
export function sentence(text) {
  const said = /^[a-z]+ /.test(text) ? text.charAt(0).toUpperCase() + text.slice(1) : text;
  return /[.!?]$/.test(said) ? said : `${said}.`;
}

export const get = async (path) => (await request("GET", path)).json();
export const remove = async (path) => (await request("DELETE", path)).json();

export async function post(path, value, signal) {
  const sent = { body: JSON.stringify(value), type: "application/json", signal };
  return request("POST", path, value === undefined ? { signal } : sent);
}

// Events of a stream: objects, and {read, total} for the comments on a prompt's progress.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (held + value).split("\n\n");
    held = blocks.pop();
    for (const line of blocks.flatMap((block) => block.split("\n"))) {
      const read = /^: read (\d+) of (\d+)/.exec(line);
      if (read) yield { type: "read", read: Number(read[1]), total: Number(read[2]) };
      else if (line.startsWith("data: {")) yield JSON.parse(line.slice(6));
    }
  }
}
