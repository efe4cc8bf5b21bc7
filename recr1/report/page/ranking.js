// The recommendation view: what two texts bring, and which terms moved what.
const ROW = 54;

function words(from, to) {
  const count = (text) =>
    (text || "")
      .split(/\s+/)
      .filter(Boolean)
      .reduce((m, w) => m.set(w.toLowerCase(), (m.get(w.toLowerCase()) || 0) + 1), new Map());
  const before = count(from),
    used = new Map();
  return (to || "")
    .split(/\s+/)
    .filter(Boolean)
    .flatMap((w) => {
      const key = w.toLowerCase(),
        n = (used.get(key) || 0) + 1;
      used.set(key, n);
      return [n > (before.get(key) || 0) ? el("ins", null, w) : w, " "];
    })
    .concat([...before].filter(([w, n]) => n > (used.get(w) || 0)).flatMap(([w]) => [el("del", null, w), " "]));
}

function moveText(places, depth, flip) {
  const [from, to] = flip ? [places[1], places[0]] : places;
  if (!known(from) && !known(to)) return ["", "same"];
  if (!known(to)) return [`not in the first ${depth}`, "down"];
  if (!known(from)) return [`from below ${depth}`, "up"];
  return from === to ? ["stays", "same"] : [`${from > to ? "▲" : "▼"} ${Math.abs(from - to)} from ${from}`, from > to ? "up" : "down"];
}

function listings(q) {
  const r = data.ranking,
    slots = Math.max(1, ...q.documents.flatMap((d) => d.places).filter((place) => known(place) && place <= r.top)),
    items = [[], []],
    root = el("div", { class: "lists" });
  function item(d, side) {
    const place = d.places[side],
      [text, kind] = side
        ? moveText(d.places, r.depth)
        : known(d.places[1])
          ? [`→ ${d.places[1]}`, "same"]
          : [`→ below ${r.depth}`, "down"];
    const terms = d.terms && side ? d.terms.filter((t) => Math.abs(t[2] - t[1]) > 5e-4) : [];
    const chips =
      side && terms.length
        ? el(
            "span",
            { class: "chips" },
            terms.map(([term, a, b]) =>
              el(
                "span",
                {
                  class: b > a ? "up-text" : "down-text",
                  title: `${term}: ${number(a, 3)} under the ${r.sides[0]}, ${number(b, 3)} under the ${r.sides[1]}`,
                },
                `${signed(b - a, 2)} ${term}`,
              ),
            ),
          )
        : d.terms && !side
          ? el(
              "span",
              { class: "chips dim" },
              d.terms
                .filter((t) => t[1] > 0)
                .sort((x, y) => y[1] - x[1])
                .map(([term, a]) => el("span", null, `${number(a, 2)} ${term}`)),
            )
          : null;
    const node = el(
      "li",
      {
        class: d.gain > 0 ? "relevant" : null,
        style: { top: `${(place - 1) * ROW}px` },
        onmouseenter: () => light(d.id),
        onmouseleave: () => light(null),
        onfocus: () => light(d.id),
        onblur: () => light(null),
      },
      el("span", { class: "place" }, place),
      el(
        "span",
        { class: "what" },
        el(
          "span",
          { class: "title", title: r.documents[d.id] ?? d.id },
          d.gain > 0 && el("b", { class: "gain", title: `judged relevant, gain ${d.gain}` }, number(d.gain)),
          r.documents[d.id] ?? d.id,
        ),
        chips,
      ),
      el("span", { class: `move ${kind}-text` }, text),
    );
    return { id: d.id, place, node };
  }
  for (const side of [0, 1])
    items[side] = q.documents
      .filter((d) => known(d.places[side]) && d.places[side] <= slots)
      .sort((a, b) => a.places[side] - b.places[side])
      .map((d) => item(d, side));
  const lines = svg("svg", { class: "slopes", width: 56, height: slots * ROW, viewBox: `0 0 56 ${slots * ROW}`, "aria-hidden": "true" });
  const paths = q.documents
    .filter((d) => d.places.some((p) => known(p) && p <= slots))
    .map((d) => {
      const y = d.places.map((p) => (known(p) && p <= slots ? (p - 0.5) * ROW : null));
      const path = svg("path", {
        class: `slope${d.gain > 0 ? " relevant" : ""}${known(y[0]) && known(y[1]) ? "" : " gone"}`,
        d: known(y[0]) && known(y[1]) ? `M0 ${y[0]}C28 ${y[0]} 28 ${y[1]} 56 ${y[1]}` : known(y[0]) ? `M0 ${y[0]}H18` : `M56 ${y[1]}H38`,
      });
      lines.append(path);
      return [d.id, path];
    });
  function light(id) {
    for (const list of items) for (const i of list) i.node.classList.toggle("lit", i.id === id);
    for (const [own, path] of paths) path.classList.toggle("lit", own === id);
  }
  for (const list of items)
    if (list.length)
      roving(
        list.map((i) => i.node),
        () => {},
      );
  const column = (side) =>
    el(
      "div",
      { class: "column" },
      el("h4", null, `First ${r.top} by the ${r.sides[side]}`),
      items[side].length
        ? el(
            "ol",
            { style: { "--slots": slots } },
            items[side].map((i) => i.node),
          )
        : el("p", { class: "small" }, q.texts[side] === null ? "There was no answer to rank by." : "No hits."),
    );
  root.append(column(0), lines, column(1));
  const gone = q.documents.filter(
    (d) => d.gain > 0 && known(d.places[0]) && d.places[0] <= slots && !(known(d.places[1]) && d.places[1] <= slots),
  );
  return [
    root,
    gone.length
      ? el(
          "p",
          { class: "small" },
          `Relevant and no longer among the first ${r.top}: `,
          gone.map((d, i) => [
            i ? "; " : "",
            el("b", null, (r.documents[d.id] ?? d.id).slice(0, 40)),
            ` ${moveText(d.places, r.depth)[0].replace(/^[▲▼] /, "by ")}`,
            d.terms
              ? ` (${d.terms
                  .filter((t) => Math.abs(t[2] - t[1]) > 5e-4)
                  .slice(0, 3)
                  .map(([t, a, b]) => `${signed(b - a, 2)} ${t}`)
                  .join(", ")})`
              : "",
          ]),
        )
      : null,
  ];
}

function rankingSection() {
  const r = data.ranking,
    intro = TWO
      ? "Test queries on which the two policies differ most: B's answer against A's."
      : `Test queries, chosen by rule: the ${RUNS[0].words[0]} and what the trained policy made of it${r && r.listed ? "; a list is given by the places of its items in the given order" : ""}.`;
  if (!r)
    return section(
      "recommendations",
      "Recommendations",
      TWO ? "The two runs have no scored test query in common." : "The run has no test scores after training yet.",
    );
  if (!r.queries.length) return section("recommendations", "Recommendations", `No ${RUNS[0].words[1]} differs from its ${RUNS[0].words[0]}.`);
  const detail = el("div", { class: "detail" }),
    list = el("div", { class: "queries", role: "group", "aria-label": "queries; the arrow keys move among them" }),
    buttons = [];
  const name = RUNS[0].label,
    marked = (from, to) => (r.listed ? to : words(from, to)); // a list's places are no words
  // what the prompt shows beside its text
  function beside(q) {
    const past = q.about.history || [];
    return [
      q.about.profile ? [el("dt", null, "profile"), el("dd", null, q.about.profile)] : [],
      past.length
        ? [
            el("dt", null, "history"),
            el("dd", null, (q.about.items > past.length ? `${q.about.items} items, the last: ` : "") + past.map((id) => r.documents[id] ?? id).join(" · ")),
          ]
        : [],
    ];
  }
  function show(i) {
    const q = r.queries[i],
      change = q.scores[1] - q.scores[0];
    buttons.forEach((b, j) => b.setAttribute("aria-pressed", String(i === j)));
    detail.replaceChildren(
      el(
        "dl",
        { class: "pairing" },
        TWO || r.listed ? [el("dt", null, "query"), el("dd", null, el("q", null, q.raw), known(q.score) && el("span", { class: "score" }, `${name} of the ${RUNS[0].words[0]} ${number(q.score, 4)}`))] : null,
        ...beside(q),
        el("dt", null, r.sides[0]),
        el(
          "dd",
          null,
          q.texts[0] === null ? "no answer" : el("q", null, q.texts[0]),
          el("span", { class: "score" }, `${name} ${number(q.scores[0], 4)}`),
        ),
        q.before
          ? [
              el("dt", null, "before training"),
              el(
                "dd",
                null,
                q.before[0] === null ? "no answer" : el("q", null, marked(q.raw, q.before[0])),
                el("span", { class: "score" }, `${name} ${number(q.before[1], 4)}`),
              ),
            ]
          : null,
        el("dt", null, r.sides[1]),
        el(
          "dd",
          null,
          q.texts[1] === null ? "no answer" : el("q", null, marked(q.texts[0], q.texts[1])),
          el(
            "span",
            { class: "score" },
            `${name} ${number(q.scores[1], 4)} `,
            el("b", { class: change > 0 ? "up-text" : change < 0 ? "down-text" : "" }, signed(change)),
          ),
        ),
      ),
      ...(q.documents ? listings(q).filter(Boolean) : []),
      known(q.relevant) ? el("p", { class: "small" }, `${plural(q.relevant, "document")} judged relevant for this query.`) : "",
    );
  }
  let why = null;
  r.queries.forEach((q, i) => {
    if (q.why !== why) list.append(el("h4", null, (why = q.why)));
    const change = q.scores[1] - q.scores[0],
      button = el(
        "button",
        { type: "button", "aria-pressed": "false", onclick: () => show(i) },
        el("span", { class: "query" }, q.raw),
        el("span", { class: "change " + (change > 0 ? "up-text" : change < 0 ? "down-text" : "") }, signed(change, 3)),
      );
    buttons.push(button);
    list.append(button);
  });
  roving(buttons, show);
  show(0);
  return section(
    "recommendations",
    "Recommendations",
    intro,
    r.why && el("p", { class: "note" }, r.why),
    el(
      "p",
      { class: "small" },
      `${plural(r.queries.length, "query")} of ${data.groups[0].rows[0].n.toLocaleString("en-US")} are shown: ${[...new Set(r.queries.map((q) => q.why))].join(", ")}. `,
      r.listed ? null : [el("ins", null, "added or repeated"), " ", el("del", null, "left out")],
      r.explained
        ? `. Beside a document: what each term (as the index has it, stemmed) adds to its score; on the right, by how much that changed. A document falls when others gain more.`
        : r.why || r.listed
          ? ""
          : ". This retriever does not say what a term adds to a score.",
    ),
    el("div", { class: "master" }, list, detail),
  );
}
