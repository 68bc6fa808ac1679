// Parallel coordinates: pointing at a line highlights its trial everywhere, dragging along an axis selects the trials
// that pass there.
"use strict";
(() => {
  const plot = document.getElementById("parallel");
  const status = document.getElementById("pointed");
  const table = document.getElementById("trials");
  if (!plot) return;
  const hint = status.textContent;
  const lines = [...plot.querySelectorAll("path.trial")].map((path) => ({
    path,
    number: path.dataset.trial,
    ys: path.dataset.ys.split(" ").map(Number),
  }));
  const marks = [...document.querySelectorAll("[data-trial]")];
  const heads = table ? [...table.tHead.rows[0].cells].map((cell) => cell.textContent) : [];
  const rows = new Map(table ? [...table.tBodies[0].rows].map((row) => [row.cells[0].textContent, row]) : []);
  const ranges = new Map();

  const describe = (number) => {
    const row = rows.get(number);
    if (!row) return "trial " + number;
    const texts = [...row.cells].map((cell, column) => [heads[column], cell.textContent]);
    return texts.filter(([, text]) => text !== "").map((pair) => pair.join(" ")).join(", ");
  };
  const point = (number) => {
    for (const mark of marks) mark.classList.toggle("near", mark.dataset.trial === number);
    for (const [other, row] of rows) row.classList.toggle("near", other === number);
    status.textContent = number === undefined ? summary() : describe(number);
  };
  const passes = (line) => [...ranges].every(([axis, [low, high]]) => line.ys[axis] >= low && line.ys[axis] <= high);
  const summary = () => {
    if (!ranges.size) return hint;
    const selected = lines.filter(passes).map((line) => line.number);
    return selected.length + " of " + lines.length + " trials: " + selected.sort((a, b) => a - b).join(", ");
  };
  const select = () => {
    const selected = new Set(lines.filter(passes).map((line) => line.number));
    for (const mark of marks) mark.classList.toggle("far", !selected.has(mark.dataset.trial));
    for (const [number, row] of rows) row.hidden = ranges.size > 0 && !selected.has(number);
    status.textContent = summary();
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
  [...plot.querySelectorAll(".axis-area")].forEach((area, axis) => {
    let from = null;
    const position = (event) => {
      const box = plot.getBoundingClientRect();
      return ((event.clientY - box.top) / box.height) * plot.viewBox.baseVal.height;
    };
    const dragged = (event) => [Math.min(from, position(event)), Math.max(from, position(event))];
    area.addEventListener("pointerdown", (event) => {
      from = position(event);
      area.setPointerCapture(event.pointerId);
    });
    area.addEventListener("pointermove", (event) => {
      if (from === null) return;
      const [low, high] = dragged(event);
      brushes[axis].setAttribute("y", low);
      brushes[axis].setAttribute("height", high - low);
    });
    area.addEventListener("pointerup", (event) => {
      const [low, high] = dragged(event);
      from = null;
      if (high - low < 4) {
        ranges.delete(axis);
        brushes[axis].setAttribute("height", 0);
      } else {
        ranges.set(axis, [low, high]);
      }
      select();
    });
  });
})();
