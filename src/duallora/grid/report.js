/* The page's plots (plotly, above), the buttons around them and the sorting of tables. Nothing is asked of the network. */
"use strict";
(() => {
  const sections = JSON.parse(document.getElementById("plots").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const drawn = [];

  function trace(line, ink, state, view) {
    const color = ink ? ink.color : css("--soft");
    const lost = line.mode === "lost";
    const floor = Math.min(...view.lines.flatMap((one) => one.y).filter((y) => typeof y === "number"));
    const found = {
      type: "scatter", mode: lost ? "markers" : line.mode, name: line.name || line.variant, x: line.x,
      y: lost ? line.x.map(() => floor) : line.y, visible: !line.variant || !state.hidden.has(line.variant),
      line: { color, width: line.wide ? 6 : ink ? ink.width : 1.5, dash: line.dash ? "dash" : "solid" }, opacity: line.wide ? 0.55 : 1,
      marker: {
        color: lost ? css("--bad") : color, size: 9,
        symbol: lost ? "x" : `${ink ? ink.symbol : "circle"}${line.filled === false ? "-open" : ""}`,
      },
    };
    if (lost) found.text = line.x.map((x) => `${line.variant} at ${x}: diverged`);
    else if (line.text) found.text = line.text;
    if (found.text) found.hovertemplate = "%{text}<extra></extra>";
    if (line.spread && line.along) {
      found[`error_${line.along}`] = { type: "data", symmetric: false, arrayminus: [line.spread[0]], array: [line.spread[1]], color, thickness: 1.3 };
    }
    return found;
  }

  function draw(plot) {
    const view = plot.views[plot.state.view];
    const inks = Object.fromEntries(plot.section.inks.map((ink) => [ink.name, ink]));
    const soft = css("--soft"), faint = css("--faint");
    const axis = (title, log) => ({
      title: { text: title }, type: log ? "log" : undefined, gridcolor: faint, linecolor: faint, zerolinecolor: faint, automargin: true,
      fixedrange: plot.element.clientWidth < 480,
    });
    const layout = {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: soft, size: 12 }, showlegend: false,
      margin: { l: 10, r: 14, t: 10, b: 10 }, hovermode: "closest", hoverlabel: { bgcolor: css("--card"), font: { color: css("--ink") } },
      xaxis: axis(view.x, plot.state.logx), yaxis: axis(view.y, plot.state.logy),
      height: view.y ? 360 : Math.max(220, 90 + 30 * new Set(view.lines.map((line) => line.variant)).size), autosize: true,
    };
    if (view.range && !plot.state.all) {
      layout.yaxis.range = plot.state.logy ? view.range.map((y) => Math.log10(Math.max(y, 1e-12))) : view.range;
    }
    if (view.turned) layout.xaxis.autorange = "reversed";
    const upright = (x, color, dash) => ({ type: "line", x0: x, x1: x, yref: "paper", y0: 0, y1: 1, line: { color, width: 1, dash } });
    const chosen = view.lines.filter((line) => line.mode === "chosen" && !plot.state.hidden.has(line.variant));
    layout.shapes = chosen.map((line) => upright(line.x[0], inks[line.variant].color, "dot"));
    if (view.zero) layout.shapes.push(upright(0, soft, "solid"));
    const lines = view.lines.filter((line) => line.mode !== "chosen");
    const traces = lines.map((line) => trace(line, inks[line.variant], plot.state, view));
    const config = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d"], displayModeBar: "hover" };
    Plotly.react(plot.element, traces, layout, config);
    plot.element.setAttribute("aria-label", view.alt);
    const positive = (name) => view.lines.every((line) => line[name].every((v) => v === null || v > 0));
    plot.buttons.logx.hidden = !view.y || !positive("x");
    plot.buttons.logy.hidden = !view.y || !positive("y");
    plot.buttons.all.hidden = !view.range;
    if (view.range) plot.buttons.all.textContent = `all points (${view.outside} outside)`;
    for (const [name, button] of Object.entries(plot.buttons)) button.setAttribute("aria-pressed", String(plot.state[name]));
  }

  function button(text, pressed, act) {
    const made = document.createElement("button");
    made.type = "button";
    made.textContent = text;
    made.setAttribute("aria-pressed", String(pressed));
    made.addEventListener("click", act);
    return made;
  }

  function setUp(element, section) {
    const own = section.plots.find((one) => one.name === element.dataset.plot);
    const state = { view: 0, hidden: section.hidden, logx: Boolean(own.views[0].logx), logy: false, all: false };
    const plot = { ...own, section, element, state, buttons: {} };
    const bar = element.previousElementSibling;
    if (own.views.length > 1) {
      const choice = document.createElement("select");
      choice.setAttribute("aria-label", `${own.title}: what is shown`);
      own.views.forEach((view, at) => choice.add(new Option(view.label, at)));
      choice.addEventListener("change", () => {
        state.view = Number(choice.value);
        state.logx = Boolean(own.views[state.view].logx);
        draw(plot);
      });
      bar.append(choice);
    }
    for (const [name, text] of [["logx", "log x"], ["logy", "log y"], ["all", "all points"]]) {
      plot.buttons[name] = button(text, state[name], () => { state[name] = !state[name]; draw(plot); });
      bar.append(plot.buttons[name]);
    }
    draw(plot);
    drawn.push(plot);
  }

  function variants(section, bar) {
    section.hidden = new Set();
    for (const ink of section.inks) {
      const made = button(ink.name, true, () => {
        if (!section.hidden.delete(ink.name)) section.hidden.add(ink.name);
        made.setAttribute("aria-pressed", String(!section.hidden.has(ink.name)));
        drawn.filter((plot) => plot.section === section).forEach(draw);
      });
      made.style.setProperty("--ink-of", ink.color);
      bar.append(made);
    }
  }

  function sortable(table) {
    table.querySelectorAll("thead th").forEach((head, column) => {
      const made = button(head.textContent, false, () => {
        const up = head.getAttribute("aria-sort") !== "ascending";
        table.querySelectorAll("thead th").forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const value = (row) => {
          const text = row.children[column].querySelector("span").textContent.replaceAll(",", "");
          const number = parseFloat(text);
          return column && !Number.isNaN(number) ? number : column ? -Infinity : text;
        };
        const rows = [...table.tBodies[0].rows].sort((a, b) => {
          const [x, y] = [value(a), value(b)];
          return (x < y ? -1 : x > y ? 1 : 0) * (up ? 1 : -1);
        });
        table.tBodies[0].append(...rows);
      });
      made.removeAttribute("aria-pressed");
      head.replaceChildren(made);
    });
  }

  document.querySelectorAll("table").forEach(sortable);
  if (typeof Plotly === "undefined") return;
  const near = new IntersectionObserver((entries) => {
    for (const entry of entries.filter((one) => one.isIntersecting)) {
      near.unobserve(entry.target);
      setUp(entry.target, sections[entry.target.closest("section").id]);
    }
  }, { rootMargin: "600px" });
  document.querySelectorAll("section").forEach((element) => {
    const bar = element.querySelector(".variants");
    if (bar) variants(sections[element.id], bar);
  });
  document.querySelectorAll("[data-plot]").forEach((element) => near.observe(element));
  dark.addEventListener("change", () => drawn.forEach(draw));
})();
