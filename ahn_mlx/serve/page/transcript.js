// The conversation that is shown: its turns, what it remembers, and where the next question is
// written.

import { running } from "./conversations.js";
import { $, button, count, el, perSecond, plural } from "./dom.js";
import { server, showSpan } from "./gauges.js";

let shown = null;
let onFork = () => {};
let growing = null; // the answer that comes: its turn, and elements of it

export const current = () => shown;

export function start(forked) {
  onFork = forked;
  $("question").addEventListener("input", () => {
    if (shown) shown.draft = $("question").value;
  });
}

export function show(conversation) {
  shown = conversation;
  growing = null;
  const { turns, book } = conversation;
  $("title").textContent = conversation.title || (book ? `Ask ${book}` : "New conversation");
  $("log").replaceChildren(...(turns.length ? turns.map(turnOf) : [welcome(book)]));
  $("question").value = conversation.draft;
  $("question").placeholder = book ? `Ask about ${book}` : "Ask something";
  $("log").scrollTop = $("log").scrollHeight;
  controls();
  showSpan(conversation.tokens);
}

function controls() {
  const busy = running.has(shown.id);
  const focused = document.activeElement;
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  $("save").disabled = busy || !shown.turns.length;
  if (focused === $("send") || focused === $("stop")) $("question").focus();
}

function welcome(book) {
  const how = server()
    ? `The first ${count(server().sinks)} and the last ${count(server().window)} tokens of it stay word for` +
      " word. What lies between is remembered in outline, in a memory that does not grow."
    : "";
  const what = book
    ? `${book} has been read. Ask about it.`
    : "Talk to the model as long as you like, or add a document and ask about it.";
  return el("div", { class: "welcome" }, el("p", {}, what), el("p", { class: "muted" }, how));
}

function turnOf(turn, i) {
  const mine = turn.role === "user";
  const words = el("div", { class: "words" });
  words.append(document.createTextNode(turn.text));
  const who = el("h3", { class: "hidden" }, mine ? "You" : "Answer");
  const made = el("article", { class: mine ? "mine" : "theirs" }, who, words);
  if (mine) return made;
  const foot = el("div", { class: "foot muted" });
  made.append(foot);
  fillFoot(foot, turn, i);
  made.setAttribute("aria-busy", String(Boolean(turn.busy)));
  if (turn.busy) growing = { turn, text: words.firstChild, foot, made, i };
  return made;
}

function fillFoot(foot, turn, i) {
  const facts = [turn.note];
  if (turn.said) facts.push(plural(turn.said, "token"));
  if (turn.rate) facts.push(perSecond(turn.rate));
  foot.replaceChildren(el("span", {}, facts.filter(Boolean).join(" · ")));
  if (!turn.busy && turn.id) {
    const label = `Fork: a second conversation from answer ${Math.ceil((i + 1) / 2)}`;
    foot.append(button("Fork", label, () => onFork(shown, i)));
  }
}

// An answer has grown by some text, or something else of it has changed.
export function update(conversation, turn, text) {
  if (conversation !== shown) return;
  if (growing?.turn !== turn || !conversation.turns.includes(turn)) {
    show(conversation);
    return;
  }
  const log = $("log");
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  if (text) growing.text.appendData(text);
  fillFoot(growing.foot, turn, growing.i);
  if (atEnd) log.scrollTop = log.scrollHeight;
  if (turn.busy) return;
  growing.made.setAttribute("aria-busy", "false");
  growing = null;
  controls();
  showSpan(conversation.tokens);
}
