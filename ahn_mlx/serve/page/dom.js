// Elements, numbers in words, and the one dialog. Whatever anybody wrote becomes text, never markup.

export const $ = (id) => document.getElementById(id);

// An element. Properties: class, on... handlers, and attributes; false and null leave one out.
export function el(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== false && value != null) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

export const button = (text, label, onclick, kind = "quiet") =>
  el("button", { type: "button", class: kind, "aria-label": label, onclick }, text);

// Show items in a list. Those that stay keep their elements, and with them the focus.
// make(key): an element with a method update(item).
export function listed(list, items, keyOf, make) {
  const old = new Map([...list.children].map((child) => [child.dataset.key, child]));
  let at = list.firstElementChild;
  for (const item of items) {
    const key = keyOf(item);
    let child = old.get(key);
    old.delete(key);
    if (!child) {
      child = make(key);
      child.dataset.key = key;
    }
    child.update(item);
    if (child === at) at = at.nextElementSibling;
    else list.insertBefore(child, at);
  }
  for (const child of old.values()) child.remove();
}

export const count = (n) => Math.round(n).toLocaleString("en");
export const plural = (n, word) => `${count(n)} ${word}${n === 1 ? "" : "s"}`;

export function bytes(n) {
  if (n < 1000) return plural(n, "byte");
  const [size, unit] = n < 1e6 ? [n / 1e3, "kB"] : n < 1e9 ? [n / 1e6, "MB"] : [n / 1e9, "GB"];
  return `${size.toLocaleString("en", { minimumFractionDigits: 1, maximumFractionDigits: 1 })} ${unit}`;
}

export function duration(seconds) {
  if (seconds < 60) return plural(Math.max(1, Math.round(seconds)), "second");
  if (seconds < 5400) return plural(Math.round(seconds / 60), "minute");
  return plural(Math.round(seconds / 3600), "hour");
}

export const perSecond = (rate) => `${rate < 10 ? rate.toFixed(1) : count(rate)} tokens/s`;

export function day(seconds) {
  const date = new Date(seconds * 1000);
  const year = date.getFullYear() === new Date().getFullYear() ? undefined : "numeric";
  const [month, hour] = ["short", "2-digit"];
  return date.toLocaleString("en-GB", { day: "numeric", month, year, hour, minute: hour });
}

// Said to a screen reader.
export function say(text) {
  $("status").textContent = text;
}

// An error in words, until it is closed or the next one comes.
export function alarm(text) {
  const close = button("Close", "Close this message", () => $("alert").replaceChildren());
  $("alert").replaceChildren(el("p", {}, text), close);
}

// Run what a button does; what goes wrong is said.
export function trying(work) {
  return async (...given) => {
    try {
      await work(...given);
    } catch (error) {
      alarm(error.message);
    }
  };
}

let waiting = Promise.resolve();

// Ask for a yes, or for a text if there is a label. Null if it was refused. One at a time.
export function dialog(question) {
  const asked = waiting.then(() => open(question));
  waiting = asked;
  return asked;
}

function open({ title, text, label = "", value = "", action = "OK", danger = false, type = "text" }) {
  const box = $("dialog");
  const input = $("dialog-input");
  $("dialog-title").textContent = title;
  $("dialog-text").textContent = text;
  $("dialog-label").textContent = label;
  $("dialog-label").hidden = input.hidden = !label;
  input.type = type;
  input.value = value;
  $("dialog-yes").textContent = action;
  $("dialog-yes").classList.toggle("danger", danger);
  return new Promise((resolve) => {
    let answer = null;
    box.querySelector("form").onsubmit = (event) => {
      event.preventDefault();
      answer = label ? input.value.trim() : "yes";
      if (answer) box.close();
    };
    $("dialog-no").onclick = () => box.close();
    box.onclose = () => {
      input.value = "";
      resolve(answer || null);
    };
    box.showModal();
    if (label) input.select();
    else $(danger ? "dialog-no" : "dialog-yes").focus();
  });
}
