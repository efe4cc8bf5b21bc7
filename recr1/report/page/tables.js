// The audit of rewards, and the groups of queries.
function histogramOf(h) {
  const phases = Object.entries(h.counts),
    peak = Math.max(
      ...phases.flatMap(([, counts]) => {
        const sum = counts.reduce((a, b) => a + b, 0) || 1;
        return counts.map((c) => c / sum);
      }),
    ),
    marks = ticks(0, peak * 1.001, 3),
    most = Math.max(peak, marks.at(-1));
  return el(
    "div",
    { class: "histograms" },
    phases.map(([phase, counts]) => {
      const sum = counts.reduce((a, b) => a + b, 0) || 1,
        width = 366,
        height = 104,
        w = (width - 40) / counts.length,
        first = h.edges[0],
        last = h.edges.at(-1);
      const root = svg("svg", {
        viewBox: `0 0 ${width} ${height + 20}`,
        role: "img",
        "aria-label":
          `Rewards, ${phase}: ` +
          counts
            .map((c, i) => c && `${number(h.edges[i], 2)} to ${number(h.edges[i + 1], 2)}: ${percent(c / sum)}`)
            .filter(Boolean)
            .join(", "),
      });
      for (const t of marks)
        root.append(
          svg("line", {
            x1: 34,
            x2: width,
            y1: height - (t / most) * (height - 10),
            y2: height - (t / most) * (height - 10),
            class: "grid",
          }),
          svg("text", { x: 30, y: height - (t / most) * (height - 10) + 4, class: "tick end" }, percent(Number(t.toPrecision(3)))),
        );
      counts.forEach((c, i) => {
        if (c) {
          const tall = Math.max(1, (c / sum / most) * (height - 10)),
            bar = svg("rect", { x: 36 + i * w, y: height - tall, width: w - 1.5, height: tall, class: "bar" });
          bar.append(svg("title", null, `${number(h.edges[i], 3)} to ${number(h.edges[i + 1], 3)}: ${percent(c / sum)}`));
          root.append(bar);
        }
      });
      for (const t of ticks(first, last, 4))
        root.append(
          svg(
            "text",
            {
              x: 36 + ((t - first) / (last - first)) * (width - 40),
              y: height + 15,
              class: `tick ${Math.abs(t - last) < 1e-9 ? "end" : "middle"}`,
            },
            number(t),
          ),
        );
      return el(
        "figure",
        { class: "chart" },
        el("figcaption", null, el("b", null, phase), el("span", { class: "unit" }, `share of ${plural(sum, "rollout")} by reward`)),
        root,
      );
    }),
  );
}

function auditSection() {
  return perRun(
    "audit",
    "Reward audit",
    RUNS.some((run) => !run.rollouts.why) &&
      "The highest rewards first, so that a trick shows: a reward that was earned by something other than a good answer. Equal rewards are ordered by advantage. Marks are things to look at twice, not verdicts.",
    (run) => {
      const r = run.rollouts,
        holder = el("div");
      if (r.why) return [el("p", { class: "small" }, r.why)];
      if (!r.audit.length) return [el("p", { class: "small" }, "No rollouts were found.")];
      const names = ["all", "early", "middle", "late", "marked only"];
      const fill = (i) => {
        const rows = r.audit.filter((row) => i === 0 || (i === 4 ? row.flags.length : row.phase === names[i])).slice(0, i ? 200 : 60);
        holder.replaceChildren(
          table(
            "Highest rewards",
            [
              ["reward", "num"],
              ["A", "num"],
              ["step", "num"],
              ["query", "wide"],
              ["answer", "mono wide"],
              ["marks", ""],
            ],
            rows.map((row) => [
              number(row.reward, 3),
              signed(row.advantage, 2),
              row.step,
              known(row.query) ? row.query : row.prompt,
              row.answer ?? row.text,
              row.flags.map((f) => el("span", { class: "flag" }, f)),
            ]),
          ),
          el(
            "p",
            { class: "small" },
            `${rows.length} shown of ${plural(r.rows, "distinct rollout")}; kept here are the ${r.audit.length} of highest reward, up to 40 of each third of the training.${setting(run, "data.shuffle_words") ? " Prompts may have shown a query's words in another order (data.shuffle_words)." : ""}`,
          ),
        );
      };
      fill(0);
      const recurring = r.recurring.map((row) => [row.prompts, row.rollouts, number(row.reward, 3), row.answer, row.examples.join(" · ")]);
      return [
        histogramOf(r.histogram),
        el("h3", null, "Highest rewards"),
        choice("Which rollouts", names, 0, fill),
        holder,
        el("h3", null, "Answers given to several different queries"),
        recurring.length
          ? table(
              "Recurring answers",
              [
                ["queries", "num"],
                ["rollouts", "num"],
                ["mean reward", "num"],
                ["answer", "mono wide"],
                ["for example", "wide"],
              ],
              recurring,
            )
          : el("p", { class: "small" }, "None."),
        r.uncounted
          ? el(
              "p",
              { class: "small" },
              `${r.uncounted.toLocaleString("en-US")} rollouts came after the first 200,000 distinct answers and are not counted here.`,
            )
          : null,
      ];
    },
  );
}

function changeCell(change, low, high) {
  const width = 150,
    x = (v) => 4 + ((v - low) / (high - low || 1)) * (width - 8),
    root = svg("svg", { width, height: 18, viewBox: `0 0 ${width} 18`, "aria-hidden": "true" });
  const tone = !known(change[1]) ? "neutral" : change[1] > 0 ? "up" : change[2] < 0 ? "down" : "neutral";
  root.append(svg("line", { x1: x(0), x2: x(0), y1: 0, y2: 18, class: "grid zero" }));
  if (known(change[1]))
    root.append(
      svg("line", { x1: x(Math.max(low, change[1])), x2: x(Math.min(high, change[2])), y1: 9, y2: 9, class: `whisker thick ${tone}` }),
    );
  root.append(glyph("circle", x(Math.max(low, Math.min(high, change[0]))), 9, 4, { class: `mark ${tone}` }));
  return el("span", { class: "changes" }, root, el("span", { class: tone === "neutral" ? "" : tone + "-text" }, interval(change, 3)));
}

function groupsSection() {
  const g = data.groups,
    title = TWO ? "Where B helps and hurts against A" : "Where the policy helps and hurts";
  if (!g.length) return section("groups", title, "There are no test scores to group yet.");
  const rows = g.flatMap((t) => t.rows),
    big = rows.filter((r) => r.n >= 10),
    ends = (big.length ? big : rows).flatMap((r) => r.change).filter(known),
    low = Math.min(0, ...ends),
    high = Math.max(0, ...ends);
  const means = Object.keys(rows[0].means);
  return section(
    "groups",
    title,
    `Test queries in groups; the change is ${TWO ? "B − A" : `after training − ${RUNS[0].words[0]}`}, with its 95% interval over the group's queries. ${rows.length} groups were looked at: about one in twenty intervals lies beside its true value by chance alone.`,
    g.map((t) => [
      el("h3", null, t.title === "all" ? null : `By ${t.title}`),
      t.text && el("p", { class: "small" }, t.text),
      table(
        `Change by ${t.title}`,
        [
          [t.title === "all" ? "" : t.title, "name"],
          ["queries", "num"],
          ...means.map((m) => [m, "num means"]),
          ["change", "change"],
          ["helped", "num"],
          ["hurt", "num"],
        ],
        t.rows.map((r) =>
          Object.assign(
            [
              r.name,
              r.n.toLocaleString("en-US"),
              ...means.map((m) => r.means[m].toFixed(3)),
              changeCell(r.change, low, high),
              r.helped.toLocaleString("en-US"),
              r.hurt.toLocaleString("en-US"),
            ],
            { attributes: { class: r.n < 10 ? "dim" : null } },
          ),
        ),
        { class: "groups" },
      ),
    ]),
    el("p", { class: "small" }, "Grey rows have fewer than 10 queries."),
  );
}
