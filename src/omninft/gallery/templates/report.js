// Values under the pointer, or under the arrow keys, for every chart with `data-hover` (see figures.line_chart).
(() => {
  "use strict";

  document.querySelectorAll("svg[data-hover]").forEach((chart) => {
    const points = JSON.parse(chart.dataset.hover); // [x, heading, [[series, value], ...]]
    const cursor = chart.querySelector(".cursor");
    const readout = chart.parentElement.querySelector(".readout");
    const width = chart.viewBox.baseVal.width;
    let index = points.length - 1;

    const say = () => {
      const [, heading, values] = points[index];
      readout.textContent = `${heading}: ${values.map(([name, value]) => `${name} ${value}`.trim()).join(", ")}`;
    };
    const show = (next) => {
      index = Math.max(0, Math.min(points.length - 1, next));
      cursor.setAttribute("x1", points[index][0]);
      cursor.setAttribute("x2", points[index][0]);
      cursor.setAttribute("visibility", "visible");
      say();
    };
    const hide = () => {
      cursor.setAttribute("visibility", "hidden");
      index = points.length - 1;
      say();
    };

    chart.addEventListener("pointermove", (event) => {
      const place = chart.getBoundingClientRect();
      const x = ((event.clientX - place.left) / place.width) * width;
      let best = 0;
      points.forEach((point, i) => { if (Math.abs(point[0] - x) < Math.abs(points[best][0] - x)) best = i; });
      show(best);
    });
    chart.addEventListener("pointerleave", hide);
    chart.addEventListener("focus", () => show(index));
    chart.addEventListener("blur", hide);
    chart.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step) return;
      show(index + step);
      event.preventDefault();
    });
    say();
  });
})();
