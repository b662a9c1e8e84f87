// Pointing at a chart shows that step's exact numbers, as they stand in metrics.jsonl.
"use strict";
const rows = JSON.parse(document.getElementById("metrics").textContent);
for (const figure of document.querySelectorAll("figure[data-keys]")) {
  const svg = figure.querySelector("svg");
  const output = figure.querySelector("output");
  const cursor = figure.querySelector(".cursor");
  const keys = JSON.parse(figure.dataset.keys);
  const shown = rows.filter((row) => keys.some((key) => key in row));
  const [first, last, left, right] = ["first", "last", "left", "right"].map((name) => Number(svg.dataset[name]));
  const atRest = output.textContent;
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const step = first + ((x - left) / (right - left)) * (last - first);
    const row = shown.reduce((best, row) => (Math.abs(row.step - step) < Math.abs(best.step - step) ? row : best));
    const place = last > first ? left + ((row.step - first) / (last - first)) * (right - left) : (left + right) / 2;
    cursor.setAttribute("x1", place);
    cursor.setAttribute("x2", place);
    cursor.style.visibility = "visible";
    const short = (value) => (keys.length > 1 && typeof value === "number" ? value.toPrecision(3) : String(value ?? "not finite"));
    output.textContent = `step ${row.step}: ` + keys.map((key) => short(row[key])).join(" · ");
  });
  svg.addEventListener("pointerleave", () => {
    cursor.style.visibility = "hidden";
    output.textContent = atRest;
  });
}
