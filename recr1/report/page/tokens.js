// Rollouts token by token.
function tokenCard(r, run) {
  const taught = r.advantage !== 0,
    products = r.ids.map((_, i) => r.advantage * r.trainer_logp[i]),
    most = Math.max(1e-9, ...products.map(Math.abs));
  const readout = el("dl", { class: "readout", "aria-live": "polite" });
  const tokens = r.ids.map((id, i) =>
    el(
      "span",
      {
        class: `token ${r.advantage > 0 ? "up" : r.advantage < 0 ? "down" : ""}${r.clipped && r.clipped[i] ? " clipped" : ""}`,
        role: "button",
        "aria-label": `token ${i + 1}: ${r.pieces[i] || "part of a character"}`,
        style: { "--depth": (Math.sqrt(Math.abs(products[i]) / most) * (taught ? 1 : 0)).toFixed(3) },
        onmouseenter: () => read(i),
        onclick: () => tokens[i].focus(),
      },
      r.pieces[i] === "" ? el("span", { class: "escape" }, "…") : r.pieces[i].replaceAll(" ", "\u00a0"),
    ),
  );
  function read(i) {
    tokens.forEach((t, j) => t.classList.toggle("read", i === j));
    const ratio = r.ratio[i],
      rows = [
        ["token", [el("span", { class: "mono" }, JSON.stringify(r.pieces[i])), ` id ${r.ids[i]}`]],
        ["A · log p", signed(products[i])],
        ["log p sampler", number(r.sampler_logp[i])],
        ["log p trainer", number(r.trainer_logp[i])],
        ["log p reference", r.ref_logp ? number(r.ref_logp[i]) : "none kept"],
        ["ratio", ratio === 1 ? "1" : number(ratio)],
        ["clipped", r.clipped === null ? "not known" : r.clipped[i] ? "yes, no gradient" : "no"],
        ["entropy", r.entropy ? number(r.entropy[i]) + " nats" : "–"],
      ];
    readout.replaceChildren(...rows.map(([name, value]) => el("div", null, el("dt", null, name), el("dd", null, value))));
  }
  roving(tokens, read);
  read(products.reduce((best, p, i) => (Math.abs(p) > Math.abs(products[best]) ? i : best), 0));
  const g = r.group;
  return el(
    "article",
    { class: "card rollout" },
    el(
      "header",
      null,
      el("b", { class: "rank " + r.rank }, r.rank),
      el("span", null, `step ${r.step}`),
      el("span", null, `reward ${number(r.reward, 3)}`),
      el("span", { class: r.advantage > 0 ? "up-text" : r.advantage < 0 ? "down-text" : "" }, `A ${signed(r.advantage, 3)}`),
      el("span", { class: "dim" }, `${r.count} of ${g.size} siblings`),
      r.error && el("span", { class: "flag" }, r.error),
      !r.finished && el("span", { class: "flag" }, "cut"),
      known(r.text_ratio) && el("span", null, `ratio of the text ${number(r.text_ratio)}`),
    ),
    el("p", { class: "prompt" }, el("span", { class: "label" }, "prompt "), r.prompt_text),
    el(
      "p",
      { class: "tokens", role: "group", "aria-label": "tokens; the arrow keys move among them" },
      tokens,
      r.total > r.ids.length && el("span", { class: "dim" }, ` … ${r.total - r.ids.length} more tokens`),
    ),
    readout,
    el(
      "details",
      null,
      el("summary", null, `Its group: ${g.size} siblings, mean ${number(g.mean, 3)}, standard deviation ${number(g.std, 3)}`),
      el(
        "p",
        { class: "small" },
        `A = (reward − mean) / (std + ${setting(run, "loss.advantage_eps")}) under loss.advantage mean_std; other advantages are as logged. Query: `,
        known(r.query) ? r.query : r.prompt,
      ),
      table(
        "Siblings",
        [
          ["text", "mono wide"],
          ["times", "num"],
          ["reward", "num"],
          ["A", "num"],
        ],
        g.siblings.map((s) =>
          Object.assign([s.text, s.count, number(s.reward, 3), signed(s.advantage, 3)], { attributes: { class: s.own ? "own" : null } }),
        ),
      ),
    ),
  );
}

function perRun(id, title, intro, render) {
  const holder = el("div"),
    fill = (k) => holder.replaceChildren(...render(RUNS[k]).filter(Boolean));
  fill(0);
  return section(
    id,
    title,
    intro,
    TWO
      ? choice(
          "Run",
          RUNS.map((run, k) => `${LETTERS[k]} · ${run.name}`),
          0,
          fill,
        )
      : null,
    holder,
  );
}

// What SFT learnt from, by the run's summary.
function learnt(run) {
  const t = run.summary.teacher;
  if (!t) return [];
  const errors = Object.entries(t.format_errors || {}).map(([name, n]) => `${name} ${n}`);
  return [
    table(
      "The teacher's texts",
      [
        ["teacher", "mono"],
        ["texts", "num"],
        ["kept", "num"],
        [`mean ${run.metric.split("@")[0]} of the kept`, "num"],
        [`of their ${run.words[0]}`, "num"],
        ["nothing to learn from", ""],
      ],
      [[t.source, number(t.texts), number(t.kept), number(t.score_kept, 4), number(t.raw_kept, 4), errors.join(", ") || "none"]],
    ),
    el("p", { class: "small" }, "The texts with their scores are in teacher.jsonl, beside this page."),
  ];
}

function rolloutsSection() {
  return perRun(
    "rollouts",
    "Rollouts, token by token",
    RUNS.some((run) => !run.rollouts.why) &&
      "The best, median and worst by reward of each third of the training, of those with an advantage: equal rewards teach nothing. " +
      "Colour is A · log p, by the trainer before the update: blue tokens are pushed up, orange ones down, and the deeper the colour, the more " +
      "the token surprised the policy. Within a rollout the deepest colour is its largest |A · log p|, and the depth goes by the square root.",
    (run) => {
      const r = run.rollouts;
      if (r.why) return [el("p", { class: "small" }, r.why), ...learnt(run)];
      const traced = r.phases.reduce((n, p) => n + p.logged, 0),
        on = r.phases.reduce((n, p) => n + p.rollouts.length, 0);
      return [
        el(
          "div",
          { class: "scale" },
          el("span", null, "A < 0: pushed down"),
          el("span", { class: "ramp", role: "img", "aria-label": "orange over white to blue" }),
          el("span", null, "A > 0: pushed up"),
          el("span", { class: "token clipped" }, "clipped"),
          el("span", null, "no gradient"),
        ),
        el(
          "p",
          { class: "small" },
          `${on} of ${plural(r.rows, "distinct rollout")} are shown; ${traced.toLocaleString("en-US")} were logged with their tokens (log.tokens_every = ${setting(run, "log.tokens_every")}). ${(setting(run, "train.num_mini_batches") ?? 1) > 1 ? "The values are those before the step's first update, where every ratio is 1. " : ""}${r.tokenizer ? "" : "No tokenizer was at hand: tokens are their ids. "}${r.loss_note}`,
        ),
        ...r.phases.map((p) =>
          el(
            "div",
            { class: "phase" },
            el(
              "h3",
              null,
              `${p.name[0].toUpperCase()}${p.name.slice(1)}: steps ${p.first.toLocaleString("en-US")} to ${p.last.toLocaleString("en-US")}`,
              el(
                "span",
                { class: "small" },
                ` ${plural(p.logged, "rollout")} with tokens in ${plural(p.steps, "step")}, ${p.logged ? percent(p.idle / p.logged) : "0%"} of them without an advantage`,
              ),
            ),
            p.rollouts.length
              ? el(
                  "div",
                  { class: "cards" },
                  p.rollouts.map((x) => tokenCard(x, run)),
                )
              : el("p", { class: "small" }, "No rollout with tokens here."),
          ),
        ),
      ];
    },
  );
}
