// The folded program with a search: Enter goes to the next match, Shift+Enter to the one before.

function textSection(view) {
  const lines = view.report.text.split("\n");
  const body = el("pre", { class: "program", tabindex: 0, role: "group", "aria-label": "The program" });
  const count = el("span", { class: "quiet", role: "status" });
  const found = { marks: [], at: -1 };
  const go = (step) => {
    if (!found.marks.length) return;
    found.marks[found.at]?.classList.remove("now");
    found.at = (found.at + step + found.marks.length) % found.marks.length;
    const mark = found.marks[found.at];
    mark.classList.add("now");
    body.scrollTop = mark.offsetTop - body.offsetTop - body.clientHeight / 3;
    count.textContent = `${found.at + 1} of ${found.marks.length}`;
  };
  const search = el("input", { type: "search", placeholder: "search, e.g. all_reduce", "aria-label": "Search the program",
    oninput: () => {
      found.marks = marked(body, lines, search.value);
      found.at = -1;
      count.textContent = search.value && !found.marks.length ? "no match" : "";
      go(1);
    },
    onkeydown: (event) => { if (event.key === "Enter") go(event.shiftKey ? -1 : 1); } });
  marked(body, lines, "");
  return [
    el("p", { class: "quiet" }, `${lines.length} lines: the graphs that ranks run. Repeated blocks are written once, with what differs.`),
    el("div", { class: "tools" }, search, el("button", { type: "button", onclick: () => go(-1), "aria-label": "Previous match" }, "↑"),
      el("button", { type: "button", onclick: () => go(1), "aria-label": "Next match" }, "↓"), count),
    body,
  ];
}

// Writes the lines anew with matches marked; gives the marks.
function marked(body, lines, wanted) {
  const text = lines.join("\n");
  const needle = wanted.toLowerCase(), hay = text.toLowerCase(), parts = [], marks = [];
  let from = 0;
  for (let at = needle ? hay.indexOf(needle) : -1; at >= 0 && marks.length < 5000; at = hay.indexOf(needle, from)) {
    const mark = el("mark", {}, text.slice(at, at + needle.length));
    parts.push(text.slice(from, at), mark);
    marks.push(mark);
    from = at + needle.length;
  }
  body.replaceChildren(...parts, text.slice(from));
  return marks;
}
