// Puts the page together: sections, each for one report or for two beside each other, and the switch of colours.

const SECTIONS = [
  ["overview", "Overview", overviewSection],
  ["mesh", "Mesh", meshSection],
  ["parameters", "Parameters", modulesSection],
  ["block", "One block", blockSection],
  ["memory", "Memory", memorySection],
  ["traffic", "Traffic", trafficSection],
  ["pipeline", "Pipeline", pipelineSection],
  ["plan", "Plan", planSection],
  ["program", "Program", textSection],
];

function overviewSection(view) {
  const { report } = view;
  const most = view.largest;
  const byAxis = d3.rollups(report.traffic, (group) => d3.sum(group, (one) => one.bytes), (one) => one.axis).sort((one, other) => other[1] - one[1]);
  const fact = (name, value, more) => el("div", {}, el("dt", {}, name), el("dd", {}, value, more ? el("small", {}, more) : null));
  return [
    el("p", {}, el("strong", {}, report.model), ` on ${report.ranks} rank${report.ranks > 1 ? "s" : ""}: `, ...report.axes.flatMap((axis, at) => [at ? " × " : "", axisName(`${axis.name}`), ` = ${axis.size}`]), "."),
    el("dl", { class: "facts" },
      fact("parameters of a rank", sizeText(report.rank_parameter_bytes), `of ${sizeText(report.parameter_bytes)} that the model has`),
      most ? fact("most memory of a rank", sizeText(most.peak), `${most.ranks}, with ${report.optimizer}${report.device ? (report.device.needed > report.device.bytes ? `; does not fit ${sizeText(report.device.bytes)}` : `; fits ${sizeText(report.device.bytes)}`) : ""}`) : null,
      fact("most sent by a rank in a step", sizeText(view.mostSent), byAxis.length && byAxis[0][1] ? `most over ${byAxis[0][0]}` : "nothing"),
      report.pipeline ? fact("bubble", percent(report.pipeline.bubble), `${report.pipeline.schedule}, ${report.pipeline.microbatches} microbatches`) : null),
    el("ul", {}, report.axes.filter((axis) => axis.size > 1).map((axis) => el("li", {}, axisName(axis.name), `: ${axis.about}.`))),
  ];
}

function planSection(view) {
  const { choices, passes, reasons } = view.report;
  const row = (one) => [el("span", { class: "name" }, one.name), one.value, one.usual, one.about];
  const columns = [{ name: "choice" }, { name: "value" }, { name: "usual" }, { name: "what it does" }];
  const [made, rest] = [choices.filter((one) => one.value !== one.usual), choices.filter((one) => one.value === one.usual)];
  return [
    made.length ? table(columns, made.map(row), "Chosen") : el("p", {}, "All choices are the usual ones."),
    reasons.length ? el("h3", {}, "Why parameters are split as they are") : null,
    reasons.length ? table([{ name: "axis" }, { name: "chosen" }, { name: "for" }, { name: "instead" }],
      reasons.map((one) => [axisName(one.axis), one.chosen, one.names.join(", "), one.instead])) : null,
    el("p", { class: "quiet" }, "Costs are estimates for a step. Why one parameter or a call is laid out as it is, and what else would cost: open it in Parameters, or choose it in the graph of a block."),
    el("details", {}, el("summary", {}, `${rest.length} choices with their usual values`), table(columns, rest.map(row))),
    el("details", {}, el("summary", {}, `the ${passes.length} passes that made this program`), el("p", {}, passes.join(" → "))),
  ];
}

function compared(views) {
  const facts = (view) => ({
    mesh: view.report.mesh, ranks: view.report.ranks, "parameters of a rank": sizeText(view.report.rank_parameter_bytes), "most memory of a rank": sizeText(view.largest?.peak ?? 0),
    "most sent by a rank in a step": sizeText(view.mostSent), bubble: view.report.pipeline ? percent(view.report.pipeline.bubble) : "no pipeline",
    ...Object.fromEntries(view.report.choices.map((one) => [one.name, one.value])),
  });
  const [one, other] = views.map(facts);
  const usual = ["mesh", "parameters of a rank", "most memory of a rank", "most sent by a rank in a step", "bubble"];
  const names = Object.keys(one).filter((name) => usual.includes(name) || one[name] !== other[name]);
  return table([{ name: "" }, { name: "first" }, { name: "second" }], names.map((name) => [name, one[name], other[name]]));
}

function section(views, [id, title, body], differences) {
  const sides = views.map((view, at) => el("div", { class: "side" }, views.length > 1 ? el("h3", {}, `${at ? "second" : "first"}: ${view.report.mesh}`) : null, ...body(view).filter(Boolean)));
  const before = id === "overview" && views.length > 1
    ? [compared(views), el("details", {}, el("summary", {}, "all differences"), el("pre", {}, differences || "none"))] : [];
  return el("section", { id, "aria-labelledby": `${id}-title` }, el("h2", { id: `${id}-title` }, title), ...before, el("div", { class: "sides" }, ...sides));
}

const THEMES = { auto: "◐ colours: auto", light: "☀ colours: light", dark: "☾ colours: dark" };

function themed(button) {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let theme = "auto";
  const apply = () => {
    document.documentElement.dataset.theme = theme === "auto" ? (dark.matches ? "dark" : "light") : theme;
    button.textContent = THEMES[theme];
  };
  dark.addEventListener("change", apply);
  button.addEventListener("click", () => {
    const names = Object.keys(THEMES);
    theme = names[(names.indexOf(theme) + 1) % names.length];
    apply();
  });
  apply();
}

function start() {
  const { reports, differences } = JSON.parse(document.getElementById("document").textContent);
  const views = reports.map((report) => new View(report));
  const main = document.getElementById("main");
  themed(document.getElementById("theme"));
  main.classList.toggle("two", views.length > 1);
  const wanted = SECTIONS.filter(([id]) => id !== "pipeline" || reports.some((report) => report.pipeline));
  document.getElementById("sections").append(...wanted.map(([id, title]) => el("a", { href: `#${id}` }, title)));
  main.replaceChildren();
  for (const entry of wanted) main.append(section(views, entry, differences));
  document.documentElement.dataset.ready = "yes";
}

start();
