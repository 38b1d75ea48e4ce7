// Memory, traffic and the pipeline over time, drawn by Observable Plot; each has its numbers as a table too.

const bytesAxis = { tickFormat: sizeText, nice: true };

function legend(names, colour) {
  return el("ul", { class: "legend" }, names.map((name) => el("li", {}, el("i", { style: `--c: ${colour(name)}` }), name.replaceAll("_", " "))));
}

function plotted(options, label) {
  const drawn = Plot.plot({ style: { background: "none", color: "inherit", fontSize: "12px" }, ...options });
  const picture = drawn.tagName === "svg" ? drawn : drawn.querySelector("svg");
  for (const mark of picture.querySelectorAll("g[aria-label]")) mark.removeAttribute("aria-label"); // the whole has one
  picture.setAttribute("role", "img");
  picture.setAttribute("aria-label", label);
  return drawn;
}

// ------------------------------------------------------------ memory

function memorySection(view) {
  const { memory, optimizer, device } = view.report;
  if (!memory.length) return [el("p", { class: "quiet" }, "The program has no step: it is not finished.")];
  const select = el("select", { "aria-label": "Ranks", onchange: () => draw() }, memory.map((one, at) =>
    el("option", { value: at, selected: one === view.largest }, `${one.ranks}: peak ${sizeText(one.peak)}${one === view.largest && memory.length > 1 ? " (the most)" : ""}`)));
  const host = el("figure");
  const draw = () => host.replaceChildren(...memoryFigure(memory[Number(select.value)], device));
  draw();
  return [
    el("p", { class: "quiet" }, `What a rank holds during a training step with ${optimizer}, as counted in its graphs: every tensor that is alive, without what the allocator and the communication library add.`),
    memory.length > 1 ? el("div", { class: "tools" }, el("label", {}, "memory of ", select)) : null,
    host, device ? fitText(device) : null,
  ];
}

function fitText(device) {
  const over = device.needed - device.bytes;
  const needed = `The largest rank needs ${sizeText(device.needed)} of a device with ${sizeText(device.bytes)}, with an allowance for driver, NCCL and allocator`;
  if (over <= 0) return el("p", {}, el("strong", {}, "It fits. "), `${needed}.`);
  return el("div", {}, el("p", {}, el("strong", {}, `It does not fit, by ${sizeText(over)}. `), `${needed}. What would help, about:`),
    el("ul", {}, device.helps.slice(0, 4).map(([change, saves]) => el("li", {}, `${change}: ${sizeText(saves)} less`))));
}

function memoryFigure(memory, device) {
  const kinds = memory.kinds.filter((_, at) => memory.moments.some((moment) => moment.held[at] > 0));
  const colour = (kind) => `var(--c${memory.kinds.indexOf(kind) % 9})`;
  const points = memory.moments.flatMap((moment) => kinds.map((kind) => ({ at: moment.at, kind, bytes: moment.held[memory.kinds.indexOf(kind)] })));
  const top = memory.moments[memory.highest];
  const drawn = device && topOf(memory, device) >= device.bytes;
  const peak = `peak ${sizeText(memory.peak)}, in ${top.phase}`;
  const draw = (width) => plotted({
    width, height: 330, marginLeft: 64, marginTop: 30, marginBottom: 40,
    x: { domain: [0, 1], ticks: [], label: "the step, from its first operator to the update →" },
    y: { ...bytesAxis, label: "bytes held", grid: true, domain: [0, topOf(memory, device) * 1.12] },
    color: { domain: kinds, range: kinds.map(colour) },
    marks: [
      Plot.areaY(points, { x: "at", y: "bytes", fill: "kind", order: kinds, curve: "step-after" }),
      drawn ? Plot.ruleY([device.bytes], { stroke: "var(--ep)", strokeWidth: 2 }) : null,
      drawn ? Plot.text([device.bytes], { y: (bytes) => bytes, text: () => `device: ${sizeText(device.bytes)}`, frameAnchor: "left", dx: 6, dy: -8, fill: "var(--ep)" }) : null,
      Plot.ruleX([top.at], { stroke: "currentColor", strokeDasharray: "4 3" }),
      Plot.text([top], { x: "at", y: memory.peak * 1.06, text: () => (width < 560 ? `peak ${sizeText(memory.peak)}` : peak), fontWeight: 700, textAnchor: top.at > 0.6 ? "end" : "start", dx: top.at > 0.6 ? -6 : 6 }),
      Plot.tip(memory.moments, Plot.pointerX({ x: "at", y: (moment) => d3.sum(moment.held), title: (moment) => momentText(memory, moment), fill: "var(--panel)", stroke: "var(--line)" })),
    ],
  }, `Memory of ${memory.ranks} over a step: ${peak}`);
  const rows = kinds.map((kind) => {
    const at = memory.kinds.indexOf(kind);
    return [kind.replaceAll("_", " "), sizeText(top.held[at]), sizeText(d3.max(memory.moments, (moment) => moment.held[at]))];
  });
  return [
    legend(kinds, colour), drawnToWidth(el("div", { class: "plot" }), draw),
    el("figcaption", {}, `${memory.ranks}: ${peak}.`),
    table([{ name: "" }, { name: "at the peak", number: true }, { name: "at most", number: true }], [...rows, [el("strong", {}, "all"), sizeText(memory.peak), ""]]),
  ];
}

// The device is drawn where it is not far above the curve.
const topOf = (memory, device) => (device && device.bytes < 3 * memory.peak ? Math.max(memory.peak, device.bytes) : memory.peak);

function momentText(memory, moment) {
  const parts = memory.kinds.map((kind, at) => [kind.replaceAll("_", " "), moment.held[at]]).filter(([, bytes]) => bytes > 0);
  return [`${moment.phase}: ${sizeText(d3.sum(moment.held))}`, ...parts.map(([kind, bytes]) => `${kind}: ${sizeText(bytes)}`)].join("\n");
}

// ------------------------------------------------------------ traffic

function trafficSection(view) {
  const host = el("figure");
  const word = el("p", { class: "quiet", "aria-live": "polite" });
  let before = null;
  view.onRank(() => {
    if (before === view.place) return;
    before = view.place;
    const rows = view.report.traffic.filter((one) => one.place === view.place && one.bytes > 0);
    const total = d3.sum(rows, (one) => one.bytes);
    word.textContent = `A rank${"pp" in view.coordinates(0) ? ` of pipeline place ${view.place}, as the chosen one is,` : ""} sends ${sizeText(total)} in a training step.`;
    host.replaceChildren(...trafficFigure(rows));
  });
  return [word, host];
}

function trafficFigure(rows) {
  if (!rows.length) return [el("p", {}, "Nothing is sent.")];
  const axes = d3.groupSort(rows, (group) => -d3.sum(group, (one) => one.bytes), (one) => one.axis);
  const opacity = (one) => (one.phase === "forward" ? 1 : 0.6);
  const draw = (width) => plotted({
    width, height: 70 + 46 * axes.length, marginLeft: 76, marginRight: 32, marginBottom: 44, x: { ...bytesAxis, label: "bytes sent by a rank in a step →", grid: true, ticks: Math.max(2, width / 120) }, y: { domain: axes, label: null },
    marks: [Plot.barX(rows, { y: "axis", x: "bytes", fill: (one) => axisColour(one.axis), fillOpacity: opacity, stroke: "var(--page)", order: null,
      title: (one) => `${one.phase}: ${one.collective} over ${one.axis}, ${one.operations} times, ${sizeText(one.bytes)}` }), Plot.ruleX([0])],
  }, `Bytes sent by axis: ${axes.map((axis) => `${axis} ${sizeText(d3.sum(rows.filter((one) => one.axis === axis), (one) => one.bytes))}`).join(", ")}`);
  const numbers = d3.sort(rows, (one) => -one.bytes).map((one) => [axisName(one.axis), one.collective, one.phase, one.operations, sizeText(one.bytes)]);
  return [
    drawnToWidth(el("div", { class: "plot" }), draw), el("figcaption", {}, "Full colour: forward; pale: backward."),
    table([{ name: "axis" }, { name: "collective" }, { name: "in" }, { name: "times", number: true }, { name: "sent", number: true }], numbers),
  ];
}

// ------------------------------------------------------------ pipeline

function pipelineSection(view) {
  const { pipeline } = view.report;
  if (!pipeline) return [el("p", { class: "quiet" }, "The mesh has no axis pp: every rank runs the whole model.")];
  const ranks = d3.range(d3.max(pipeline.spans, (span) => span.rank) + 1);
  const end = d3.max(pipeline.spans, (span) => span.end);
  const several = pipeline.stages > ranks.length;
  const name = (span) => (several ? `${span.stage}.${span.microbatch}` : `${span.microbatch}`);
  const shade = (span) => (several ? 1 - 0.45 * (Math.floor(span.stage / ranks.length) / (pipeline.stages / ranks.length)) : 1);
  const draw = (width) => {
    const wide = Math.max(width, Math.min(2400, 560));
    const room = (wide - 90) / end;
    return plotted({
      width: wide, height: 60 + 30 * ranks.length, marginLeft: 76, marginTop: 8, marginBottom: 40, style: { maxWidth: "none", color: "inherit" },
      x: { label: "time, in units of one forward →", domain: [0, end] }, y: { domain: ranks, tickFormat: (rank) => `pp ${rank}`, label: null, padding: 0.12 },
      marks: [
        Plot.barX(pipeline.spans, { y: "rank", x1: "start", x2: "end", fill: (span) => `var(--${span.kind})`, fillOpacity: shade, stroke: "var(--page)", strokeWidth: 0.7,
          title: (span) => `${pipeline.words[span.kind]} of stage ${span.stage}, microbatch ${span.microbatch}: ${span.start} to ${span.end}` }),
        Plot.text(pipeline.spans.filter((span) => (span.end - span.start) * room > 7 * name(span).length + 4), { y: "rank", x: (span) => (span.start + span.end) / 2, text: name, fill: "#10151c", fontSize: 11 }),
      ],
    }, `Schedule ${pipeline.schedule}: bubble ${percent(pipeline.bubble)}`);
  };
  const kinds = Object.keys(pipeline.words);
  return [
    el("p", { class: "quiet" }, `${pipeline.schedule}: ${pipeline.stages} stages on ${ranks.length} pipeline ranks, ${pipeline.microbatches} microbatches. Bubble: ${percent(pipeline.bubble)} (idle over computing time). Numbers are ${several ? "stage.microbatch" : "microbatches"}.`),
    el("ul", { class: "legend" }, kinds.map((kind) => el("li", {}, el("i", { style: `--c: var(--${kind})` }), `${kind} ${pipeline.words[kind]}`))),
    drawnToWidth(el("figure", { class: "plot", tabindex: 0, role: "group", "aria-label": "Pipeline over time" }), draw),
    pipeline.left_out ? el("p", { class: "quiet" }, `${pipeline.left_out} later computes are not drawn.`) : null,
  ];
}

const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;
