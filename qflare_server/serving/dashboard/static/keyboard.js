// Keyboard shortcuts: letters without Ctrl, Alt or Meta, which browsers leave to pages, and never while typing.
"use strict";

const help = document.getElementById("keys-help");
const helpButton = document.getElementById("keys");
const keysOn = document.getElementById("keys-on");
const ENTRIES = ["tbody th a", ".lineage .who-is a", ".roll a", ".lines a", ".steps a", ".card h3 a"];
let prefix = "";

function openHelp() {
  help.showModal();
}

function follow(selector) {
  document.querySelector(selector)?.click();
}

// Moves the focus to the next (1) or previous (-1) entry of the page, from wherever the focus is.
function step(direction) {
  const entries = [...document.querySelectorAll(ENTRIES.map((item) => "main " + item).join(","))].filter(
    (item) => item.checkVisibility(),
  );
  const focused = document.activeElement;
  const side = direction > 0 ? Node.DOCUMENT_POSITION_FOLLOWING : Node.DOCUMENT_POSITION_PRECEDING;
  const beyond = entries.filter((item) => focused.compareDocumentPosition(item) & side && !focused.contains(item));
  const fromStart = direction > 0 && focused.contains(document.getElementById("content"));
  const target = fromStart ? entries[0] : beyond.at(direction > 0 ? 0 : -1);
  target?.focus();
}

const ACTIONS = {
  "?": openHelp,
  j: () => step(1),
  k: () => step(-1),
  u: () => follow(".crumbs li:last-child a"),
  n: () => follow(".pager a[rel=next]"),
  f: () => follow(".pager a[rel=first]"),
  l: () => follow("#live"),
  z: () => follow("#zone"),
};

function isTyping(target) {
  return target.closest("select, textarea, [contenteditable], input:not([type=checkbox])") !== null;
}

function press(event) {
  if (event.ctrlKey || event.altKey || event.metaKey || event.isComposing || event.defaultPrevented) return;
  if (!keysOn.checked || help.open || isTyping(event.target)) return;
  const section = prefix === "g" && document.querySelector(`.top nav a[data-key="${CSS.escape(event.key)}"]`);
  const action = section ? () => section.click() : ACTIONS[event.key];
  const isPrefix = event.key === "g" && prefix === "";
  if (event.key !== "Shift") prefix = isPrefix ? "g" : "";
  if (isPrefix || !action) return;
  event.preventDefault();
  action();
}

keysOn.checked = window.localStorage.getItem("keys") !== "off";
keysOn.addEventListener("change", () => window.localStorage.setItem("keys", keysOn.checked ? "on" : "off"));
helpButton.addEventListener("click", openHelp);
document.addEventListener("keydown", press);
