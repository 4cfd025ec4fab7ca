"use strict";
// Texts of models are untrusted: they are set as text, never as markup.
(async () => {
  const $ = (id) => document.getElementById(id);
  // Characters that cannot be seen and change how others are shown, such as the order of a line, become escapes.
  const HIDDEN = /[\p{Cc}\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\u{e0000}-\u{e007f}]/gu;
  const visible = (text) => text.replace(HIDDEN, (c) => ("\n\t".includes(c) ? c : `\\u{${c.codePointAt(0).toString(16)}}`));
  const plain = (text) => document.createTextNode(visible(text));
  const make = (tag, { text, ...properties } = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    if (text !== undefined) element.append(plain(String(text)));
    element.append(...children);
    return element;
  };
  const unpack = async (id) => {
    const packed = atob($(id).textContent);
    const bytes = new Uint8Array(packed.length);
    for (let i = 0; i < packed.length; i++) bytes[i] = packed.charCodeAt(i); // `Uint8Array.from` is many times slower
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  };
  const number = (x, digits = 3) => (x === null || x === undefined ? "–" : x.toFixed(digits));
  // What chunks are compared by: their posterior, from 0 to 1. With branches their advantage, where the sign counts.
  const measure = (run) => (index.branched[run] ? "advantage" : "posterior");
  const level = (value, run) => {
    const [low, high] = index.branched[run] ? [0, 0] : [1 / 3, 2 / 3];
    return value < low ? "low" : value < high ? "middle" : "high";
  };

  // ---- The data ----
  let index = null;
  let rows = [];
  let byKey = new Map();
  let blocks = new Map();
  let drawn = null; // the link of what is shown
  const load = async () => {
    index = await unpack("index");
    rows = index.rows.map(([run, step, process, place, prompt, values, outcomes, block, at]) => (
      { key: [run, step, process, place].join("."), run, step, process, place, prompt, values, outcomes, block, at,
        low: Math.min(...values) / 1000, high: Math.max(...values) / 1000 }
    ));
    byKey = new Map(rows.map((row) => [row.key, row]));
    blocks = new Map();
    drawn = null;
    const options = (id, first, names) => {
      const before = $(id).value;
      $(id).replaceChildren(make("option", { value: "", text: first }),
        ...names.map(([value, text]) => make("option", { value, text })));
      $(id).value = before;
    };
    options("run", "all", [...index.runs.entries()]);
    document.querySelector(".run").hidden = index.runs.length < 2;
    const measures = new Set(index.runs.map((name, run) => measure(run)));
    $("low").labels[0].firstChild.data = `A chunk's ${[...measures].join(" or ")} from `;
    options("outcome", "any", index.outcomes.map((name, bit) => [bit, name, rows.filter((row) => row.outcomes & (1 << bit)).length])
      .filter(([, , count]) => count).map(([bit, name, count]) => [bit, `${name} (${count})`]));
  };
  const audit = async (row) => {
    if (!blocks.has(row.block)) {
      if (blocks.size > 24) blocks.delete(blocks.keys().next().value); // enough for the trajectories that are listed
      blocks.set(row.block, unpack(`block-${row.block}`));
    }
    return (await blocks.get(row.block))[row.at];
  };

  // ---- The list ----
  const SHOWN = 200;
  let found = [];
  let current = null;
  let other = null;
  let chunk = null;
  const matching = () => {
    const value = (id) => ($(id).value === "" ? null : Number($(id).value));
    const [run, step, low, high, outcome] = ["run", "step", "low", "high", "outcome"].map(value);
    const text = $("prompt").value.toLowerCase();
    const matches = text && index.prompts.map((prompt) => prompt.toLowerCase().includes(text));
    const within = (value) => (low === null || value >= 1000 * low) && (high === null || value <= 1000 * high);
    return rows.filter((row) => (run === null || row.run === run) && (step === null || row.step === step)
      && (!text || matches[row.prompt]) && (outcome === null || row.outcomes & (1 << outcome))
      && ((low === null && high === null) || row.values.some(within)));
  };
  const label = (row) => [...(index.runs.length > 1 ? [index.runs[row.run]] : []), `step ${row.step}`,
    ...(index.processes > 1 ? [`process ${row.process}`] : []), `trajectory ${row.place}`].join(", ");
  const strip = (row) => {
    const text = row.values.length ? `${measure(row.run)}s ${row.values.map((value) => number(value / 1000, 2)).join(", ")}` : "no chunk";
    const element = make("span", { className: "strip", title: text },
      ...row.values.map((value) => make("i", { className: level(value / 1000, row.run) })));
    // The height shows it, too: not every reader sees the colors.
    row.values.forEach((value, at) => {
      const share = index.branched[row.run] ? Math.min(1, Math.max(0, (value + 1000) / 2000)) : value / 1000;
      element.children[at].style.height = `${15 + 85 * share}%`;
    });
    element.setAttribute("role", "img");
    element.setAttribute("aria-label", text);
    return element;
  };
  const fill = () => {
    found = matching();
    const order = $("order").value;
    if (order === "worst") found.sort((a, b) => a.low - b.low);
    if (order === "best") found.sort((a, b) => b.high - a.high);
    // A window around the current trajectory: keys reach all of them.
    const first = Math.max(0, found.indexOf(current) - SHOWN / 2);
    const shown = found.slice(first, first + SHOWN);
    $("list").firstElementChild.replaceChildren(...shown.map((row) => {
      const link = make("a", { href: `#t=${row.key}` },
        make("span", { className: "line" }, make("span", { text: label(row) }), strip(row)),
        make("small", { className: "excerpt", text: index.prompts[row.prompt].slice(-160) }));
      link.dataset.key = row.key;
      return make("li", {}, link);
    }));
    const window = found.length > SHOWN ? `; ${first + 1} to ${first + shown.length} are listed` : "";
    $("count").textContent = `${found.length} of ${rows.length} trajectories${window}.`;
    mark();
  };
  const mark = () => {
    $("list").querySelector("[aria-current]")?.removeAttribute("aria-current");
    const link = current && $("list").querySelector(`[data-key="${current.key}"]`);
    link?.setAttribute("aria-current", "true");
    // Not `scrollIntoView`, which would also scroll the page.
    if (link) {
      const [inner, outer] = [link.getBoundingClientRect(), $("list").getBoundingClientRect()];
      if (inner.top < outer.top) $("list").scrollTop -= outer.top - inner.top;
      if (inner.bottom > outer.bottom) $("list").scrollTop += inner.bottom - outer.bottom;
    }
    return Boolean(link);
  };

  // ---- One trajectory ----
  const segmenter = new Intl.Segmenter("en", { granularity: "word" });
  const words = (text) => Array.from(segmenter.segment(text), ({ segment }) => segment);
  // Differences by words: the longest common subsequence.
  const difference = (before, after) => {
    const [a, b] = [words(before), words(after)];
    if (a.length * b.length > 250000) return [plain(after)];
    const length = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
    for (let i = a.length - 1; i >= 0; i--) {
      for (let j = b.length - 1; j >= 0; j--) {
        length[i][j] = a[i] === b[j] ? length[i + 1][j + 1] + 1 : Math.max(length[i + 1][j], length[i][j + 1]);
      }
    }
    const parts = [];
    const add = (tag, word) => {
      const last = parts.at(-1);
      if (last && last[0] === tag) last[1] += word;
      else parts.push([tag, word]);
    };
    let [i, j] = [0, 0];
    while (i < a.length || j < b.length) {
      if (i < a.length && j < b.length && a[i] === b[j]) { add("", a[i]); i++; j++; }
      else if (i < a.length && (j === b.length || length[i + 1][j] >= length[i][j + 1])) add("del", a[i++]);
      else add("ins", b[j++]);
    }
    return parts.map(([tag, text]) => (tag ? make(tag, { text }) : plain(text)));
  };

  const panel = (audit, at) => {
    const { text, prior, posterior, weight, rollouts, k, n, mark, imitated, branches } = audit.chunks[at];
    const values = [...(mark === null ? [] : [["mark of the judge", number(mark)]]),
      ...(n ? [["k_sem, sum of similarities", `${number(k)} of ${n}`]] : []), ["prior", number(prior)],
      ["posterior", number(posterior)], ["weight in the loss", number(weight)]];
    const cards = make("dl", { className: "cards" }, ...values.map(([name, value]) => (
      make("div", {}, make("dt", { text: name }), make("dd", { text: value })))));
    const table = (names, ...rows) => make("table", { className: "rollouts" },
      make("thead", {}, make("tr", {}, ...names.map((name) => make("th", { scope: "col", text: name })))),
      make("tbody", {}, ...rows));
    const similarity = (value) => {
      const bar = make("meter", { min: 0, max: 1, value });
      bar.setAttribute("aria-hidden", "true");
      return make("td", {}, bar, plain(number(value)));
    };
    const student = make("tr", { className: "student" }, make("td", { colSpan: 2, text: "the student wrote" }),
      make("td", { className: "words", text }));
    const part = (at) => (at < imitated.length ? [make("small", { className: "muted",
      text: imitated[at] === null ? "left out of the imitation" : `imitated: ${JSON.stringify(imitated[at])}` })] : []);
    const marked = "(words that differ are marked)";
    const answers = table(["times", "similarity", `the teacher wrote ${marked}`], student,
      ...rollouts.map(([rollout, count, value], at) => make("tr", {}, make("td", { text: count }), similarity(value),
        make("td", { className: "words" }, ...difference(text, rollout), ...part(at).flatMap((small) => [make("br"), small])))));
    const others = table(["times", n ? "similarity" : "mark", "advantage", `branches of the student ${marked}`],
      ...branches.map(([branch, count, value, advantage]) => make("tr", {}, make("td", { text: count }), similarity(value),
        make("td", { text: (advantage > 0 ? "+" : "") + number(advantage) }),
        make("td", { className: "words" }, ...difference(text, branch)))));
    return [make("h3", { text: `Chunk ${at + 1} of ${audit.chunks.length}` }), cards,
      ...(n ? [answers] : []), ...(branches.length ? [others] : [])];
  };

  // Text nodes and spans for the characters from `start` to `end`. Offsets count characters, as Python does.
  const spansOf = (audit) => {
    const characters = Array.from(audit.text);
    const pieces = [];
    let offset = 0;
    for (const [length, shade] of audit.shades) { pieces.push([offset, offset + length, shade]); offset += length; }
    if (offset < characters.length) pieces.push([offset, characters.length, 0]);
    const spans = (start, end, fork = -1) => {
      const parts = [];
      for (const [from, to, shade] of pieces) {
        if (to <= start || from >= end) continue;
        for (const [a, b] of fork > from && fork < to ? [[from, fork], [fork, to]] : [[from, to]]) {
          const [first, last] = [Math.max(a, start), Math.min(b, end)];
          if (first >= last) continue;
          const text = characters.slice(first, last).join("");
          const name = [...(shade ? [`e${shade}`] : []), ...(first === fork ? ["fork"] : [])].join(" ");
          parts.push(name ? make("span", { className: name, text }) : plain(text));
        }
      }
      return parts;
    };
    return [spans, characters.length];
  };

  const legend = (run) => make("p", { className: "legend" },
    make("span", {}, make("i", { className: "low" }), `${measure(run)} below ${index.branched[run] ? 0 : "⅓"}`,
      ...(index.branched[run] ? [] : [make("i", { className: "middle" }), "below ⅔"]), make("i", { className: "high" }), "above"),
    make("span", {}, "entropy ", ...["0.05", "0.25", "0.75", "1.5", "2.5"].map((bound, i) => make("span", { className: `e${i + 1}`, text: bound })), " nats"),
    make("span", {}, make("span", { className: "fork", text: "" }), "fork: the token with the highest entropy of its chunk"));

  const article = async (row, linked) => {
    const audit_ = await audit(row);
    const [spans, length] = spansOf(audit_);
    const body = make("p", { className: "text" });
    let offset = 0;
    audit_.chunks.forEach((part, at) => {
      const start = Math.max(offset, part.start); // chunks may overlap
      body.append(...spans(offset, start));
      const value = row.values[at] / 1000;
      const link = make("a", { className: `chunk ${level(value, row.run)}`, href: `#t=${linked}&c=${at}${row === other ? "&in=other" : ""}`,
        title: `Chunk ${at + 1}, ${measure(row.run)} ${number(value)}` }, ...spans(start, part.end, Math.max(start, part.fork)));
      link.dataset.chunk = at;
      body.append(link);
      offset = Math.max(offset, part.end);
    });
    body.append(...spans(offset, length));
    const region = (name, text) => {
      const shown = make("p", { className: "prompt", tabIndex: 0, text });
      shown.setAttribute("role", "region");
      shown.setAttribute("aria-label", name);
      return [make("h4", { text: name }), shown];
    };
    const result = make("article", {},
      make("div", { className: "head" }, make("h3", { text: label(row) })),
      ...region("Prompt", index.prompts[row.prompt]),
      ...(audit_.context === null ? [] : region("What only the teacher saw", audit_.context)),
      make("h4", { text: "The student's answer" }), body, legend(row.run),
      make("div", { className: "panel" }),
      make("p", { className: "muted facts", text: `The whole trajectory: ${audit_.facts.join(" · ")}` }),
      ...audit_.notes.map((text) => make("p", { className: "muted note", text })));
    return [result, audit_];
  };

  const comparison = (row) => {
    const same = rows.filter((each) => each.prompt === row.prompt && each !== row);
    const select = make("select", { id: "compare" }, make("option", { value: "", text: "nothing" }),
      ...same.slice(0, 500).map((each) => make("option", { value: each.key, text: label(each), selected: each === other })));
    select.addEventListener("change", () => { location.hash = `t=${row.key}${select.value === "" ? "" : `&with=${select.value}`}`; });
    return same.length ? make("label", {}, "Same prompt beside ", select) : "";
  };

  let columns = []; // of each trajectory that is shown, its element and its audit
  const show = async () => {
    const asked = new URLSearchParams(location.hash.slice(1));
    // Without a link, the first one with a chunk that the teacher would not have written is open.
    const row = byKey.get(asked.get("t")) ?? (current && byKey.get(current.key)) ?? found.find((each) => level(each.low, each.run) === "low") ?? found[0];
    if (!row) return;
    current = row;
    other = byKey.get(asked.get("with")) ?? null;
    const linked = `${row.key}${other ? `&with=${other.key}` : ""}`;
    if (linked !== drawn) {
      const made = await Promise.all((other ? [row, other] : [row]).map((each) => article(each, linked)));
      if (current !== row) return; // another one was chosen in the meantime
      made[0][0].querySelector(".head").append(comparison(row));
      [columns, drawn] = [made, linked];
    }
    const wanted = asked.has("c") ? Number(asked.get("c")) : null;
    const chosen = asked.get("in") === "other" && other ? 1 : 0;
    columns.forEach(([element, audit_], at) => {
      const { chunks } = audit_;
      if (!chunks.length) return;
      const { values } = at ? other : current;
      const lowest = values.indexOf(Math.min(...values));
      const open = at === chosen && chunks[wanted] ? wanted : lowest;
      if (at === chosen) chunk = open;
      element.querySelector(".panel").replaceChildren(...panel(audit_, open));
      element.querySelector(".chunk[aria-current]")?.removeAttribute("aria-current");
      element.querySelector(`[data-chunk="${open}"]`).setAttribute("aria-current", "true");
    });
    $("details").replaceChildren(...columns.map(([element]) => element));
    if (!mark()) fill();
  };

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || ["INPUT", "SELECT", "TEXTAREA"].includes(event.target.tagName)) return;
    const move = { j: 1, k: -1 }[event.key];
    const turn = { n: 1, p: -1 }[event.key];
    if (move && found.length) {
      const at = found.indexOf(current);
      location.hash = `t=${found[at < 0 ? 0 : Math.min(found.length - 1, Math.max(0, at + move))].key}`;
    }
    if (turn && current?.values.length) {
      const last = current.values.length - 1;
      location.hash = `t=${current.key}${other ? `&with=${other.key}` : ""}&c=${Math.min(last, Math.max(0, (chunk ?? -1) + turn))}`;
    }
  });
  $("filters").addEventListener("input", fill);
  $("filters").addEventListener("reset", () => setTimeout(fill));
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  window.addEventListener("hashchange", show);
  await load();
  fill();
  await show();
  document.documentElement.dataset.ready = "true";

  // ---- Beside a run that writes ----
  if (!index.live) return;
  const ask = async (path) => {
    const answer = await fetch(path, { cache: "no-store" });
    const text = await answer.text();
    if (!answer.ok) throw new Error(text);
    return text;
  };
  let version = null;
  const look = async () => {
    try {
      const now = await ask("version");
      if (version !== null && now !== version) {
        const page = new DOMParser().parseFromString(await ask("."), "text/html");
        for (const id of ["sections", "left-out", "data"]) $(id).replaceWith(document.importNode(page.getElementById(id), true));
        await load();
        fill();
        await show();
      }
      version = now;
      $("live").textContent = "● follows the run";
    } catch (error) {
      $("live").textContent = visible(`○ not updated: ${error.message}`);
    }
    $("live").hidden = false;
    setTimeout(look, 3000);
  };
  look();
})();
