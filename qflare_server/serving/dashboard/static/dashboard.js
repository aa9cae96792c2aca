// Fetches the page again every few seconds and takes over its content, where the reader is not in the middle of it.
"use strict";

const PERIOD_MS = 5000;
const button = document.getElementById("live");
const calm = window.matchMedia("(prefers-reduced-motion: reduce)").matches;
let live = !calm;

function show() {
  button.textContent = live ? "Live updates: on" : "Live updates: off";
  button.setAttribute("aria-pressed", String(live));
}

function isBusy() {
  const focused = document.activeElement;
  const main = document.getElementById("content");
  const typing = focused && main.contains(focused) && /^(INPUT|SELECT|TEXTAREA)$/.test(focused.tagName);
  return typing || String(window.getSelection()) !== "";
}

function openIds() {
  return [...document.querySelectorAll("main details[open][id]")].map((item) => item.id);
}

// The place of the focus, by what it points at: the element itself is replaced.
function focusedLink() {
  const focused = document.activeElement;
  const main = document.getElementById("content");
  if (!focused || !main.contains(focused)) return null;
  const places = [...main.querySelectorAll("a, summary, [tabindex]")];
  return places.indexOf(focused);
}

function takeOver(page) {
  const fresh = page.getElementById("content");
  const main = document.getElementById("content");
  if (!fresh || fresh.classList.contains("door")) {
    window.location.reload();
    return;
  }
  const place = focusedLink();
  const opened = openIds();
  for (const id of opened) fresh.querySelector("#" + CSS.escape(id))?.setAttribute("open", "");
  showTimes(page);
  if (fresh.innerHTML !== main.innerHTML) {
    main.replaceChildren(...fresh.childNodes);
    if (place !== null && place >= 0) {
      main.querySelectorAll("a, summary, [tabindex]")[place]?.focus({ preventScroll: true });
    }
  }
  const time = page.querySelector("[data-live]");
  if (time) document.querySelector("[data-live]").replaceWith(time);
}

// Times come in UTC. In local time they keep UTC as their title; the choice stays in this browser.
const zone = document.getElementById("zone");
let local = window.localStorage.getItem("zone") !== "utc";

function showTimes(root) {
  for (const time of root.querySelectorAll("time[datetime]")) {
    const at = new Date(time.dateTime);
    const utc = time.dateTime.slice(0, 19).replace("T", " ") + " UTC";
    const name = new Intl.DateTimeFormat(undefined, { timeZoneName: "short" })
      .formatToParts(at)
      .find((part) => part.type === "timeZoneName").value;
    const shifted = new Date(at.getTime() - at.getTimezoneOffset() * 60000);
    const here = shifted.toISOString().slice(0, 19).replace("T", " ") + " " + name;
    const [shown, other] = local ? [here, utc] : [utc, here];
    if (time.hasAttribute("data-ago")) {
      time.title = shown + (shown === other ? "" : ", " + other);
    } else {
      time.textContent = time.hasAttribute("data-live") ? shown.slice(11) : shown;
      time.title = other;
    }
  }
  zone.textContent = local ? "Times: local" : "Times: UTC";
  zone.setAttribute("aria-pressed", String(local));
}

zone.addEventListener("click", () => {
  local = !local;
  window.localStorage.setItem("zone", local ? "local" : "utc");
  showTimes(document);
});
showTimes(document);

async function refresh() {
  if (live && !document.hidden && !isBusy()) {
    try {
      const answer = await fetch(window.location.href, { cache: "no-store" });
      const text = await answer.text();
      if (live && !isBusy()) takeOver(new DOMParser().parseFromString(text, "text/html"));
      document.body.classList.remove("stale");
    } catch {
      document.body.classList.add("stale");
    }
  }
  window.setTimeout(refresh, PERIOD_MS);
}

button.parentElement.hidden = false;
button.addEventListener("click", () => {
  live = !live;
  show();
});
show();
window.setTimeout(refresh, PERIOD_MS);
