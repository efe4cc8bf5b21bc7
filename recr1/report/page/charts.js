// Small line charts over the steps that share one cursor. Drawn anew at every width, so that text keeps its size.
const HEIGHT = 196,
  LEFT = 46,
  RIGHT = 10,
  TOP_ROOM = 8,
  BOTTOM = 36;
const GLYPHS = { evaluation: "triangle", frac_reward_zero_std: "diamond", clip_spike: "circle", skipped: "cross" };
const cursor = {
  step: null,
  charts: [],
  set(step) {
    this.step = step;
    for (const draw of this.charts) draw(step);
  },
};

function ticks(low, high, count) {
  const rough = (high - low) / count || 1,
    base = 10 ** Math.floor(Math.log10(rough));
  const step = base * [1, 2, 5, 10].find((m) => m * base >= rough - 1e-12),
    out = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) out.push(i * step);
  return out;
}

function smoothed(values, half) {
  return values.map((_, i) => {
    const near = values.slice(Math.max(0, i - half), i + half + 1).filter(known);
    return near.length ? near.reduce((a, b) => a + b, 0) / near.length : null;
  });
}

function linePath(xs, ys) {
  let path = "",
    down = false;
  ys.forEach((y, i) => {
    if (!known(y)) {
      down = false;
      return;
    }
    path += `${down ? "L" : "M"}${xs[i].toFixed(1)} ${y.toFixed(1)}`;
    down = true;
  });
  return path;
}

function glyph(shape, x, y, r, attributes) {
  if (shape === "circle") return svg("circle", { cx: x, cy: y, r, ...attributes });
  if (shape === "square") return svg("rect", { x: x - r, y: y - r, width: 2 * r, height: 2 * r, ...attributes });
  const d = {
    triangle: `M${x} ${y - r}L${x + r} ${y + r}H${x - r}Z`,
    diamond: `M${x} ${y - r}L${x + r} ${y}L${x} ${y + r}L${x - r} ${y}Z`,
    cross: `M${x - r} ${y - r}L${x + r} ${y + r}M${x - r} ${y + r}L${x + r} ${y - r}`,
  }[shape];
  return svg("path", { d, ...attributes });
}

function symbol(shape, tone) {
  return svg(
    "svg",
    { width: 12, height: 12, viewBox: "0 0 12 12", class: "symbol", "aria-hidden": "true" },
    glyph(shape, 6, 6, 4, { class: `mark ${tone}` }),
  );
}

// The y axis: value -> pixel, ticks, format. A logarithmic one has a row for 0 below its decades.
function axis(spec, bottom) {
  const all = spec.series
    .flatMap((s) => [...s.y, ...(s.low || []), ...(s.high || [])])
    .concat((spec.points || []).flatMap((p) => [...p.y, ...(p.low || []), ...(p.high || [])]))
    .filter(known);
  const room = bottom - TOP_ROOM;
  if (spec.log) {
    const positive = all.filter((v) => v > 0),
      zero = all.some((v) => v <= 0);
    const low = positive.length ? Math.floor(Math.log10(Math.min(...positive))) : -1,
      high = positive.length ? Math.ceil(Math.log10(Math.max(...positive)) + 1e-9) : 0;
    const floor = zero ? bottom - 14 : bottom,
      top = Math.max(high, low + 1),
      every = Math.ceil((top - low) / 5),
      decades = [];
    for (let d = low; d <= top; d += every) decades.push(10 ** d);
    return {
      y: (v) => (v > 0 ? floor - ((Math.log10(v) - low) / (top - low)) * (floor - TOP_ROOM) : bottom),
      ticks: zero ? [0, ...decades] : decades,
      text: (v) => (v ? "1e" + Math.round(Math.log10(v)) : "0"),
    };
  }
  let low = Math.min(...all),
    high = Math.max(...all);
  if (spec.zero) {
    low = Math.min(low, 0);
    high = Math.min(Math.max(high, 0), spec.top ?? Infinity);
  }
  if (high - low < 1e-12) {
    high = high > 0 || !spec.zero ? high + Math.max(1e-3, Math.abs(high) * 0.1) : spec.share ? 0.1 : 1;
    if (!spec.zero) low -= Math.max(1e-3, Math.abs(low) * 0.1);
  }
  const pad = (high - low) * 0.06,
    least = spec.zero && low === 0 ? 0 : low - pad,
    most = high + pad,
    marks = ticks(least, most, 4);
  const digits = Math.max(0, -Math.floor(Math.log10((marks[1] ?? 1) - marks[0] || 1) + 1e-9));
  return {
    y: (v) => bottom - ((v - least) / (most - least)) * room,
    ticks: marks,
    text: (v) =>
      spec.share
        ? Number((100 * v).toFixed(4)) + "%"
        : Math.abs(v) >= 1e4 || (digits > 4 && v)
          ? v.toExponential(1).replace("e+", "e")
          : v.toFixed(digits),
  };
}

// spec: {title, unit, series: [{name, tone, x, y, low, high, dash, thin}], points: [{name, tone, shape, x, y, low, high}], marks: [{kind, step, text, tone}],
//        last, zero, share, log, stack, note, text(value)}
function chart(spec) {
  const figure = el("figure", { class: "chart" }),
    legend = el("div", { class: "legend" });
  figure.append(el("figcaption", null, el("b", null, spec.title), el("span", { class: "unit" }, spec.unit)), legend);
  if (spec.empty) {
    figure.append(el("p", { class: "empty" }, spec.empty));
    return figure;
  }
  const text = spec.text || (spec.share ? percent : (v) => number(v));
  const named = [...spec.series.filter((s) => !s.quiet), ...(spec.points || [])],
    entries = named.map((s) => {
      const value = el("span", { class: "value" });
      legend.append(
        el(
          "span",
          { class: "entry" },
          s.shape ? symbol(s.shape, s.tone) : el("i", { class: `swatch ${s.tone}${s.dash ? " dash" : ""}${spec.stack ? " full" : ""}` }),
          s.name,
          " ",
          value,
        ),
      );
      return value;
    });
  const label =
    `${spec.title}, ${spec.unit}. ` +
    named.map((s) => `${s.name}: first ${text(s.y.find(known))}, last ${text(s.y.findLast(known))}`).join("; ");
  const root = svg("svg", { class: "plot", height: HEIGHT, tabindex: 0, role: "img", "aria-label": label });
  figure.append(root);
  if (spec.note) figure.append(el("p", { class: "small" }, spec.note));
  const steps = [...new Set([...spec.series, ...(spec.points || [])].flatMap((s) => s.x))].sort((a, b) => a - b);
  let x = () => 0,
    line = null;

  function draw() {
    const width = Math.max(220, root.clientWidth || 360),
      bottom = HEIGHT - BOTTOM,
      right = width - RIGHT,
      first = Math.min(1, steps[0]);
    const vertical = axis(spec, bottom);
    x = (step) => LEFT + ((step - first) / Math.max(1, spec.last - first)) * (right - LEFT);
    root.replaceChildren();
    root.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    for (const tick of vertical.ticks) {
      const y = vertical.y(tick);
      if (y < TOP_ROOM - 1 || y > bottom + 1) continue;
      root.append(
        svg("line", { x1: LEFT, x2: right, y1: y, y2: y, class: tick === 0 ? "grid zero" : "grid" }),
        svg("text", { x: LEFT - 6, y: y + 3.5, class: "tick end" }, vertical.text(tick)),
      );
    }
    const across = ticks(first, spec.last, width > 420 ? 6 : 4).filter((t) => Number.isInteger(t) && x(t) > LEFT + 8);
    for (const tick of across)
      root.append(svg("text", { x: Math.min(x(tick), right - 12), y: HEIGHT - 6, class: "tick middle" }, tick.toLocaleString("en-US")));
    root.append(
      svg("line", { x1: LEFT, x2: right, y1: bottom, y2: bottom, class: "base" }),
      svg("text", { x: LEFT - 6, y: HEIGHT - 6, class: "tick end" }, "step"),
    );
    for (const mark of spec.marks || [])
      if (mark.kind !== "evaluation")
        root.append(svg("line", { x1: x(mark.step), x2: x(mark.step), y1: TOP_ROOM, y2: bottom, class: `rule ${mark.kind}` }));
    if (spec.stack) stacked(vertical);
    else
      for (const s of spec.series) {
        const xs = s.x.map(x),
          place = (values) => values.map((v) => (known(v) ? vertical.y(v) : null));
        if (s.low && !spec.log) {
          const points = s.low.map((v, i) => [xs[i], v, s.high[i]]).filter((p) => known(p[1]));
          root.append(
            svg("path", {
              class: `band ${s.tone}`,
              d: `M${points.map((p) => `${p[0].toFixed(1)} ${vertical.y(p[2]).toFixed(1)}`).join("L")}L${points
                .reverse()
                .map((p) => `${p[0].toFixed(1)} ${vertical.y(p[1]).toFixed(1)}`)
                .join("L")}Z`,
            }),
          );
        }
        const half = s.y.length > 60 && !spec.log ? Math.round(s.y.length / 60) : 0;
        if (half && !s.low) root.append(svg("path", { class: `line faint ${s.tone}`, d: linePath(xs, place(s.y)) }));
        if (spec.log)
          s.y.forEach((v, i) => known(v) && root.append(glyph("circle", xs[i], vertical.y(v), 1.6, { class: `dot ${s.tone}` })));
        else
          root.append(
            svg("path", { class: `line ${s.tone}${s.dash ? " dash" : ""}`, d: linePath(xs, place(half ? smoothed(s.y, half) : s.y)) }),
          );
      }
    for (const p of spec.points || [])
      p.x.forEach((step, i) => {
        if (!known(p.y[i])) return;
        if (p.low)
          root.append(
            svg("line", { x1: x(step), x2: x(step), y1: vertical.y(p.low[i]), y2: vertical.y(p.high[i]), class: `whisker ${p.tone}` }),
          );
        root.append(glyph(p.shape, x(step), vertical.y(p.y[i]), 3.6, { class: `mark ${p.tone}` }));
      });
    for (const mark of spec.marks || []) {
      const node = glyph(GLYPHS[mark.kind], x(mark.step), bottom + 9 + 4 * (mark.row || 0), TWO ? 3 : 3.6, {
        class: `mark ${mark.tone || mark.kind}`,
      });
      node.append(svg("title", null, `step ${mark.step}: ${mark.text}`));
      root.append(node);
    }
    line = svg("line", { y1: TOP_ROOM, y2: bottom, class: "cursor", visibility: "hidden" });
    root.append(line);
    follow(cursor.step);
  }

  function stacked(vertical) {
    const xs = spec.series[0].x.map(x);
    let under = xs.map(() => 0);
    for (const s of spec.series) {
      const over = under.map((v, i) => v + (s.part[i] || 0));
      const edge = (values) => values.map((v, i) => `${xs[i].toFixed(1)} ${Math.max(TOP_ROOM, vertical.y(v)).toFixed(1)}`);
      root.append(svg("path", { class: `area ${s.tone}`, d: `M${edge(over).join("L")}L${edge(under).reverse().join("L")}Z` }));
      under = over;
    }
  }

  function nearest(list, step) {
    return list.reduce((best, v, i) => (Math.abs(v - step) < Math.abs(list[best] - step) ? i : best), 0);
  }

  function follow(step) {
    const at = known(step) ? steps[nearest(steps, step)] : null;
    if (line && known(at)) {
      line.setAttribute("x1", x(at));
      line.setAttribute("x2", x(at));
    }
    if (line) line.setAttribute("visibility", known(at) ? "visible" : "hidden");
    named.forEach((s, k) => {
      const values = s.part || s.y,
        i = known(at) ? nearest(s.x, at) : values.findLastIndex(known);
      entries[k].textContent = text(values[i]) + (s.low && s.shape && known(s.low[i]) ? ` [${text(s.low[i])}, ${text(s.high[i])}]` : "");
    });
  }

  root.addEventListener("pointermove", (event) => {
    const box = root.getBoundingClientRect(),
      step = steps.reduce(
        (best, s) => (Math.abs(x(s) - (event.clientX - box.left)) < Math.abs(x(best) - (event.clientX - box.left)) ? s : best),
        steps[0],
      );
    cursor.set(step);
  });
  root.addEventListener("pointerleave", () => cursor.set(null));
  root.addEventListener("blur", () => cursor.set(null));
  root.addEventListener("keydown", (event) => {
    const at = known(cursor.step) ? nearest(steps, cursor.step) : steps.length - 1;
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, PageUp: at + 20, PageDown: at - 20, Home: 0, End: steps.length - 1, Escape: null }[
      event.key
    ];
    if (to === undefined) return;
    event.preventDefault();
    cursor.set(to === null ? null : steps[Math.max(0, Math.min(steps.length - 1, to))]);
  });
  cursor.charts.push(follow);
  new ResizeObserver(draw).observe(root);
  return figure;
}
