"use strict";
(function () {
  const data = JSON.parse(document.getElementById("data").textContent);
  const tip = document.getElementById("tip");

  // Use text, and never HTML, because the data comes from a file.
  function show(text, x, y) {
    tip.textContent = text;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const left = Math.min(Math.max(x + 14, 8), window.innerWidth - box.width - 8);
    const above = y - box.height - 12;
    tip.style.transform = "translate(" + Math.max(left, 8) + "px," + (above > 8 ? above : y + 18) + "px)";
  }
  const marks = [];
  function hide() {
    tip.hidden = true;
    while (marks.length) marks.pop()();
  }
  function mark(parent, kind, style) {
    const element = document.createElement("i");
    element.className = kind;
    Object.assign(element.style, style);
    parent.appendChild(element);
    marks.push(() => element.remove());
  }
  function follow(element, act) {
    const moved = (event) => { hide(); act(event); };
    element.addEventListener("pointermove", moved);
    element.addEventListener("pointerdown", moved);
    element.addEventListener("pointerleave", hide);
  }

  for (const strip of document.querySelectorAll(".strip")) {
    follow(strip, (event) => {
      const index = event.target.dataset.i;
      if (index === undefined) return;
      event.target.classList.add("on");
      marks.push(() => event.target.classList.remove("on"));
      show(data.layers[index], event.clientX, event.clientY);
    });
  }

  for (const heat of document.querySelectorAll(".heat")) {
    const map = data.maps[heat.dataset.map];
    const cells = atob(map.cells);
    const columns = map.frequencies.length, rows = map.layers.length;
    follow(heat, (event) => {
      const box = heat.getBoundingClientRect();
      const column = Math.floor((event.clientX - box.left) / box.width * columns);
      const row = Math.floor((event.clientY - box.top) / box.height * rows);
      if (column < 0 || row < 0 || column >= columns || row >= rows) return;
      const step = cells.charCodeAt(row * columns + column);
      const kept = map.kept[row][column] === "1";
      const words = step === 255 ? "cut away" : step / 2 + " % of the layer's largest" + (kept ? "" : ", cut away");
      mark(heat, "cell", {
        left: 100 * column / columns + "%", top: 100 * row / rows + "%",
        width: 100 / columns + "%", height: 100 / rows + "%",
      });
      show(map.layers[row] + "\nfrequency (" + map.frequencies[column] + ")\n" + words, event.clientX, event.clientY);
    });
  }

  for (const area of document.querySelectorAll(".area")) {
    const points = data.charts[area.dataset.chart];
    follow(area, (event) => {
      const box = area.getBoundingClientRect();
      // The texts of bars appear anywhere above or below them.
      const high = area.dataset.bars === undefined ? box.height : 0;
      let best = null, least = high ? 40 * 40 : Infinity;
      for (const [x, y, text] of points) {
        const dx = box.left + x * box.width / 100 - event.clientX;
        const dy = high && box.top + y * high / 100 - event.clientY;
        if (dx * dx + dy * dy < least) { least = dx * dx + dy * dy; best = [x, y, text]; }
      }
      if (!best) return;
      mark(area, "ring", { left: best[0] + "%", top: best[1] + "%" });
      show(best[2], event.clientX, event.clientY);
    });
  }

  document.addEventListener("scroll", hide, { passive: true });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
  // Open all details before the page is printed.
  window.addEventListener("beforeprint", () => {
    for (const one of document.querySelectorAll("details")) one.open = true;
  });
})();
