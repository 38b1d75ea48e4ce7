// One block of the model as a graph, laid out by dagre; collectives have the colour of their axis.

function blockSection(view) {
  const { blocks } = view.report;
  if (!blocks.length) return [el("p", { class: "quiet" }, "The program computes nothing.")];
  const select = el("select", { "aria-label": "Block", onchange: () => draw() },
    blocks.map((block, at) => el("option", { value: at }, blockName(block))));
  const views = el("input", { type: "checkbox", onchange: () => draw() });
  const graph = el("div", { class: "graph", tabindex: 0, role: "group", "aria-label": "Graph of the block" });
  const chosen = el("div", { class: "chosen", "aria-live": "polite" });
  const draw = () => {
    const block = blocks[Number(select.value)];
    graph.replaceChildren(graphOf(block, views.checked, (call) => chosen.replaceChildren(...callDetails(call))));
    graph.scrollLeft = (graph.scrollWidth - graph.clientWidth) / 2;
    chosen.replaceChildren(el("span", { class: "quiet" }, block.left_out ? `${block.left_out} more calls are not drawn. ` : "", "Choose a call to see where it comes from."));
  };
  draw();
  return [
    el("p", { class: "quiet" }, "What one rank computes in forward, from top to bottom. Filled: data is sent in forward. Dashed in the colour of an axis: nothing is sent in forward, but gradients are in backward."),
    el("div", { class: "tools" }, el("label", {}, "block ", select), el("label", {}, views, " with views (reshapes, which cost nothing)"), legendOfAxes(view)),
    graph, chosen,
  ];
}

function blockName(block) {
  const name = block.name || "the model itself";
  const last = block.copies[block.copies.length - 1];
  return block.copies.length > 1 ? `${name} .. ${last} (${block.copies.length} alike)` : name;
}

function legendOfAxes(view) {
  return el("ul", { class: "legend" }, view.report.axes.filter((axis) => axis.size > 1).map((axis) =>
    el("li", {}, el("i", { style: `--c: ${axisColour(axis.name)}` }), axis.name)));
}

// The edges between shown calls: those that are left out pass on what they take.
function shownEdges(block, shown) {
  const sources = new Map();
  for (const [from, to] of block.edges) sources.set(to, [...(sources.get(to) ?? []), from]);
  const through = (at, seen) => (sources.get(at) ?? []).flatMap((from) => {
    if (seen.has(from)) return [];
    seen.add(from);
    return shown.has(from) ? [from] : through(from, seen);
  });
  return [...shown].flatMap((to) => [...new Set(through(to, new Set()))].map((from) => [from, to]));
}

function linesOf(call) {
  const short = call.label.replace(/^(aten|comm|op|autopar)\./, "").replace(/\.(default|Tensor|Scalar|dim|int)$/, "");
  const weight = call.parameters[0]?.split(",")[0].split(".").slice(-2).join(".");
  if (call.kind === "collective") return [`${short} over ${call.axis}`, (weight ? `${weight} ` : "") + sizeText(call.sent_bytes) + (call.backward_bytes ? `; backward ${sizeText(call.backward_bytes)}` : "")];
  if (call.kind === "entrance") return [`backward: ${call.backward} over ${call.axis}`, sizeText(call.backward_bytes)];
  if (call.kind === "input" || call.kind === "output") return [call.label, call.module];
  return [short, weight ?? call.types];
}

const shortened = (text, most = 34) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);

function graphOf(block, withViews, choose) {
  const shown = new Set(block.calls.keys());
  if (!withViews) block.calls.forEach((call, at) => { if (call.kind === "view") shown.delete(at); });
  const graph = new dagre.graphlib.Graph().setGraph({ rankdir: "TB", nodesep: 18, ranksep: 26, marginx: 12, marginy: 12 }).setDefaultEdgeLabel(() => ({}));
  for (const at of shown) {
    const lines = linesOf(block.calls[at]).map((line) => shortened(line));
    graph.setNode(String(at), { lines, width: Math.max(70, 7 * Math.max(...lines.map((line) => line.length)) + 16), height: 38 });
  }
  for (const [from, to] of shownEdges(block, shown)) graph.setEdge(String(from), String(to));
  dagre.layout(graph);
  const [left, top, width, height] = boxOf(graph);
  const marker = freshId("arrow");
  const picture = svg("svg", { width, height, viewBox: `${left} ${top} ${width} ${height}`, role: "group", "aria-label": `Graph of ${block.name || "the model"}` },
    svg("defs", {}, svg("marker", { id: marker, viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 7, markerHeight: 7, orient: "auto" }, svg("path", { class: "arrow", d: "M0,0 L8,4 L0,8 z" }))));
  const path = d3.line((point) => point.x, (point) => point.y).curve(d3.curveBasis);
  for (const edge of graph.edges()) picture.append(svg("path", { class: "edge", d: path(graph.edge(edge).points), "marker-end": `url(#${marker})` }));
  for (const at of shown) picture.append(callBox(block.calls[at], graph.node(String(at)), picture, choose));
  return picture;
}

// Left, top, width and height of all calls and edges, with a margin.
function boxOf(graph) {
  const places = graph.nodes().map((name) => graph.node(name));
  const corners = places.flatMap(({ x, y, width, height }) => [{ x: x - width / 2, y: y - height / 2 }, { x: x + width / 2, y: y + height / 2 }]);
  const points = [...corners, ...graph.edges().flatMap((edge) => graph.edge(edge).points)];
  const [left, right] = d3.extent(points, (point) => point.x), [top, bottom] = d3.extent(points, (point) => point.y);
  return [left - 12, top - 12, right - left + 24, bottom - top + 24];
}

function callBox(call, place, picture, choose) {
  const [title, below] = place.lines;
  const pick = () => {
    picture.querySelectorAll('[aria-pressed="true"]').forEach((one) => one.setAttribute("aria-pressed", "false"));
    box.setAttribute("aria-pressed", "true");
    choose(call);
  };
  const box = svg("g", { class: `call ${call.kind}`, tabindex: 0, role: "button", "aria-pressed": "false", "aria-label": place.lines.join(" "),
    transform: `translate(${place.x - place.width / 2},${place.y - place.height / 2})`, style: call.axis ? `--axis: ${axisColour(call.axis)}` : undefined,
    onclick: pick, onkeydown: (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); pick(); } } },
    svg("rect", { width: place.width, height: place.height, rx: 6 }),
    svg("text", { x: place.width / 2, y: below ? 16 : 24 }, title), " ", below ? svg("text", { class: "small", x: place.width / 2, y: 30 }, below) : null);
  return box;
}

function callDetails(call) {
  const rows = [
    ["call", call.label], ["gives", call.types], ["module", call.module], ["source", call.source], ["uses", call.parameters.join("; ")],
    ["forward", call.sent_bytes ? `${call.label.replace("comm.", "")} over ${call.axis}: a rank sends ${sizeText(call.sent_bytes)}` : ""],
    ["backward", call.backward_bytes ? `${call.backward} over ${call.axis}: a rank sends ${sizeText(call.backward_bytes)}` : ""],
  ].filter(([, text]) => text);
  return [
    el("strong", { class: "name" }, call.name), table([{ name: "" }, { name: "" }], rows),
    call.reasons.length ? el("pre", { class: "reasons" }, call.reasons.join("\n")) : null,
  ].filter(Boolean);
}
