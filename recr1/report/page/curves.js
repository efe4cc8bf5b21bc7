// Which curves there are, of one run or of two.
const TONES = ["a", "b"];

function curvesSection() {
  const last = Math.max(...RUNS.map((run) => run.steps)),
    marks = RUNS.flatMap((run, k) => run.marks.map((m) => ({ ...m, tone: TWO ? TONES[k] : m.kind, row: TWO ? 2 * k - 1 : 0 })));
  const has = (name) => RUNS.some((run) => run.curves[name]);
  const runName = (k, name) => (TWO ? LETTERS[k] + (name ? " " + name : "") : name);

  // one series of each run; `more` series are shown for a single run only
  function series(name, label, more = []) {
    return RUNS.flatMap((run, k) =>
      (TWO ? [[name, label]] : [[name, label], ...more]).map(
        ([key, text], j) =>
          run.curves[key] && {
            name: runName(k, TWO && !more.length ? "" : text),
            tone: TWO ? TONES[k] : "cde"[j - 1] || TONES[0],
            x: run.curves.step,
            y: run.curves[key].mean,
            low: run.curves[key].low,
            high: run.curves[key].high,
          },
      ),
    ).filter(Boolean);
  }
  function points(pick, label, shape, tone) {
    return RUNS.map(
      (run, k) =>
        run.evaluations.length && {
          name: runName(k, label),
          tone: TWO ? TONES[k] : tone,
          shape,
          x: run.evaluations.map((e) => e.step),
          y: run.evaluations.map((e) => pick(e)[0]),
          low: pick(run.evaluations[0]).length > 1 && run.evaluations.map((e) => pick(e)[1]),
          high: pick(run.evaluations[0]).length > 1 && run.evaluations.map((e) => pick(e)[2]),
        },
    ).filter(Boolean);
  }
  // the test split, scored before and after training
  const tests = RUNS.map((run, k) => {
    const r = run.results,
      found = [
        [0, r.before_minus_raw],
        [run.steps, r.after_minus_raw],
      ].filter((p) => p[1]);
    return (
      found.length && {
        name: runName(k, "test"),
        tone: TWO ? TONES[k] : "c",
        shape: "square",
        x: found.map((p) => p[0]),
        y: found.map((p) => p[1][0]),
        low: found.map((p) => p[1][1]),
        high: found.map((p) => p[1][2]),
      }
    );
  }).filter(Boolean);
  const ended = (name) => RUNS.every((run) => (run.curves[name]?.mean || []).every((v) => !v));
  const kit = (spec) => (spec.empty || spec.series.length || (spec.points || []).length ? chart({ last, marks, ...spec }) : null);
  const phases = (run) => ["sample", "reward", "train"].filter((p) => run.curves["timing_s." + p]);

  function seconds() {
    if (TWO) return kit({ title: "Seconds per step", unit: "s, all phases", series: series("timing_s.step", "step"), zero: true });
    const run = RUNS[0],
      total = run.curves["timing_s.step"],
      used = phases(run);
    if (!total) return null;
    const parts = used.map((p) => run.curves["timing_s." + p].mean.map((v) => v || 0));
    parts.push(total.mean.map((t, i) => Math.max(0, (t || 0) - parts.reduce((a, p) => a + p[i], 0))));
    let sum = total.mean.map(() => 0);
    const sorted = [...total.mean].sort((p, q) => p - q),
      usual = 1.4 * sorted[Math.floor(0.97 * (sorted.length - 1))],
      most = sorted.at(-1);
    const cut = most > 2 * usual ? { top: usual, note: `Cut at the top: the slowest steps took up to ${number(most, 1)} s.` } : {};
    return kit({
      title: "Seconds by phase",
      unit: "s per step, stacked",
      stack: true,
      zero: true,
      ...cut,
      series: [...used, "rest"].map((p, j) => {
        sum = sum.map((v, i) => v + parts[j][i]);
        return { name: p, tone: "abcd"[j], x: run.curves.step, y: sum, part: parts[j] };
      }),
    });
  }

  const single = RUNS[0],
    trained = RUNS.some((run) => run.loop === "train"),
    sft = RUNS.some((run) => run.loop === "sft"),
    metric = single.metric.split("@")[0],
    label = [...new Set(RUNS.map((run) => run.label))].join(" / "),
    extra = [...new Set(RUNS.flatMap((run) => run.reward_terms))].filter((part) => part !== metric && has(part)),
    inner = Math.max(...RUNS.map((run) => setting(run, "train.num_mini_batches") ?? 1));
  // the reward's other terms: four lines to a chart, of two runs one term to a chart
  const parts = TWO
    ? extra.map((part) => kit({ title: `Reward's part ${part}`, unit: "mean of the step's rollouts", series: series(part, part) }))
    : extra
        .filter((_, i) => i % 4 === 0)
        .map((_, i) => extra.slice(4 * i, 4 * i + 4))
        .map((some) =>
          kit({
            title: "Other parts of the reward",
            unit: "unweighted, mean of the step's rollouts",
            series: series(
              some[0],
              some[0],
              some.slice(1).map((part) => [part, part]),
            ),
          }),
        );
  const loss = kit({
    title: "Loss",
    unit: !trained ? "cross-entropy, nats per target token" : sft ? "policy loss of the step, SFT's cross-entropy" : "policy loss of the step",
    series: series("loss", "loss"),
    note: trained && "Near 0 is no fault: a group's advantages sum to 0, and where ratios are 1 so does most of the loss. Its gradient does not.",
  });
  const figures = [
    trained ? null : loss,
    kit({ title: "Reward", unit: "mean of the step's rollouts", series: series("reward", "reward") }),
    kit({
      title: label,
      unit: trained ? "train sampled, validation greedy" : "validation, greedy",
      series: series(metric, `train, @${setting(single, "reward.k_train")}`),
      points: [
        ...points((e) => [e.score], "validation", "triangle", "b"),
        ...(TWO ? [] : points((e) => [e.raw], single.words[0], "diamond", "c")),
      ],
    }),
    ...parts,
    kit({
      title: `Gain over the ${single.words[0]}`,
      unit: `${label}, with 95% intervals over queries`,
      zero: true,
      series: RUNS.map(
        (run, k) =>
          run.evaluations.length && {
            name: runName(k, "validation"),
            tone: TWO ? TONES[k] : "b",
            x: run.evaluations.map((e) => e.step),
            y: run.evaluations.map((e) => e.gain[0]),
            quiet: true,
          },
      ).filter(Boolean),
      points: [...points((e) => e.gain, "validation", "triangle", "b"), ...tests],
      text: (v) => signed(v),
    }),
    kit({
      title: "KL to the initial policy",
      unit: "k3, nats per token",
      series: series("kl", "KL"),
      zero: true,
      empty: trained && !has("kl") && "Not measured: loss.kl_coef is 0, so no reference policy was kept.",
    }),
    kit({
      title: "Entropy",
      unit: "nats, mean over the trained tokens",
      series: series("entropy", "entropy"),
      zero: true,
    }),
    kit({ title: "Completion length", unit: "tokens", series: series("completion_length", "tokens") }),
    kit({
      title: "Clip share",
      unit: "tokens whose gradient the clip removed",
      share: true,
      zero: true,
      series: series("clip_ratio", "clipped"),
      note: ended("clip_ratio") && inner === 1 && "0 by construction: with one optimizer step per batch every ratio is 1.",
    }),
    kit({
      title: "Zero-variance share",
      unit: "groups whose rewards are all equal",
      share: true,
      zero: true,
      series: series("frac_reward_zero_std", "groups"),
    }),
    kit({ title: "Reward spread", unit: "standard deviation inside a group, mean", zero: true, series: series("reward_std", "spread") }),
    kit({
      title: "Log-prob gap",
      unit: "|sampler − trainer|, nats, log scale",
      log: true,
      series: series("sampling_logp_diff_mean", "mean", [
        ["sampling_logp_diff_p999", "99.9%"],
        ["sampling_logp_diff_max", "largest"],
      ]),
      note: ended("sampling_logp_diff_max") && "0 in every step: sampler and trainer agree bit for bit.",
    }),
    seconds(),
    kit({ title: "Sampling speed", unit: "tokens per second of sampling", zero: true, series: series("rollout_tokens_per_s", "tokens/s") }),
    kit({ title: "Speed", unit: "target tokens per second", zero: true, series: series("tokens_per_s", "tokens/s") }),
    trained ? loss : null,
    kit({ title: "Gradient norm", unit: "before clipping", zero: true, series: series("grad_norm", "norm") }),
    kit({ title: "Learning rate", unit: "of the step", zero: true, series: series("lr", "rate") }),
    kit({
      title: "Faulty answers",
      unit: "share of rollouts",
      share: true,
      zero: true,
      series: series("format_error_rate", "no parsable answer", [["truncated_ratio", "cut at the length limit"]]),
    }),
  ];
  const kinds = [
    ["evaluation", "validation"],
    ["frac_reward_zero_std", "first groups of equal rewards"],
    ["clip_spike", "clip spike"],
    ["skipped", "skipped step"],
  ].filter(([kind]) => trained || ["evaluation", "skipped"].includes(kind));
  const per = RUNS.map((run) => run.curves.per),
    listed = RUNS.flatMap((run, k) =>
      run.marks.map((m) => [
        m.step.toLocaleString("en-US"),
        ...(TWO ? [LETTERS[k]] : []),
        kinds.find((kind) => kind[0] === m.kind)[1],
        m.text,
      ]),
    );
  return section(
    "curves",
    "Curves",
    null,
    el(
      "div",
      { class: "keys" },
      kinds.map(([kind, text]) =>
        el(
          "span",
          { class: "entry" },
          symbol(GLYPHS[kind], TWO ? "neutral" : kind),
          `${text}: ${RUNS.map((run) => run.marks.filter((m) => m.kind === kind).length).join(" / ")}`,
        ),
      ),
    ),
    el(
      "p",
      { class: "intro" },
      `Point at a chart, or focus it and press the arrow keys: all charts show that step. ${Math.max(...per) > 1 ? `A point is the mean of ${Math.max(...per)} steps, the band their range. ` : ""}Lines over many points are running means.${trained ? "" : " SFT samples nothing: reward, KL, clip share, lengths and log-prob gap do not exist."}`,
    ),
    el("div", { class: "charts" }, figures.filter(Boolean)),
    el(
      "details",
      null,
      el("summary", null, `The ${plural(listed.length, "mark")} as a table`),
      table("Marks", [["step", "num"], ...(TWO ? [["run", ""]] : []), ["mark", ""], ["what", ""]], listed),
    ),
  );
}
