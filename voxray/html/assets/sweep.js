// The lines of the parallel coordinates: pointing at one marks its trial everywhere, dragging along an axis leaves those
// that pass there.
"use strict";
(() => {
  const plot = document.getElementById("parallel");
  const said = document.getElementById("pointed");
  const table = document.getElementById("trials");
  if (!plot) return;
  const usual = said.textContent;
  const lines = [...plot.querySelectorAll("path.trial")].map((path) => ({
    path,
    number: path.dataset.trial,
    ys: path.dataset.ys.split(" ").map(Number),
  }));
  const marks = [...document.querySelectorAll("[data-trial]")];
  const heads = table ? [...table.tHead.rows[0].cells].map((cell) => cell.textContent) : [];
  const rows = new Map(table ? [...table.tBodies[0].rows].map((row) => [row.cells[0].textContent, row]) : []);
  const chosen = new Map();

  const describe = (number) => {
    const row = rows.get(number);
    if (!row) return "trial " + number;
    const texts = [...row.cells].map((cell, at) => [heads[at], cell.textContent]);
    return texts.filter(([, text]) => text !== "").map((pair) => pair.join(" ")).join(", ");
  };
  const point = (number) => {
    for (const mark of marks) mark.classList.toggle("near", mark.dataset.trial === number);
    for (const [own, row] of rows) row.classList.toggle("near", own === number);
    said.textContent = number === undefined ? left() : describe(number);
  };
  const passes = (line) => [...chosen].every(([at, [low, high]]) => line.ys[at] >= low && line.ys[at] <= high);
  const left = () => {
    if (!chosen.size) return usual;
    const kept = lines.filter(passes).map((line) => line.number);
    return kept.length + " of " + lines.length + " trials: " + kept.sort((a, b) => a - b).join(", ");
  };
  const choose = () => {
    const kept = new Set(lines.filter(passes).map((line) => line.number));
    for (const mark of marks) mark.classList.toggle("far", !kept.has(mark.dataset.trial));
    for (const [number, row] of rows) row.hidden = chosen.size > 0 && !kept.has(number);
    said.textContent = left();
  };

  for (const mark of marks) {
    mark.addEventListener("pointerenter", () => point(mark.dataset.trial));
    mark.addEventListener("pointerleave", () => point(undefined));
  }
  for (const [number, row] of rows) {
    row.addEventListener("pointerenter", () => point(number));
    row.addEventListener("pointerleave", () => point(undefined));
  }

  const brushes = [...plot.querySelectorAll(".brush")];
  [...plot.querySelectorAll(".axis-area")].forEach((area, at) => {
    let from = null;
    const place = (event) => {
      const box = plot.getBoundingClientRect();
      return ((event.clientY - box.top) / box.height) * plot.viewBox.baseVal.height;
    };
    const drawn = (event) => [Math.min(from, place(event)), Math.max(from, place(event))];
    area.addEventListener("pointerdown", (event) => {
      from = place(event);
      area.setPointerCapture(event.pointerId);
    });
    area.addEventListener("pointermove", (event) => {
      if (from === null) return;
      const [low, high] = drawn(event);
      brushes[at].setAttribute("y", low);
      brushes[at].setAttribute("height", high - low);
    });
    area.addEventListener("pointerup", (event) => {
      const [low, high] = drawn(event);
      from = null;
      if (high - low < 4) {
        chosen.delete(at);
        brushes[at].setAttribute("height", 0);
      } else {
        chosen.set(at, [low, high]);
      }
      choose();
    });
  });
})();
