// What a run came to, in figures; two runs side by side.
function headline(run) {
  const facts = [
    setting(run, "task").replace("_", " "),
    ...(run.retriever ? [run.retriever] : []),
    run.loop === "sft" ? `SFT, teacher ${setting(run, "sft.teacher")}` : `loss ${setting(run, "loss.kind")}`,
    known(run.planned) ? `${run.steps.toLocaleString("en-US")} of ${plural(run.planned, "step")}` : plural(run.steps, "step"),
    `seed ${setting(run, "run.seed")}`,
    ...(run.loop === "sft" ? [] : [plural(run.rollouts.rollouts, "rollout")]),
  ];
  if (known(run.summary.wall_s)) facts.push(span(run.summary.wall_s));
  return facts.join(" · ");
}

function tile(name, value, hint, tone) {
  return el(
    "div",
    { class: "tile" + (tone ? " " + tone : "") },
    el("span", { class: "label" }, name),
    el("b", null, value),
    el("span", { class: "small" }, hint),
  );
}

// Differences with their intervals on one axis. rows: [name, [mean, low, high], tone].
function forest(rows) {
  const root = svg("svg", {
    class: "forest",
    height: 34 * rows.length + 34,
    role: "img",
    "aria-label": rows.map((r) => `${r[0]}: ${interval(r[1])}`).join("; "),
  });
  function draw() {
    const width = Math.max(260, root.clientWidth || 500),
      names = width > 560 ? 190 : 0,
      values = width > 560 ? 214 : 0,
      left = names + 10,
      right = width - values - 10;
    const all = rows
        .flatMap((r) => r[1])
        .filter(known)
        .concat([0]),
      low = Math.min(...all),
      high = Math.max(...all),
      pad = (high - low || 0.01) * 0.08;
    const x = (v) => left + ((v - low + pad) / (high - low + 2 * pad || 1)) * (right - left),
      bottom = 34 * rows.length + 8;
    root.replaceChildren();
    root.setAttribute("viewBox", `0 0 ${width} ${bottom + 26}`);
    for (const t of ticks(low - pad, high + pad, 4))
      root.append(
        svg("line", { x1: x(t), x2: x(t), y1: 4, y2: bottom, class: Math.abs(t) < 1e-12 ? "grid zero" : "grid" }),
        svg("text", { x: Math.max(18, Math.min(x(t), width - 18)), y: bottom + 16, class: "tick middle" }, signed(t, 3)),
      );
    rows.forEach(([name, triple, tone], i) => {
      const y = 34 * i + (names ? 20 : 25);
      if (names)
        root.append(
          svg("text", { x: 0, y: y + 4, class: "name" }, name),
          svg("text", { x: width, y: y + 4, class: "name end num" }, interval(triple)),
        );
      else root.append(svg("text", { x: left, y: y - 11, class: "tick halo" }, `${name}  ${interval(triple)}`));
      if (known(triple[1])) root.append(svg("line", { x1: x(triple[1]), x2: x(triple[2]), y1: y, y2: y, class: `whisker thick ${tone}` }));
      root.append(glyph("circle", x(triple[0]), y, 5, { class: `mark ${tone}` }));
    });
  }
  new ResizeObserver(draw).observe(root);
  return root;
}

function notes() {
  const all = RUNS.flatMap((run, k) => [...run.notes, run.rollouts.note].filter(Boolean).map((n) => (TWO ? LETTERS[k] + ": " : "") + n));
  return all.length
    ? el(
        "ul",
        { class: "note" },
        all.map((n) => el("li", null, n)),
      )
    : null;
}

function overviewSection() {
  const run = RUNS[0],
    r = run.results;
  if (TWO) return comparison();
  const three = (t) => (t ? number(t[0], 4) : "–"),
    within = (t) => (t ? `95% [${t[1].toFixed(4)}, ${t[2].toFixed(4)}]` : "not scored");
  const rows = [
    [`after − ${run.words[0]}`, r.after_minus_raw, "a"],
    ["after − before training", r.after_minus_before, "b"],
    [`before − ${run.words[0]}`, r.before_minus_raw, "neutral"],
  ].filter((row) => row[1]);
  return section(
    "overview",
    "Overview",
    `${run.label} on ${plural(run.n_eval, "test query")} that were never trained on, greedy answers. Differences are paired; intervals are over queries (bootstrap), not over seeds.`,
    notes(),
    el(
      "div",
      { class: "tiles" },
      tile(run.words[0], three(r.raw), within(r.raw)),
      tile("policy before training", three(r.before), within(r.before)),
      tile("policy after training", three(r.after), within(r.after), "strong"),
      tile(
        "answers that cannot be read",
        known(run.summary.unparsable_after) ? run.summary.unparsable_after.toLocaleString("en-US") : "–",
        known(run.summary.unparsable_before)
          ? `of ${run.summary.n_eval.toLocaleString("en-US")} after training; before: ${run.summary.unparsable_before}`
          : "not counted",
      ),
    ),
    rows.length ? el("div", { class: "card" }, forest(rows)) : null,
    measures(run),
  );
}

// All metrics and parts of the reward on the test queries; a run's summary.json has them once it has finished.
function measures(run) {
  const all = Object.entries(run.summary.reward_terms || {}),
    k = run.metric.split("@")[1];
  if (all.length < 2) return null;
  return [
    el("h3", null, `All measures, on test, @${k}`),
    table(
      "All measures",
      [
        ["measure", ""],
        [run.words[0], "num"],
        ["before training", "num"],
        ["after training", "num"],
        [`after − ${run.words[0]}, 95%`, "num"],
        ["p", "num", "two-sided paired randomization test"],
      ],
      all.map(([name, f]) => [
        name,
        number(f.raw, 4),
        number(f.before, 4),
        number(f.after, 4),
        interval([f.gain, ...f.gain_ci95]),
        known(f.gain_p) ? f.gain_p.toFixed(4) : "–",
      ]),
      { class: "results" },
    ),
  ];
}

function comparison() {
  const c = data.compare,
    column = (pick) => RUNS.map(pick),
    triple = (t) => (t ? `${t[0].toFixed(4)} [${t[1].toFixed(4)}, ${t[2].toFixed(4)}]` : "–");
  const rows = [
    [RUNS[0].words[0], ...column((r) => triple(r.results.raw))],
    ["before training", ...column((r) => triple(r.results.before))],
    ["after training", ...column((r) => triple(r.results.after))],
    [`after − ${RUNS[0].words[0]}`, ...column((r) => (r.results.after_minus_raw ? interval(r.results.after_minus_raw) : "–"))],
    ["answers that cannot be read", ...column((r) => number(r.summary.unparsable_after))],
    ["wall time", ...column((r) => span(r.summary.wall_s))],
    ["rollout tokens per second", ...column((r) => number(r.summary.rollout_tokens_per_s && Math.round(r.summary.rollout_tokens_per_s)))],
  ];
  const words =
    c.metrics[0] !== c.metrics[1]
      ? `A reports ${c.metrics[0]}, B ${c.metrics[1]}: their scores cannot be compared.`
      : !c.queries
        ? "The two runs have no test query in common: their scores cannot be compared."
        : `The difference is paired over the ${c.queries.toLocaleString("en-US")} test queries that both have${c.only[0] || c.only[1] ? ` (${c.only[0]} are A's alone, ${c.only[1]} B's)` : ""}.`;
  const mine = new Map(RUNS[0].config.map((row) => [row.key, row.value]));
  const settings = RUNS[1].config
    .filter((row) => row.key !== "run.dir" && mine.get(row.key) !== row.value)
    .map((row) => [row.key, mine.get(row.key), row.value]);
  return section(
    "overview",
    "Comparison",
    words,
    notes(),
    table(
      "Results of both runs",
      [
        ["", ""],
        ["A · " + RUNS[0].name, "num"],
        ["B · " + RUNS[1].name, "num"],
      ],
      rows,
      { class: "results" },
    ),
    c.difference
      ? el(
          "div",
          { class: "card" },
          forest([
            ["B − A", c.difference, "b"],
            ...RUNS.map((r, k) => [`${LETTERS[k]} − ${r.words[0]}`, r.results.after_minus_raw, TONES[k]]).filter((row) => row[1]),
          ]),
        )
      : null,
    el("h3", null, "Settings that differ"),
    settings.length
      ? table(
          "Settings that differ",
          [
            ["setting", "mono"],
            ["A", "mono"],
            ["B", "mono"],
          ],
          settings,
        )
      : el("p", { class: "small" }, "None but run.dir."),
    c.versions.length
      ? [
          el("h3", null, "Versions that differ"),
          table(
            "Versions that differ",
            [
              ["what", ""],
              ["A", "mono"],
              ["B", "mono"],
            ],
            c.versions.map((v) => [v.key, ...v.values.map((x) => (known(x) ? String(x) : "not recorded"))]),
          ),
        ]
      : null,
  );
}

function configurationSection() {
  const tables = RUNS.map((run, k) => {
    const changed = run.config.filter((row) => row.value !== row.default),
      holder = el("div");
    const fill = (all) =>
      holder.replaceChildren(
        table(
          "Settings",
          [
            ["setting", "mono"],
            ["value", "mono wide"],
            ["default", "mono dim wide"],
          ],
          (all ? run.config : changed).map((row) =>
            Object.assign([row.key.split(/(?<=[._])/).map((part) => [part, el("wbr")]), row.value, row.value === row.default ? "the same" : row.default], {
              attributes: { class: row.value === row.default ? "dim" : null },
            }),
          ),
        ),
      );
    fill(false);
    const starts = run.versions.map((v, i) => {
      const rows = [
        ["started", v.started],
        [
          "commit",
          known(v.commit)
            ? v.commit + (v.changed ? ", with changes that are not committed" : "")
            : "not recorded: the code was no git checkout",
        ],
        ["python", v.python],
        ["machine", v.machine],
        ["devices", (v.devices || []).join(", ") || "CPU"],
        ...Object.entries(v.packages || {}),
      ];
      return el(
        "div",
        null,
        run.versions.length > 1 ? el("h4", null, `Start ${i + 1} of ${run.versions.length}`) : null,
        table(
          "Versions",
          [
            ["", ""],
            ["", "mono wide"],
          ],
          rows.map(([a, b]) => [a, known(b) ? b : "–"]),
        ),
      );
    });
    return el(
      "div",
      { class: "pair" },
      el(
        "div",
        null,
        el("h3", null, `Settings${TWO ? " of " + LETTERS[k] : ""}`),
        choice("Which settings", [`changed (${changed.length})`, `all (${run.config.length})`], 0, (i) => fill(i === 1)),
        holder,
      ),
      el(
        "div",
        null,
        el("h3", null, `Versions${TWO ? " of " + LETTERS[k] : ""}`),
        starts.length ? starts : el("p", { class: "small" }, "Not recorded: the run's folder has no versions.json."),
      ),
    );
  });
  return section(
    "configuration",
    "Configuration, versions, commit",
    "From config.yaml and versions.json in the run's folder; versions are those of the run, not of whoever made this page.",
    tables,
  );
}
