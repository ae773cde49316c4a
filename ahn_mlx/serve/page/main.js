// The page: what its buttons and keys do, and a look at the server every few seconds.

import { get } from "./api.js";
import { all, ask, close, create, fork, kept, running, store } from "./conversations.js";
import * as documents from "./documents.js";
import { $, alarm, button, dialog, el, listed, say, trying } from "./dom.js";
import { server, showServer, showSpan } from "./gauges.js";
import * as transcript from "./transcript.js";

const BUSY = 1000; // milliseconds between two looks while something goes on
const IDLE = 3000;

function open(conversation) {
  transcript.show(conversation);
  showList();
  menu(false);
}

function begin(book = "") {
  const empty = all.find((it) => !it.turns.length) ?? create();
  Object.assign(empty, { book, tokens: documents.tokensOf(book) });
  open(empty);
  $("question").focus();
}

function showList() {
  listed($("conversations"), all, (it) => it.id, conversationItem);
}

function conversationItem(id) {
  const conversation = all.find((it) => it.id === id);
  const opens = button("", null, () => open(conversation), "opens");
  const closes = button("Close", "", trying(() => leave(conversation)));
  const item = el("li", { class: "row" }, opens, closes);
  item.update = () => {
    const title = conversation.title || "New conversation";
    const parts = [el("span", {}, title)];
    const about = running.has(id) ? "answers…" : conversation.book;
    if (about) parts.push(el("span", { class: "muted" }, about));
    const said = `${title}|${about}`;
    if (item.said !== said) opens.replaceChildren(...parts);
    item.said = said;
    closes.setAttribute("aria-label", `Close ${title}`);
    if (conversation === transcript.current()) opens.setAttribute("aria-current", "true");
    else opens.removeAttribute("aria-current");
  };
  return item;
}

async function leave(conversation) {
  const text = "It is kept in this tab alone. Save it first, to go on with it later.";
  const title = "Close this conversation?";
  if (conversation.turns.length && !(await dialog({ title, text, action: "Close it", danger: true }))) return;
  close(conversation);
  if (conversation === transcript.current()) begin();
  showList();
}

async function send() {
  const conversation = transcript.current();
  const question = $("question").value.trim();
  if (!question || running.has(conversation.id)) return;
  if (!server()) throw new Error("The server has not answered yet.");
  conversation.draft = $("question").value = "";
  say("Asked");
  soon();
  await ask(conversation, question, (turn, text) => {
    transcript.update(conversation, turn, text);
    if (!text) showList();
  });
}

function stop() {
  running.get(transcript.current().id)?.abort();
}

async function save() {
  const conversation = transcript.current();
  const answer = kept(conversation);
  if (!answer) {
    throw new Error("The last answer was stopped, and the server has not kept it. Ask once more, then save.");
  }
  const name = await dialog({
    title: "Save this conversation",
    text: "It becomes a memory, which can be asked here and by ahn-mlx chat. A conversation of that name is replaced.",
    label: "Name",
    value: documents.slug(conversation.title, "conversation"),
    action: "Save",
  });
  if (name) await documents.save(answer, name);
}

function menu(shown) {
  document.body.classList.toggle("menu", shown);
  $("menu").setAttribute("aria-expanded", String(shown));
}

// Enter and Esc also end a word that is composed, as in Japanese; Safari tells by 229 alone.
const composes = (event) => event.isComposing || event.keyCode === 229;

function keys(event) {
  if (event.key === "Escape" && !composes(event) && !$("dialog").open) {
    if (document.body.classList.contains("menu")) {
      menu(false);
      $("menu").focus();
    } else stop();
  }
}

let unreachable = false;

async function look() {
  try {
    showServer(await get("/health"));
    if (server().memories) await documents.refresh();
    else documents.unavailable();
    if (unreachable) $("alert").replaceChildren();
    unreachable = false;
  } catch (error) {
    const stuck = "The model has not moved for minutes. Start the server again.";
    if (!unreachable) alarm(error.status === 503 ? stuck : error.message);
    unreachable = true;
  }
}

let next = 0;

// What a button has begun is seen at once.
function soon() {
  clearTimeout(next);
  next = setTimeout(watch, 200);
}

async function watch() {
  const conversation = transcript.current();
  if (!document.hidden) await look();
  // What a new conversation says of the window needs the server's word.
  if (conversation === transcript.current()) showSpan(conversation.tokens);
  clearTimeout(next);
  next = setTimeout(watch, documents.busy() || running.size ? BUSY : IDLE);
}

$("ask").onsubmit = (event) => {
  event.preventDefault();
  trying(send)();
};
$("question").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || composes(event)) return;
  event.preventDefault();
  trying(send)();
};
$("stop").onclick = stop;
$("save").onclick = trying(save);
$("new").onclick = () => begin();
$("menu").onclick = () => menu(!document.body.classList.contains("menu"));
addEventListener("keydown", keys);
addEventListener("pagehide", store);

transcript.start((conversation, i) => {
  open(fork(conversation, i));
  say("A second conversation has begun here");
  $("question").focus();
});
documents.start(begin, soon);
await look();
open(all[0] ?? create());
watch();
