// Documents: given to the server, read by its jobs, and the memories that are left of them.

import { get, hasKey, post, remove, request, sentence } from "./api.js";
import { $, button, bytes, count, day, dialog, duration, el, listed, perSecond, plural, say, trying } from "./dom.js";

const uploads = new Map(); // of files that are on their way: id to {id, name, abort}
const seen = new Map(); // of jobs: id to {status, since, from, rate}
let memories = [];
let jobs = [];
let numbers = 0;
let asking = () => {};
let soon = () => {};

export const memoryNames = () => memories.map((memory) => memory.id);
export const tokensOf = (name) => memories.find((memory) => memory.id === name)?.tokens ?? 0;
export const busy = () => uploads.size > 0 || jobs.some((job) => active(job));

const active = (job) => job.status === "queued" || job.status === "reading";

// A name that the server takes: letters and digits, and . _ - in between.
export function slug(text, fallback = "document") {
  const plain = text.normalize("NFKD").replace(/\p{M}/gu, "");
  const name = plain.replace(/[^A-Za-z0-9._-]+/g, "-").replace(/^[^A-Za-z0-9]+|[-._]+$/g, "");
  return name.slice(0, 80) || fallback;
}

// The first of name, name-2, name-3, ... that nobody has.
function freeName(base, from = 1) {
  const taken = new Set([...memoryNames(), ...jobs.map((job) => job.name)]);
  for (const upload of uploads.values()) taken.add(upload.name);
  for (let i = from; ; i++) {
    const name = i === 1 ? base : `${base}-${i}`;
    if (!taken.has(name)) return name;
  }
}

// Begin to show, and take files from the button and from wherever they are dropped.
// onAsk: called with the name of a memory. onBegun: called when the server has something to do.
export function start(onAsk, onBegun) {
  [asking, soon] = [onAsk, onBegun];
  $("pick").onclick = () => $("files").click();
  $("files").onchange = () => {
    const files = [...$("files").files];
    $("files").value = "";
    add(files);
  };
  for (const name of ["dragenter", "dragover", "dragleave", "drop"]) {
    addEventListener(name, (event) => {
      if (!event.dataTransfer?.types.includes("Files")) return;
      event.preventDefault();
      $("drop").classList.toggle("over", name === "dragenter" || name === "dragover");
      if (name === "drop") add([...event.dataTransfer.files]);
    });
  }
}

async function add(files) {
  await Promise.all(files.map(trying(upload)));
}

async function upload(file) {
  const abort = new AbortController();
  const id = `upload-${numbers++}`;
  const base = slug(file.name.replace(/\.[^.]*$/, ""));
  const entry = { id, name: freeName(base), abort, status: "uploading", size: file.size };
  uploads.set(id, entry);
  showJobs();
  say(`Uploading ${file.name}`);
  try {
    await readable(file);
    const give = /\.ahn$/i.test(file.name) ? giveMemory : giveDocument;
    await give(file, abort.signal, async (send) => {
      for (let i = 2; ; i++) {
        try {
          return await send(entry.name);
        } catch (error) {
          if (error.code !== "exists") throw error;
          entry.name = freeName(base, i); // somebody else was faster
        }
      }
    });
  } catch (error) {
    if (error.name !== "AbortError") throw new Error(`${file.name}: ${error.message}`);
  } finally {
    await refresh().catch(() => {});
    uploads.delete(id);
    showJobs();
    soon();
  }
}

async function readable(file) {
  try {
    await file.slice(0, 1).arrayBuffer();
  } catch {
    throw new Error("It cannot be read. Is it a folder?");
  }
}

async function giveMemory(file, signal, named) {
  await named((name) => request("PUT", `/v1/memories/${encodeURIComponent(name)}`, { body: file, signal }));
}

async function giveDocument(file, signal, named) {
  const form = new FormData();
  form.append("file", file, file.name);
  const kept = await (await request("POST", "/v1/files", { body: form, signal })).json();
  try {
    await named((name) => post("/v1/memories", { name, file_id: kept.id }, signal));
  } catch (error) {
    await remove(`/v1/files/${kept.id}`);
    throw error;
  }
}

// Ask the server how far jobs are, and for memories if one has come or gone.
export async function refresh() {
  jobs = (await get("/v1/memory_jobs")).data;
  for (const job of jobs) notice(job);
  memories = (await get("/v1/memories")).data;
  showJobs();
  showMemories();
}

function notice(job) {
  const now = performance.now() / 1000;
  const known = seen.get(job.id);
  if (!known || known.status !== job.status || job.tokens_read < known.from) {
    if (known && known.status !== job.status) say(`${job.name}: ${stateOf(job)}`);
    seen.set(job.id, { status: job.status, since: now, from: job.tokens_read, rate: 0 });
  } else if (job.tokens_read > known.from && now - known.since > 0.5) {
    known.rate = (job.tokens_read - known.from) / (now - known.since);
  }
}

function stateOf(job) {
  if (job.error) return sentence(job.error);
  if (job.status === "reading" && !job.tokens) return "being opened";
  const states = {
    uploading: `uploading, ${bytes(job.size ?? 0)}`,
    queued: "waits for its turn",
    reading: "is read",
    done: "has been read",
    cancelled: "cancelled; what was read is kept",
    paused: "stopped with the server; what was read is kept",
  };
  return states[job.status] ?? job.status;
}

function progressOf(job) {
  if (!job.tokens) return "";
  const share = `${count(job.tokens_read)} of ${plural(job.tokens, "token")}`;
  const rate = seen.get(job.id)?.rate ?? 0;
  if (job.status !== "reading" || !rate) return share;
  const left = duration((job.tokens - job.tokens_read) / rate);
  return `${share} · ${perSecond(rate)} · ${left} left`;
}

function showJobs() {
  const coming = new Set([...uploads.values()].map((upload) => upload.name));
  const waiting = jobs.filter((job) => job.status !== "done" && !coming.has(job.name));
  listed($("jobs"), [...uploads.values(), ...waiting], (job) => job.id, jobItem);
}

function jobItem() {
  let job = null;
  const name = el("b");
  const bar = el("progress", { "aria-label": "Progress" });
  const state = el("p", { class: "muted" });
  const numbers = el("p", { class: "muted numbers" });
  const act = (work) => trying(async () => {
    await work(job);
    await refresh();
    soon();
  });
  const cancel = button("Cancel", "", act(stopJob));
  const resume = button("Resume", "", act((it) => post(`/v1/memory_jobs/${it.id}/resume`)));
  const drop = button("Remove", "", act(forgetJob));
  const item = el("li", {}, name, bar, state, numbers, el("div", { class: "actions" }, cancel, resume, drop));
  item.update = (now) => {
    job = now;
    name.textContent = job.name;
    const going = active(job) || job.status === "uploading";
    const numbered = job.status === "reading" && job.tokens;
    state.textContent = numbered ? "" : stateOf(job);
    state.classList.toggle("bad", job.status === "failed");
    numbers.textContent = progressOf(job);
    if (job.tokens) bar.value = job.tokens_read / job.tokens;
    else bar.removeAttribute("value");
    bar.hidden = !going && !job.tokens;
    bar.setAttribute("aria-label", `Progress of ${job.name}`);
    // Whoever presses one with the keyboard goes on with the other.
    const held = [cancel, resume].includes(document.activeElement);
    cancel.hidden = !going;
    resume.hidden = drop.hidden = going;
    if (held && document.activeElement === document.body) (going ? cancel : resume).focus();
    for (const b of [cancel, resume, drop]) b.setAttribute("aria-label", `${b.textContent} ${job.name}`);
  };
  return item;
}

async function stopJob(job) {
  if (job.abort) job.abort.abort();
  else await post(`/v1/memory_jobs/${job.id}/cancel`);
}

async function forgetJob(job) {
  const text = `What has been read of ${job.name} is lost, and the server deletes its copy of the file.`;
  if (!(await dialog({ title: "Remove this document?", text, action: "Remove", danger: true }))) return;
  await dropJob(job);
  $("pick").focus();
}

// With its files, unless another job needs them.
async function dropJob(job) {
  await remove(`/v1/memory_jobs/${job.id}`);
  jobs = jobs.filter((other) => other.id !== job.id);
  const needed = new Set(jobs.flatMap((other) => other.files));
  for (const file of job.files.filter((id) => !needed.has(id))) {
    // It may be deleted already, by whoever else uses this server.
    await remove(`/v1/files/${file}`).catch(() => {});
  }
}

function showMemories() {
  listed($("memories"), memories, (memory) => memory.id, memoryItem);
  $("drop").classList.toggle("small", memories.length > 0);
}

function memoryItem(name) {
  const facts = el("p", { class: "muted" });
  const ask = button("Ask", `Ask ${name}`, () => asking(name));
  const fetch = button("Download", `Download ${name}.ahn`, trying(() => download(name)));
  const drop = button("Delete", `Delete ${name}`, trying(() => deleteMemory(name)));
  const item = el("li", {}, el("b", {}, name), facts, el("div", { class: "actions" }, ask, fetch, drop));
  item.update = (memory) => {
    ask.hidden = Boolean(memory.error);
    facts.classList.toggle("bad", Boolean(memory.error));
    facts.textContent = memory.error ? sentence(memory.error) : factsOf(memory);
  };
  return item;
}

function factsOf(memory) {
  const kind = memory.turn === "read" ? [] : ["conversation"];
  const numbers = [plural(memory.tokens, "token"), bytes(memory.bytes), day(memory.created)];
  return [...kind, ...numbers].join(" · ");
}

async function download(name) {
  const path = `/v1/memories/${encodeURIComponent(name)}/content`;
  // A link cannot bring the key.
  const url = hasKey() ? URL.createObjectURL(await (await request("GET", path)).blob()) : path;
  el("a", { href: url, download: `${name}.ahn` }).click();
  if (url !== path) setTimeout(() => URL.revokeObjectURL(url), 60000);
}

async function deleteMemory(name) {
  const text = `The memory ${name} and the server's copy of its document are deleted. There is no way back.`;
  if (!(await dialog({ title: "Delete this memory?", text, action: "Delete", danger: true }))) return;
  await remove(`/v1/memories/${encodeURIComponent(name)}`);
  for (const job of jobs.filter((it) => it.name === name && it.status === "done")) await dropJob(job);
  say(`${name} has been deleted`);
  await refresh();
  $("pick").focus();
}

export async function save(answer, name) {
  await (await post(`/v1/conversations/${answer}/save`, { name })).json();
  say(`Saved as ${name}`);
  await refresh();
}

export function unavailable() {
  const hint = "Start the server with --memories DIR to read documents here.";
  $("drop").replaceChildren(el("p", { class: "muted" }, hint));
  $("save").hidden = true;
}

