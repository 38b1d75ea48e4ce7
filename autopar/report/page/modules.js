// The tree of modules: each parameter as a rectangle, cut as the axes cut it; dark is what the chosen rank holds.

const WIDEST = 112, HIGHEST = 56, LEAST = 8;

function modulesSection(view) {
  const { report } = view;
  const tree = el("div", {}, moduleEntry(view, report.modules, 0));
  const count = el("span", { class: "quiet", role: "status" });
  const search = el("input", { type: "search", placeholder: "find a parameter, e.g. q.weight", "aria-label": "Find a parameter",
    oninput: () => { count.textContent = filterTree(tree, search.value.trim().toLowerCase()); } });
  const open = (value) => () => tree.querySelectorAll("details.module").forEach((one) => { one.open = value; });
  return [
    el("p", { class: "quiet" }, "A rectangle is the whole tensor; lines are where axes cut it. Dark is the part that the chosen rank holds; dashed: another pipeline rank has it. Open one for the reasons."),
    el("div", { class: "tools" }, search, count,
      el("button", { type: "button", onclick: open(true) }, "Open all"), el("button", { type: "button", onclick: open(false) }, "Close all")),
    tree,
  ];
}

// A module that has nothing but a weight, or a weight and a bias, is written in front of their names.
const isLeaf = (module) => module.times === 1 && !module.children.length && module.parameters.length <= 2;

function moduleEntry(view, module, depth) {
  if (depth && isLeaf(module)) return module.parameters.map((one) => parameterEntry(view, one, `${module.name}.`));
  const own = module.parameters.filter((one) => !one.buffer).concat(module.parameters.filter((one) => one.buffer));
  const times = module.times > 1 ? [" ", el("span", { class: "times" }, `${module.times} ×`)] : [];
  const name = el("span", { class: "name" }, module.name || view.report.model || "model");
  const size = el("span", { class: "quiet" }, ` ${sizeText(module.bytes)}${whereText(view, module)}`);
  const children = module.children.flatMap((child) => moduleEntry(view, child, depth + 1));
  return el("details", { class: "module", open: depth < 5, "data-path": module.path },
    el("summary", {}, name, ...times, size), ...own.map((one) => parameterEntry(view, one)), ...children);
}

function whereText(view, module) {
  const places = view.report.axes.find((axis) => axis.name === "pp")?.size ?? 1;
  if (places === 1 || !module.where.length) return "";
  const texts = module.where.map((one) => `${one.first === one.last ? one.first : `${one.first}..${one.last}`} on pp ${one.places.join(", ")}`);
  return `; ${texts.join("; ")}`;
}

function parameterEntry(view, parameter, before = "") {
  const drawing = view.report.drawings[parameter.drawing];
  const picture = rectangle(view, parameter, drawing);
  const body = el("div", {});
  const entry = el("details", { class: "parameter", "data-name": [parameter.target, ...parameter.aliases].join(" ").toLowerCase() },
    el("summary", {}, picture, el("span", {},
      el("span", { class: "name" }, before + parameter.name), parameter.buffer ? " (buffer) " : " ",
      `[${drawing.shape.join(", ")}] ${drawing.dtype} `, el("br"), el("span", { class: "quiet" }, splitText(view, parameter, drawing)))), body);
  entry.addEventListener("toggle", () => { if (entry.open && !body.childElementCount) body.append(...detailsOf(view, parameter, drawing)); });
  return entry;
}

const SIDES = ["by rows", "by columns"];
const sideName = (drawing, side) => (drawing.shape.length === 2 ? SIDES[side.dim] : drawing.shape.length === 1 ? "by elements" : `by dim ${side.dim}`);

// "split by rows over tp; 9.2 kB of 18.4 kB on each rank".
function splitText(view, parameter, drawing) {
  const cuts = drawing.dims.filter((side) => side.axes.length).map((side) => `${sideName(drawing, side)} over ${side.axes.join(" and ")}`);
  const parts = [cuts.length ? `split ${cuts.join(", ")}: a rank holds ${sizeText(drawing.rank_bytes)} of ${sizeText(drawing.bytes)}` : `whole, ${sizeText(drawing.bytes)}`];
  const places = view.report.axes.find((axis) => axis.name === "pp")?.size ?? 1;
  if (parameter.places.length < places) parts.push(`on pp ${parameter.places.join(", ")} of ${places}`);
  if (parameter.aliases.length) parts.push(`the same as ${parameter.aliases.join(", ")}`);
  return parts.join("; ");
}

// Sides in pixels: roots of the sizes, so that a narrow matrix looks narrow and is still seen.
function pixelsOf(drawing) {
  const sizes = drawing.dims.map((side) => Math.sqrt(Math.max(1, side.size)));
  const [rows, columns] = drawing.dims.length > 1 ? sizes : [0, sizes[0] ?? 0];
  const scale = Math.min(WIDEST / Math.max(columns, 1), HIGHEST / Math.max(rows, 1));
  return [Math.max(LEAST, rows * scale), Math.max(LEAST, columns * scale)];
}

const WHOLE_SIDE = { size: 1, axes: [], segments: [{ start: 0, stop: 1, owners: [[]] }], left_out: 0 };

function rectangle(view, parameter, drawing) {
  const [height, width] = pixelsOf(drawing);
  const [rows, columns] = [WHOLE_SIDE, WHOLE_SIDE, ...drawing.dims].slice(-2);
  const picture = svg("svg", { width: width + 2, height: height + 2, role: "img", "aria-label": `${parameter.target}: ${splitText(view, parameter, drawing)}` });
  const cells = [];
  for (const row of rows.segments) {
    for (const column of columns.segments) {
      const cell = svg("rect", {
        class: "cell", x: 1 + (width * column.start) / Math.max(1, columns.size), y: 1 + (height * row.start) / Math.max(1, rows.size),
        width: (width * (column.stop - column.start)) / Math.max(1, columns.size), height: (height * (row.stop - row.start)) / Math.max(1, rows.size),
      });
      cells.push([cell, row, column]);
      picture.append(cell);
    }
  }
  picture.append(svg("rect", { class: "frame", x: 1, y: 1, width, height }));
  view.onRank((here) => {
    picture.classList.toggle("absent", "pp" in here && !parameter.places.includes(here.pp));
    for (const [cell, row, column] of cells) cell.classList.toggle("held", owns(rows, row, here) && owns(columns, column, here));
  });
  return picture;
}

const owns = (side, segment, here) => segment.owners.some((owner) => owner.every((position, at) => here[side.axes[at]] === position));

function detailsOf(view, parameter, drawing) {
  const { report } = view;
  const rest = report.axes.filter((axis) => axis.name !== "pp" && axis.size > 1 && !drawing.axes.includes(axis.name));
  const copied = rest.length ? `Ranks along ${rest.map((axis) => axis.name).join(", ")} hold the same.` : "";
  const rows = drawing.dims.filter((side) => side.axes.length).flatMap((side) => side.segments.slice(0, 16).map((segment) => [
    sideName(drawing, side).replace("by ", ""), `${segment.start} to ${segment.stop - 1}`,
    segment.owners.slice(0, 4).map((owner) => owner.map((position, at) => `${side.axes[at]} ${position}`).join(", ")).join("; "),
  ]));
  return [
    el("p", { class: "quiet" }, `${parameter.target}: a rank holds [${drawing.local_shape.join(", ")}]. ${copied}`),
    rows.length ? table([{ name: "" }, { name: "indices" }, { name: "ranks at" }], rows) : null,
    parameter.reasons.length ? el("pre", { class: "reasons" }, parameter.reasons.join("\n")) : null,
  ].filter(Boolean);
}

// Hides what does not match; gives a sentence.
function filterTree(tree, wanted) {
  const parameters = [...tree.querySelectorAll("details.parameter")];
  const fits = new Set(parameters.filter((one) => !wanted || one.dataset.name.includes(wanted)));
  for (const one of parameters) one.classList.toggle("hidden", !fits.has(one));
  for (const module of tree.querySelectorAll("details.module")) {
    const some = [...module.querySelectorAll("details.parameter")].some((one) => fits.has(one));
    module.classList.toggle("hidden", Boolean(wanted) && !some);
    if (wanted && some) module.open = true;
  }
  return wanted ? `${fits.size} of ${parameters.length} parameters` : "";
}
