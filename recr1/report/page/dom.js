"use strict";
// Elements and numbers. Whatever comes from a run goes into text nodes and attributes, never into markup.
const data = JSON.parse(document.getElementById("data").textContent);
const RUNS = data.runs,
  TWO = RUNS.length === 2,
  LETTERS = ["A", "B"];
const SVG = "http://www.w3.org/2000/svg";
const UNSEEN = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\u2028\u2029]/gu; // control, format (bidi, zero width), lone surrogates, private use

function code(character) {
  const n = character.codePointAt(0);
  return n === 10 ? "\\n" : n === 9 ? "\\t" : n < 256 ? "\\x" + n.toString(16).padStart(2, "0") : "\\u" + n.toString(16).padStart(4, "0");
}

// The text with what cannot be seen written as an escape: for attributes.
function plainly(value) {
  return String(value).replace(UNSEEN, code);
}

// The same as nodes, the escapes marked: for the page.
function shown(value) {
  const out = document.createDocumentFragment(),
    string = String(value);
  let at = 0;
  for (const match of string.matchAll(UNSEEN)) {
    if (match.index > at) out.append(string.slice(at, match.index));
    const escape = document.createElement("span");
    escape.className = "escape";
    escape.textContent = code(match[0]);
    out.append(escape);
    at = match.index + match[0].length;
  }
  if (at < string.length) out.append(string.slice(at));
  return out;
}

function made(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, to] of Object.entries(value)) node.style.setProperty(key, to);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : plainly(value));
  }
  for (const child of children.flat(3))
    if (child !== null && child !== undefined && child !== false) node.append(child instanceof Node ? child : shown(child));
  return node;
}

function el(tag, attributes, ...children) {
  return made(document.createElement(tag), attributes, children);
}

function svg(tag, attributes, ...children) {
  return made(document.createElementNS(SVG, tag), attributes, children);
}

function section(id, title, intro, ...children) {
  return el(
    "section",
    { id, "aria-labelledby": id + "-title" },
    el("h2", { id: id + "-title" }, title),
    intro && el("p", { class: "intro" }, intro),
    ...children,
  );
}

// A scrollable table. columns: [title, class, title attribute]; rows: arrays of cells (text or nodes).
function table(caption, columns, rows, more) {
  return el(
    "div",
    { class: "scroll", tabindex: 0, role: "group", "aria-label": caption },
    el(
      "table",
      more,
      el("caption", { class: "hidden" }, caption),
      el(
        "thead",
        null,
        el(
          "tr",
          null,
          columns.map(([title, kind, hint]) => el("th", { scope: "col", class: kind, title: hint }, title)),
        ),
      ),
      el(
        "tbody",
        null,
        rows.map((row) =>
          el(
            "tr",
            row.attributes || null,
            row.map((cell, i) => el(i ? "td" : "th", { scope: i ? null : "row", class: columns[i][1] }, cell)),
          ),
        ),
      ),
    ),
  );
}

// Buttons of which one is chosen; arrow keys move among them.
function choice(label, names, chosen, pick) {
  const buttons = names.map((name, i) =>
    el("button", { type: "button", "aria-pressed": String(i === chosen), onclick: () => to(i) }, name),
  );
  function to(i) {
    buttons.forEach((b, j) => b.setAttribute("aria-pressed", String(i === j)));
    pick(i);
  }
  return el("div", { class: "choice", role: "group", "aria-label": label }, buttons);
}

// One tab stop for many items: arrow keys, Home and End move the focus.
function roving(items, moved) {
  let at = 0;
  items.forEach((item, i) => {
    item.tabIndex = i ? -1 : 0;
    item.addEventListener("focus", () => {
      items[at].tabIndex = -1;
      at = i;
      item.tabIndex = 0;
      moved(i);
    });
    item.addEventListener("keydown", (event) => {
      const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: items.length - 1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      items[Math.max(0, Math.min(items.length - 1, to))].focus();
    });
  });
}

const known = (x) => x !== null && x !== undefined;

function number(x, digits) {
  if (!known(x)) return "–";
  if (x === 0) return "0";
  if (x < 0) return "−" + number(-x, digits);
  if (x < 1e-3 || x >= 1e6) return x.toExponential(2).replace("e+", "e").replace("-", "−");
  if (digits !== undefined) return x.toFixed(digits);
  return Number.isInteger(x) ? x.toLocaleString("en-US") : String(Number(x.toPrecision(4)));
}

function signed(x, digits = 4) {
  return known(x) ? (x > 0 ? "+" : x < 0 ? "−" : "") + Math.abs(x).toFixed(digits) : "–";
}

function percent(x) {
  return known(x) ? Number((100 * x).toPrecision(3)) + "%" : "–";
}

function span(seconds) {
  if (!known(seconds)) return "–";
  const s = Math.round(seconds),
    h = Math.floor(s / 3600),
    m = Math.floor(s / 60) % 60;
  return h ? `${h} h ${m} min` : m ? `${m} min ${s % 60} s` : `${s} s`;
}

function interval(triple, digits = 4) {
  return known(triple[1])
    ? `${signed(triple[0], digits)} [${signed(triple[1], digits)}, ${signed(triple[2], digits)}]`
    : signed(triple[0], digits);
}

function setting(run, key) {
  const found = run.config.find((row) => row.key === key);
  return found ? JSON.parse(found.value) : undefined;
}

const plural = (n, noun) => `${n.toLocaleString("en-US")} ${n === 1 ? noun : noun.endsWith("y") ? noun.slice(0, -1) + "ies" : noun + "s"}`;
