// Texts are set only by textContent and setAttribute, so tags in a transcript are shown as text.
"use strict";
(() => {
  const PER_PAGE = 25;
  const make = (tag, kind, text) => {
    const element = document.createElement(tag);
    if (kind) element.className = kind;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const number = (cell) => {
    if (cell.dataset.order !== undefined) return Number(cell.dataset.order);
    const text = cell.textContent.replaceAll(",", "").trim();
    return text !== "" && !Number.isNaN(Number(text)) ? Number(text) : null;
  };
  const clickable = (head, act) => {
    head.tabIndex = 0;
    head.addEventListener("click", act);
    head.addEventListener("keydown", (event) => {
      if (event.key === "Enter") act();
    });
  };
  // The first click on a column of numbers shows the largest first, on a column of texts the first of the alphabet.
  const sortSign = (head, heads, numeric) => {
    const before = head.getAttribute("aria-sort");
    const first = numeric ? "descending" : "ascending";
    const other = numeric ? "ascending" : "descending";
    for (const each of heads) each.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", before === first ? other : first);
    return (before === first ? other : first) === "ascending" ? 1 : -1;
  };
  const byValue = (one, other) => {
    if (one === null || other === null) return (one === null) - (other === null);
    return typeof one === "number" && typeof other === "number" ? one - other : String(one).localeCompare(String(other));
  };

  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.querySelectorAll("th")];
    heads.forEach((head, column) => clickable(head, () => {
      const body = table.tBodies[0];
      const rows = [...body.rows];
      const numeric = rows.some((row) => number(row.cells[column]) !== null);
      const sign = sortSign(head, heads, numeric);
      const value = (row) => (numeric ? number(row.cells[column]) : row.cells[column].textContent);
      rows.sort((one, other) => sign * byValue(value(one), value(other)));
      body.append(...rows);
    }));
  }

  const select = (label, values, act) => {
    const box = make("label", "", label);
    const list = make("select");
    list.id = "filter-" + label.replaceAll(/[^a-z0-9]+/gi, "-");
    list.append(new Option("all", ""), ...values.map((value) => new Option(value, value)));
    list.addEventListener("change", act);
    box.append(list);
    return { box, list };
  };
  const distinct = (values) => [...new Set(values)].sort((a, b) => a.localeCompare(b, undefined, { numeric: true }));

  const slices = document.getElementById("slices");
  if (slices) {
    const rows = [...slices.tBodies[0].rows];
    const filters = [0, 1].map((column) => {
      const values = distinct(rows.map((row) => row.cells[column].textContent));
      return { column, ...select(column ? "slice by" : "task of slices", values, show) };
    });
    const controls = make("div", "controls");
    controls.append(...filters.map((filter) => filter.box));
    slices.closest(".box").before(controls);
    function show() {
      for (const row of rows) {
        row.hidden = filters.some(({ column, list }) => list.value && row.cells[column].textContent !== list.value);
      }
    }
  }

  const explorer = document.getElementById("explorer");
  if (!explorer) return;
  const data = JSON.parse(document.getElementById("data").textContent);
  const runs = data.runs;
  // The largest change of any run against the first.
  const largest = (row) => row.a.reduce((most, { e }) => {
    const change = e - row.a[0].e;
    return Math.abs(change) > Math.abs(most) ? change : most;
  }, 0);
  const columns = [
    ["task", (row) => row.t],
    ["id", (row) => row.i],
    ["sec", (row) => row.s || null],
    ...runs.map((name, run) => [runs.length > 1 ? "error, " + name : "error", (row) => row.a[run].e]),
    ...(runs.length > 1 ? [["change", largest]] : []),
  ].filter(([name, value]) => name !== "sec" || data.rows.some((row) => value(row) !== null));
  let order = data.rows;
  let page = 0;

  const restart = () => {
    page = 0;
    render();
  };
  const controls = make("div", "controls");
  const task = select("task", distinct(data.rows.map((row) => row.t)), restart);
  const kinds = { wrong: (row) => row.a.some((answer) => !answer.x), right: (row) => row.a.every((answer) => answer.x) };
  runs.slice(1).forEach((name, index) => {
    const suffix = runs.length > 2 ? " by " + name : "";
    kinds["broken" + suffix] = (row) => row.a[0].x && !row.a[index + 1].x;
    kinds["mended" + suffix] = (row) => !row.a[0].x && row.a[index + 1].x;
    kinds["worse" + suffix] = (row) => row.a[index + 1].e > row.a[0].e;
    kinds["better" + suffix] = (row) => row.a[index + 1].e < row.a[0].e;
  });
  const kind = select("rows", Object.keys(kinds), restart);
  const names = distinct(data.rows.flatMap((row) => Object.keys(row.d)));
  const dims = names
    .map((name) => ({ name, values: distinct(data.rows.filter((row) => name in row.d).map((row) => row.d[name])) }))
    .filter(({ values }) => values.length > 1 && values.length <= 500)
    .map(({ name, values }) => ({ name, ...select(name, values, restart) }));
  const search = make("label", "", "text, id or prompt contains");
  const input = make("input");
  input.type = "search";
  input.id = "filter-text";
  input.addEventListener("input", restart);
  search.append(input);
  controls.append(task.box, kind.box, ...dims.map((dim) => dim.box), search);

  const table = make("table");
  table.id = "rows";
  const top = table.createTHead().insertRow();
  const heads = columns.map(([name, value]) => {
    const head = make("th", name === "task" || name === "id" ? "" : "n", name);
    head.dataset.key = name;
    top.append(head);
    return { head, value };
  });
  top.append(make("th", "", "reference above, answer below"));
  for (const { head, value } of heads) {
    clickable(head, () => {
      const numeric = data.rows.some((row) => typeof value(row) === "number");
      const sign = sortSign(head, heads.map((entry) => entry.head), numeric);
      order = [...data.rows].sort((one, other) => sign * byValue(value(one), value(other)));
      restart();
    });
  }
  const body = table.createTBody();
  const pagers = [make("div", "pager"), make("div", "pager")].map((pager) => {
    const back = make("button", "", "previous");
    const forward = make("button", "", "next");
    const status = make("span", "note");
    back.addEventListener("click", () => { page -= 1; render(); });
    forward.addEventListener("click", () => { page += 1; render(); });
    pager.append(back, forward, status);
    return { pager, back, forward, status };
  });
  pagers[0].status.id = "shown";
  const box = make("div", "box");
  box.append(table);
  explorer.append(controls, pagers[0].pager, box, pagers[1].pager);

  // Parts that lines may break between: equal, inserted and deleted text at its spaces; substitutions unit by unit, each
  // below the unit it replaces, because Hangul is wider than Latin.
  const divided = (mark, reference, answer, byWord) => {
    const words = (text) => text.match(/\s*\S+|\s+/g) || [];
    if (mark === "e") return (reference.match(/\S+\s*|\s+/g) || []).map((part) => [part, part]);
    if (mark === "i") return words(answer).map((part) => ["", part]);
    if (mark === "d") return words(reference).map((part) => [part, ""]);
    const [above, below] = [reference, answer].map((text) => (byWord ? text.split(" ") : [...text]));
    return above.map((unit, index) => [unit, below[index]]);
  };
  // In texts that are aligned by character, wrong spaces are made visible.
  const aligned = (pieces, byWord) => {
    const line = make("div", byWord ? "aligned words" : "aligned");
    line.dir = "auto";
    const visible = (text) => (byWord ? text : text.replaceAll(" ", "\u2423"));
    for (const [mark, reference, answer] of pieces) {
      for (const [above, below] of divided(mark, reference, answer, byWord)) {
        const pair = make("div", "pair " + mark);
        pair.append(make("span", "ref", mark === "e" ? above : visible(above)));
        pair.append(make("span", "hyp", mark === "e" ? below : visible(below)));
        line.append(pair);
      }
    }
    return line;
  };
  const texts = (row) => {
    const cell = make("td", "texts");
    if (row.q) cell.append(make("div", "prompt", row.q));
    row.a.forEach((answer, run) => {
      if (runs.length > 1) {
        const who = make("div", "who", `${runs[run]}, error ${shown(answer.e)} `);
        if (run && row.a[0].x !== answer.x) {
          const word = answer.x ? "mended" : "broken";
          who.append(make("span", "tag " + word, word));
        }
        cell.append(who);
      }
      cell.append(answer.x ? make("div", "right", "\u2713 " + (answer.n ?? row.n)) : aligned(answer.g, row.b));
    });
    const written = make("details");
    written.append(make("summary", "small", "as written"));
    written.append(make("div", "small", "reference: " + row.r));
    row.a.forEach((answer, run) => written.append(make("div", "small", runs[run] + ": " + answer.p)));
    const about = [row.w, ...Object.entries(row.d).map((pair) => pair.join(" "))].join(" \u00b7 ");
    written.append(make("div", "small", about));
    const more = make("div", "more");
    if (row.u) {
      const player = make("audio");
      player.controls = true;
      player.preload = "none";
      player.setAttribute("src", row.u);
      more.append(player);
    }
    more.append(written);
    cell.append(more);
    return cell;
  };
  const shown = (value) => (typeof value === "number" ? value.toFixed(2) : value === null ? "" : value);
  function render() {
    const query = input.value.trim().normalize("NFC").toLowerCase();
    const has = (text) => text && text.normalize("NFC").toLowerCase().includes(query);
    const matches = order.filter((row) =>
      (!task.list.value || row.t === task.list.value) &&
      (!kind.list.value || kinds[kind.list.value](row)) &&
      dims.every(({ name, list }) => !list.value || row.d[name] === list.value) &&
      (!query || has(row.i) || has(row.r) || has(row.q) || row.a.some((answer) => has(answer.p))));
    const last = Math.max(0, Math.ceil(matches.length / PER_PAGE) - 1);
    page = Math.min(Math.max(page, 0), last);
    const part = matches.slice(page * PER_PAGE, (page + 1) * PER_PAGE);
    body.replaceChildren(...part.map((row) => {
      const line = make("tr");
      for (const [name, value] of columns) {
        line.append(make("td", typeof value(row) === "number" ? "n" : name === "id" ? "small id" : "", shown(value(row))));
      }
      line.append(texts(row));
      return line;
    }));
    const from = matches.length ? page * PER_PAGE + 1 : 0;
    const left = data.left ? `, ${data.left} further rows are not in this page` : "";
    for (const { back, forward, status } of pagers) {
      back.disabled = page === 0;
      forward.disabled = page === last;
      status.textContent = `${from}-${from + part.length - (part.length ? 1 : 0)} of ${matches.length} rows${left}`;
    }
  }
  render();
})();
