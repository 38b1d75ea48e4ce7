// The mesh: its ranks as a grid of buttons, and with whom the chosen one communicates.

const MOST_RANKS = 512;

function meshSection(view) {
  const { report } = view;
  const near = el("ul", { "aria-live": "polite" });
  const number = el("input", { type: "number", min: 0, max: report.ranks - 1, value: 0, "aria-label": "Rank",
    oninput: (event) => event.target.value !== "" && view.choose(Number(event.target.value)) });
  const panels = el("div", { class: "panels", role: "group", "aria-label": "Ranks; arrow keys go to neighbours" });
  const [shown, inner] = panelsOf(report);
  const buttons = new Map();
  for (const outer of shown) panels.append(panelOf(view, outer, inner, buttons));
  panels.addEventListener("keydown", (event) => walk(view, inner, buttons, event));
  view.onRank((here, rank) => {
    number.value = rank;
    for (const [other, button] of buttons) markRank(view, here, rank, other, button);
    near.replaceChildren(...report.axes.map((axis) => neighbours(view, axis, here)));
  });
  const left = report.ranks - buttons.size;
  return [
    el("p", { class: "quiet" }, "Choose a rank: its parts of the parameters are dark further down, and the ranks it communicates with have a coloured border."),
    el("div", { class: "tools" }, el("label", {}, "rank ", number), ` of ${report.ranks}`),
    panels,
    left > 0 ? el("p", { class: "quiet" }, `${left} more ranks are arranged in the same way; type the number of one.`) : null,
    near,
  ];
}

// What is drawn: coordinates on outer axes, and the (at most two) inner axes that make a panel.
function panelsOf(report) {
  const axes = report.axes.filter((axis) => axis.size > 1);
  const inner = axes.slice(-2);
  let outer = [{}];
  for (const axis of axes.slice(0, -2)) {
    outer = outer.flatMap((here) => Array.from({ length: axis.size }, (_, at) => ({ ...here, [axis.name]: at })));
  }
  const each = inner.reduce((product, axis) => product * axis.size, 1);
  return [outer.slice(0, Math.max(1, Math.floor(MOST_RANKS / each))), inner];
}

function panelOf(view, outer, inner, buttons) {
  const columns = inner[inner.length - 1] ?? { name: "", size: 1 };
  const rows = inner.length > 1 ? inner[0] : { name: "", size: 1 };
  const head = el("tr", {}, el("td"), Array.from({ length: Math.min(columns.size, MOST_RANKS) }, (_, at) =>
    (columns.name ? el("th", { scope: "col" }, `${columns.name} ${at}`) : el("td"))));
  const body = Array.from({ length: Math.min(rows.size, Math.ceil(MOST_RANKS / columns.size)) }, (_, row) =>
    el("tr", {}, rows.name ? el("th", { scope: "row" }, `${rows.name} ${row}`) : el("td"),
      Array.from({ length: Math.min(columns.size, MOST_RANKS) }, (_, column) => {
        const here = { ...outer, [rows.name]: row, [columns.name]: column };
        const rank = view.numberOf(here);
        const where = view.report.axes.map((axis) => `${axis.name} ${here[axis.name] ?? 0}`).join(", ");
        const button = el("button", { type: "button", class: "rank", title: where, "aria-label": `rank ${rank}: ${where}`,
          onclick: () => view.choose(rank) }, String(rank));
        buttons.set(rank, button);
        return el("td", {}, button);
      })));
  const title = Object.entries(outer).map(([axis, at]) => `${axis} ${at}`).join(", ");
  return el("div", { class: "panel" }, title ? el("strong", {}, title) : null, el("table", {}, head, body));
}

function markRank(view, here, rank, other, button) {
  const there = view.coordinates(other);
  const differ = view.report.axes.filter((axis) => here[axis.name] !== there[axis.name]);
  button.setAttribute("aria-pressed", other === rank);
  button.tabIndex = other === rank ? 0 : -1;
  button.classList.toggle("near", differ.length === 1);
  if (differ.length === 1) button.style.setProperty("--axis", axisColour(differ[0].name));
}

function neighbours(view, axis, here) {
  const group = Array.from({ length: axis.size }, (_, at) => view.numberOf({ ...here, [axis.name]: at }));
  return el("li", {}, axisName(axis.name), ` = ${axis.size}: ${axis.about}. `,
    axis.size > 1 ? `Rank ${view.rank} is in a group with ${ranksText(group)}; ${axis.count} such groups.` : "One rank: nothing is split.");
}

function walk(view, inner, buttons, event) {
  const axis = { ArrowLeft: inner[inner.length - 1], ArrowRight: inner[inner.length - 1], ArrowUp: inner[inner.length - 2], ArrowDown: inner[inner.length - 2] }[event.key];
  if (!axis) return;
  event.preventDefault();
  const here = view.coordinates(view.rank);
  const at = here[axis.name] + (event.key === "ArrowLeft" || event.key === "ArrowUp" ? -1 : 1);
  if (at < 0 || at >= axis.size) return;
  view.choose(view.numberOf({ ...here, [axis.name]: at }));
  buttons.get(view.rank)?.focus();
}
