"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const mouse = window.matchMedia("(pointer: fine)");
  const PRINT_WIDTH = 660;
  const PRINT_HEIGHT = 0.72;  // of the height on screen: two pictures to a page
  const SAVED_WIDTH = 960;
  let printing = false;

  // theme:NAME -> the colour --NAME of the page; what leaves the screen is always light
  function painter(light) {
    const style = getComputedStyle(light ? document.querySelector(".light") : document.documentElement);
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
      xaxis: axis, yaxis: axis, dragmode: mouse.matches ? "zoom" : false, hovermode: "closest",
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 12, color: "theme:soft" } },
      hoverlabel: { bgcolor: "theme:card", bordercolor: "theme:grid", font: { size: 13, color: "theme:ink" }, align: "left" },
    } };
  }

  function picture(name, index, width, light) {
    const chosen = figures[name][index];
    const { data, layout } = painter(light)({ data: chosen.data, layout: { ...chosen.layout, template: template(width < 520) } });
    const columns = layout.meta && layout.meta.columns;
    if (columns) layout.dragmode = false;
    if (columns && (width - 90) / columns < 25) data.forEach((trace) => { delete trace.texttemplate; });
    // what was zoomed or hidden stays so when the colours or the width change
    return { data, layout: { ...layout, width, uirevision: `choice ${index}` } };
  }

  function draw(name) {
    const place = document.getElementById("plot-" + name);
    if (!place) return;
    const { data, layout } = picture(name, chosenIndex(name), printing ? PRINT_WIDTH : place.clientWidth, printing);
    if (printing) layout.height *= PRINT_HEIGHT;
    Plotly.react(place, data, layout, { displayModeBar: false, scrollZoom: false, doubleClick: "reset" });
  }

  function save(name, kind) {
    const { data, layout } = picture(name, chosenIndex(name), SAVED_WIDTH, true);
    const white = { ...layout, paper_bgcolor: "#fff", plot_bgcolor: "#fff" };
    Plotly.downloadImage({ data, layout: white }, { format: kind, filename: name, width: SAVED_WIDTH, height: layout.height, scale: 2 });
  }

  const chooser = (name) => document.querySelector('select[data-for="' + name + '"]');
  const chosenIndex = (name) => (chooser(name) ? Number(chooser(name).value) : 0);
  const drawAll = () => Object.keys(figures).forEach(draw);

  Object.keys(figures).forEach((name) => {
    if (chooser(name)) chooser(name).addEventListener("change", () => draw(name));
  });
  document.querySelectorAll("[data-save]").forEach((button) => {
    button.parentElement.hidden = false;
    button.addEventListener("click", () => save(button.dataset.save, button.dataset.kind));
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
  const closed = () => document.querySelectorAll("details:not([open])");
  let opened = [];
  window.addEventListener("beforeprint", () => {
    printing = true;
    opened = [...closed()];
    opened.forEach((part) => { part.open = true; });
    drawAll();
  });
  window.addEventListener("afterprint", () => {
    printing = false;
    opened.forEach((part) => { part.open = false; });
    drawAll();
  });
  drawAll();
})();
