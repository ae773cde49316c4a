// What a conversation remembers, as a bar, and what the server takes, as rows that do not grow.

import { $, bytes, el, plural } from "./dom.js";

let health = null;

export const server = () => health;

// Word for word, in outline, and what is still free.
function parts(tokens) {
  const sinks = Math.min(tokens, health.sinks);
  const window = Math.min(tokens - sinks, health.window);
  const free = health.sinks + health.window - sinks - window;
  return { sinks, memory: tokens - sinks - window, window, free };
}

export function showSpan(tokens) {
  if (!health) return;
  const found = parts(tokens);
  const words = [
    ["sinks", `first ${plural(found.sinks, "token")}`, "word for word"],
    ["memory", plural(found.memory, "token"), "in outline, in the memory"],
    ["window", `last ${plural(found.window, "token")}`, "word for word"],
    ["free", plural(found.free, "token"), "free"],
  ].filter(([name]) => found[name] > 0);
  $("bar").replaceChildren(
    ...words.map(([name]) => {
      const piece = el("span", { class: name });
      piece.style.flexGrow = found[name];
      return piece;
    }),
  );
  $("legend").replaceChildren(
    ...words.map(([name, amount, how]) =>
      el("li", {}, el("i", { class: name, "aria-hidden": "true" }), el("b", {}, amount), ` ${how}`),
    ),
  );
}

export function showServer(facts) {
  health = facts;
  const { rows, rows_free: free, row_bytes: size } = facts;
  const all = rows * size;
  $("model").textContent = facts.model;
  $("rows-sum").replaceChildren(
    el("b", {}, `${plural(rows, "row")} × ${bytes(size)} = ${bytes(all)}`),
    ", however long the texts are",
  );
  const shown = Math.min(rows, 64);
  if ($("rows").children.length !== shown) {
    $("rows").replaceChildren(...Array.from({ length: shown }, () => el("span")));
  }
  [...$("rows").children].forEach((row, i) => row.classList.toggle("busy", i < rows - free));
  $("rows-words").textContent =
    `${rows - free} of ${plural(rows, "row")} busy. With the model, and what waits for its next` +
    ` question, ${bytes(facts.active_bytes)} are in use.`;
}
