"use strict";
// Texts of models are untrusted: they are set as text, never as markup.
(async () => {
  const $ = (id) => document.getElementById(id);
  const make = (tag, properties = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  };
  const unpack = async (id) => {
    const bytes = Uint8Array.from(atob($(id).textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  };
  const number = (x, digits = 3) => (x === null || x === undefined ? "–" : x.toFixed(digits));

  const index = await unpack("index");
  // Columns: run, step, prompt, lowest, mean and highest posterior of its chunks, chunks, outcomes, block, row.
  const rows = index.rows.map(([run, step, prompt, low, mean, high, chunks, outcomes, block, row], id) => (
    { id, run, step, prompt, low, mean, high, chunks, outcomes, block, row }
  ));
  const blocks = new Map();
  const audit = async (row) => {
    if (!blocks.has(row.block)) {
      if (blocks.size > 7) blocks.delete(blocks.keys().next().value);
      blocks.set(row.block, unpack(`block-${row.block}`));
    }
    return (await blocks.get(row.block))[row.row];
  };

  // ---- The list ----
  for (const [i, name] of [...index.runs.entries()]) $("run").append(make("option", { value: i, textContent: name }));
  if (index.runs.length < 2) document.querySelector(".run").hidden = true;
  else $("run").prepend(make("option", { value: "", textContent: "all", selected: true }));
  $("outcome").append(make("option", { value: "", textContent: "any" }));
  for (const [i, name] of index.outcomes.entries()) $("outcome").append(make("option", { value: i, textContent: name }));

  const SHOWN = 200;
  let found = [];
  let current = null;
  let other = null;
  let chunk = null;
  const within = () => {
    const one = index.runs.length < 2;
    const run = one || $("run").value === "" ? null : Number($("run").value);
    const step = $("step").value === "" ? null : Number($("step").value);
    const text = $("prompt").value.toLowerCase();
    const low = $("low").value === "" ? -Infinity : Number($("low").value);
    const high = $("high").value === "" ? Infinity : Number($("high").value);
    const outcome = $("outcome").value === "" ? null : Number($("outcome").value);
    const bounded = low > -Infinity || high < Infinity;
    const matches = text && index.prompts.map((prompt) => prompt.toLowerCase().includes(text));
    return rows.filter((row) => (run === null || row.run === run) && (step === null || row.step === step)
      && (!text || matches[row.prompt]) && (outcome === null || row.outcomes & (1 << outcome))
      && (!bounded || (row.mean !== null && row.mean >= low && row.mean <= high)));
  };
  const label = (row) => `${index.runs.length > 1 ? `${index.runs[row.run]}, ` : ""}step ${row.step}`;
  const fill = () => {
    found = within();
    const order = $("order").value;
    if (order === "worst") found.sort((a, b) => (a.low ?? 2) - (b.low ?? 2));
    if (order === "best") found.sort((a, b) => (b.high ?? -1) - (a.high ?? -1));
    // A window around the current trajectory, so that keys reach all of them.
    const at = Math.max(0, found.indexOf(current));
    const first = Math.max(0, at - SHOWN / 2);
    const shown = found.slice(first, first + SHOWN);
    $("list").firstElementChild.replaceChildren(...shown.map((row) => {
      const link = make("a", { href: `#t=${row.id}` },
        `${label(row)} `, make("small", { textContent: `${row.chunks} chunks, posterior ${number(row.mean)}` }),
        make("br"), make("small", { textContent: index.prompts[row.prompt].slice(-90) }));
      if (row === current) link.setAttribute("aria-current", "true");
      return make("li", {}, link);
    }));
    const window = found.length > SHOWN ? `; ${first + 1} to ${first + shown.length} are listed` : "";
    $("count").textContent = `${found.length} of ${rows.length} trajectories${window}.`;
    $("list").querySelector("[aria-current]")?.scrollIntoView({ block: "nearest" });
  };

  // ---- One trajectory ----
  // Differences by words: the longest common subsequence.
  const difference = (before, after) => {
    const [a, b] = [before, after].map((text) => text.match(/\s+|[^\s]+/g) ?? []);
    if (a.length * b.length > 250000) return [document.createTextNode(after)];
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
    return parts.map(([tag, text]) => (tag ? make(tag, { textContent: text }) : document.createTextNode(text)));
  };

  const panel = (audit, at) => {
    const { text, prior, posterior, weight, rollouts, k, n } = audit.chunks[at];
    const values = [["similarities, sum of n", `${number(k)} of ${n}`], ["prior", number(prior)],
      ["posterior", number(posterior)], ["weight", number(weight)]];
    const table = make("table", {}, make("tbody", {}, ...values.map(([name, value]) => (
      make("tr", {}, make("th", { scope: "row", textContent: name }), make("td", { textContent: value }))))));
    const head = make("thead", {}, make("tr", {}, ...["the teacher wrote, against the student", "times", "similarity"].map(
      (name) => make("th", { scope: "col", textContent: name }))));
    const body = make("tbody", {}, ...rollouts.map(([words, count, similarity]) => make("tr", {},
      make("td", { className: "words" }, ...difference(text, words)),
      make("td", { textContent: count }), make("td", { textContent: number(similarity) }))));
    return [make("h3", { textContent: `Chunk ${at + 1} of ${audit.chunks.length}` }),
      make("p", { className: "text chunk-text", textContent: text }), table,
      make("table", { className: "rollouts" }, head, body)];
  };

  const shaded = (audit) => {
    // Offsets at which shading or outline change.
    const pieces = [];
    let offset = 0;
    for (const [length, level] of audit.shades) { pieces.push([offset, offset + length, level]); offset += length; }
    if (offset < audit.text.length) pieces.push([offset, audit.text.length, 0]);
    const spans = (start, end, fork) => {
      const parts = [];
      for (const [from, to, level] of pieces) {
        for (const [a, b] of fork > from && fork < to ? [[from, fork], [fork, to]] : [[from, to]]) {
          const text = audit.text.slice(Math.max(a, start), Math.min(b, end));
          if (Math.max(a, start) >= Math.min(b, end)) continue;
          const classes = [level ? `e${level}` : "", a === fork || (fork === start && Math.max(a, start) === start) ? "fork" : ""];
          const name = classes.filter(Boolean).join(" ");
          parts.push(name ? make("span", { className: name, textContent: text }) : document.createTextNode(text));
        }
      }
      return parts;
    };
    return spans;
  };

  const article = async (row, linked) => {
    const audit_ = await audit(row);
    const spans = shaded(audit_);
    const body = make("p", { className: "text" });
    let offset = 0;
    audit_.chunks.forEach((part, at) => {
      const start = Math.max(offset, part.start); // chunks may overlap
      body.append(...spans(offset, start, -1));
      const title = `Chunk ${at + 1}, posterior ${number(part.posterior)}`;
      const link = make("a", { className: "chunk", href: `#t=${linked}&c=${at}${other && row === other ? "&in=other" : ""}`, title },
        ...spans(start, part.end, part.anchor));
      link.dataset.chunk = at;
      body.append(link);
      offset = Math.max(offset, part.end);
    });
    body.append(...spans(offset, audit_.text.length, -1));
    const facts = [`${label(row)}`, ...audit_.facts].join(" · ");
    const result = make("article", {},
      make("h3", { textContent: label(row) }), make("p", { className: "muted", textContent: facts }),
      make("p", { className: "prompt", tabIndex: 0, textContent: index.prompts[row.prompt] }), body,
      ...audit_.failures.map((text) => make("p", { className: "muted", textContent: `Dropped: ${text}` })));
    result.querySelector(".prompt").setAttribute("role", "region");
    result.querySelector(".prompt").setAttribute("aria-label", "Prompt");
    result.append(make("div", { className: "panel" }));
    return [result, audit_];
  };

  const show = async () => {
    const asked = new URLSearchParams(location.hash.slice(1));
    if (!asked.has("t")) return;
    const row = rows[Number(asked.get("t"))];
    if (!row) return;
    other = asked.has("with") ? rows[Number(asked.get("with"))] ?? null : null;
    chunk = asked.has("c") ? Number(asked.get("c")) : null;
    const changed = row !== current;
    current = row;
    const linked = `${row.id}${other ? `&with=${other.id}` : ""}`;
    const columns = await Promise.all((other ? [row, other] : [row]).map((each) => article(each, linked)));
    if (current !== row) return; // another one was chosen in the meantime
    const same = rows.filter((each) => each.prompt === row.prompt && each !== row);
    const compare = make("select", { id: "compare" }, make("option", { value: "", textContent: "nothing" }),
      ...same.slice(0, 500).map((each) => make("option", { value: each.id, textContent: `${label(each)} (${each.id})`, selected: each === other })));
    compare.addEventListener("change", () => { location.hash = `t=${row.id}${compare.value === "" ? "" : `&with=${compare.value}`}`; });
    const tools = make("label", {}, "Compare the same prompt with ", compare);
    columns[0][0].children[1].after(tools);
    if (!same.length) tools.hidden = true;
    $("details").replaceChildren(...columns.map(([element]) => element));
    const where = asked.get("in") === "other" && other ? columns[1] : columns[0];
    const [element, audit_] = where;
    if (chunk === null && audit_.chunks.length) {
      chunk = audit_.chunks.reduce((best, part, at) => (part.posterior < audit_.chunks[best].posterior ? at : best), 0);
    }
    if (chunk !== null && audit_.chunks[chunk]) {
      element.querySelector(".panel").replaceChildren(...panel(audit_, chunk));
      element.querySelector(`[data-chunk="${chunk}"]`)?.setAttribute("aria-current", "true");
    }
    if (changed) fill();
  };

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || ["INPUT", "SELECT", "TEXTAREA"].includes(event.target.tagName)) return;
    const move = { j: 1, k: -1 }[event.key];
    const turn = { n: 1, p: -1 }[event.key];
    if (move && found.length) {
      const at = found.indexOf(current);
      const next = found[at < 0 ? 0 : Math.min(found.length - 1, Math.max(0, at + move))];
      location.hash = `t=${next.id}`;
    }
    if (turn && current) {
      const next = Math.min(current.chunks - 1, Math.max(0, (chunk ?? -1) + turn));
      if (current.chunks) location.hash = `t=${current.id}${other ? `&with=${other.id}` : ""}&c=${next}`;
    }
  });
  $("filters").addEventListener("input", fill);
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  window.addEventListener("hashchange", show);
  fill();
  await show();
  document.documentElement.dataset.ready = "true";

  if (index.live) {
    let version = null;
    const look = async () => {
      try {
        const now = await (await fetch("version", { cache: "no-store" })).text();
        if (version !== null && now !== version) return location.reload();
        version = now;
      } catch {
        $("count").textContent += " The server has ended.";
        return;
      }
      setTimeout(look, 3000);
    };
    look();
  }
})();
