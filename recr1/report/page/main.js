// The page: head, navigation, sections.
(function () {
  const sections = [
    ["overview", TWO ? "Comparison" : "Overview", overviewSection],
    ["curves", "Curves", curvesSection],
    ["rollouts", "Rollouts", rolloutsSection],
    ["recommendations", "Recommendations", rankingSection],
    ["audit", "Audit", auditSection],
    ["groups", "Groups", groupsSection],
    ["configuration", "Configuration", configurationSection],
  ];
  const themes = ["auto", "light", "dark"], system = matchMedia("(prefers-color-scheme: dark)");
  let theme = "auto";
  const paint = () => document.documentElement.toggleAttribute("data-dark", theme === "dark" || (theme === "auto" && system.matches));
  system.addEventListener("change", paint);
  paint();
  document.getElementById("top").append(
    el(
      "div",
      { class: "title" },
      el("p", { class: "label" }, "recr1 report"),
      TWO
        ? RUNS.map((run, k) => el("h1", null, el("i", { class: `swatch full ${TONES[k]}` }), `${LETTERS[k]} · ${run.name}`))
        : el("h1", null, RUNS[0].name),
      RUNS.map((run, k) => el("p", { class: "meta" }, (TWO ? LETTERS[k] + ": " : "") + headline(run))),
      el("p", { class: "meta" }, `made ${data.made}`),
    ),
    choice("Colours", themes, 0, (i) => {
      theme = themes[i];
      paint();
    }),
  );
  const nav = el(
    "nav",
    { "aria-label": "Sections" },
    sections.map(([id, name]) => el("a", { href: "#" + id }, name)),
  );
  document.getElementById("top").after(nav);
  document.getElementById("content").append(...sections.map(([, , build]) => build()));
  const links = new Map([...nav.children].map((a) => [a.getAttribute("href").slice(1), a])),
    seen = new Set();
  const watch = new IntersectionObserver(
    (entries) => {
      for (const e of entries) e.isIntersecting ? seen.add(e.target.id) : seen.delete(e.target.id);
      const now = sections.find(([id]) => seen.has(id));
      for (const [id, a] of links) a.toggleAttribute("aria-current", Boolean(now) && id === now[0]);
    },
    { rootMargin: "-20% 0px -60% 0px" },
  );
  for (const s of document.querySelectorAll("section")) watch.observe(s);
  document.documentElement.dataset.ready = "yes";
})();
