// Elements of the page. Texts of a document become text nodes and attributes, never HTML.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (value === undefined || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

const el = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

function countText(number) {
  for (const [unit, scale] of [["T", 1e12], ["G", 1e9], ["M", 1e6], ["k", 1e3]]) {
    if (number >= scale) return `${Number((number / scale).toPrecision(3))} ${unit}`;
  }
  return String(Math.round(number));
}

const sizeText = (bytes) => (bytes >= 1e3 ? `${countText(bytes)}B` : bytes ? `${bytes} B` : "0");

const AXES = ["pp", "dp_replicate", "dp_shard", "dp", "ep", "sp", "tp"];

// The colour of an axis, or of the first of merged ones (dp+sp, sp:inner2).
function axisColour(axis) {
  const first = axis.split(/[+:]/)[0];
  return AXES.includes(first) ? `var(--${first})` : "var(--ink)";
}

const axisName = (axis) => el("span", { class: "axis", style: `--axis: ${axisColour(axis)}` }, axis);

// Rows of [cells]; cells that are numbers are aligned to the right, those of sizes too.
function table(columns, rows, caption) {
  const cell = (tag, value, at, scope) =>
    el(tag, { class: columns[at].number ? "number" : undefined, scope }, value instanceof Node ? value : String(value));
  return el(
    "div", { class: "wide" },
    el(
      "table", {},
      caption ? el("caption", { class: "quiet" }, caption) : null,
      el("thead", {}, el("tr", {}, columns.map((column, at) => (column.name ? cell("th", column.name, at, "col") : el("td"))))),
      el("tbody", {}, rows.map((row) => el("tr", {}, row.map((value, at) => cell("td", value, at))))),
    ),
  );
}

// Ranks as people write them: 0, 1, 2 .. 63
function ranksText(ranks) {
  const runs = [];
  for (const rank of ranks) {
    const last = runs[runs.length - 1];
    if (last && rank === last[1] + 1) last[1] = rank;
    else runs.push([rank, rank]);
  }
  const texts = runs.map(([first, last]) => (first === last ? `${first}` : last === first + 1 ? `${first}, ${last}` : `${first}..${last}`));
  return texts.length > 12 ? `${texts.slice(0, 12).join(", ")}, ... (${ranks.length} in all)` : texts.join(", ");
}

let lastNumber = 0;
const freshId = (word) => `${word}${(lastNumber += 1)}`;

// Draws now and whenever the width of the element changes.
function drawnToWidth(host, draw) {
  let before = 0;
  new ResizeObserver(() => {
    const width = Math.floor(host.clientWidth);
    if (width && width !== before) {
      before = width;
      host.replaceChildren(draw(width));
    }
  }).observe(host);
  return host;
}
