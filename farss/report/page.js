"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const PRINT_WIDTH = 660;
  let printing = false;

  // theme:NAME -> the colour --NAME of the page; print is always light
  function painter() {
    const style = getComputedStyle(printing ? document.querySelector(".light") : document.documentElement);
    const paint = (value) => {
      if (typeof value === "string") {
        return value.startsWith("theme:") ? style.getPropertyValue("--" + value.slice(6)).trim() : value;
      }
      if (Array.isArray(value)) return value.map(paint);
      if (value && typeof value === "object") {
        return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, paint(inner)]));
      }
      return value;
    };
    return paint;
  }

  function template(narrow) {
    const axis = {
      gridcolor: "theme:grid", linecolor: "theme:grid", zeroline: false, automargin: true, ticks: "", ticklabelstandoff: 5,
      title: { standoff: 10, font: { size: 13, color: "theme:soft" } }, tickfont: { size: 12, color: "theme:soft" },
    };
    return { layout: {
      font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: "theme:ink" },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      margin: { l: narrow ? 8 : 16, r: narrow ? 4 : 12, t: 26, b: 16 },
      xaxis: axis, yaxis: axis, dragmode: false, hovermode: "closest",
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 12, color: "theme:soft" } },
      hoverlabel: { bgcolor: "theme:card", bordercolor: "theme:grid", font: { size: 13, color: "theme:ink" }, align: "left" },
    } };
  }

  function draw(name, index) {
    const place = document.getElementById("plot-" + name);
    if (!place) return;
    const width = printing ? PRINT_WIDTH : place.clientWidth;
    const chosen = figures[name][index];
    const { data, layout } = painter()({ data: chosen.data, layout: { ...chosen.layout, template: template(width < 520) } });
    const columns = layout.meta && layout.meta.columns;
    if (columns && (width - 90) / columns < 25) data.forEach((trace) => { trace.texttemplate = ""; });
    Plotly.react(place, data, { ...layout, width }, { displayModeBar: false, scrollZoom: false, doubleClick: false });
  }

  const chooser = (name) => document.querySelector('select[data-for="' + name + '"]');
  const drawAll = () => Object.keys(figures).forEach((name) => {
    const select = chooser(name);
    draw(name, select ? Number(select.value) : 0);
  });

  Object.keys(figures).forEach((name) => {
    const select = chooser(name);
    if (select) select.addEventListener("change", () => draw(name, Number(select.value)));
  });
  let known = window.innerWidth;
  let waiting = 0;
  window.addEventListener("resize", () => {
    if (window.innerWidth === known) return;
    known = window.innerWidth;
    clearTimeout(waiting);
    waiting = setTimeout(drawAll, 120);
  });
  dark.addEventListener("change", drawAll);
  window.addEventListener("beforeprint", () => { printing = true; drawAll(); });
  window.addEventListener("afterprint", () => { printing = false; drawAll(); });
  drawAll();
})();
