"use strict";
(async () => {
  const data = JSON.parse(document.getElementById("report-data").textContent);
  const root = document.documentElement;
  const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const figures = {};

  for (const [name, item] of Object.entries(data.plots)) {
    await Bokeh.embed.embed_item(item, `plot-${name}`);
    figures[name] = Bokeh.documents[Bokeh.documents.length - 1].roots()[0];
  }

  // Colours come from the page's style sheet, so that screen, dark screen and paper each get their own.
  const paint = () => {
    for (const figure of Object.values(figures)) {
      for (const axis of [...figure.below, ...figure.left]) {
        axis.axis_label_text_color = colour("--soft");
        axis.major_label_text_color = colour("--soft");
        axis.major_tick_line_color = colour("--line");
      }
      for (const part of figure.center) {
        if ("grid_line_color" in part) part.grid_line_color = colour("--grid");
        const tag = part.tags.find((text) => text.startsWith("--"));
        if (tag && "line_color" in part) part.line_color = colour(tag);
        if (tag && "text_color" in part) part.text_color = colour(tag);
      }
      for (const renderer of figure.renderers) {
        const { glyph, data_source: source } = renderer;
        if (renderer.name === "points") {
          source.data = {
            ...source.data,
            fill: source.data.group.map((group) => colour(`--${group}`)),
            edge: source.data.group.map((group) => colour(group === "evaluated" ? "--evaluated" : "--front-edge")),
          };
          continue;
        }
        const tag = renderer.tags.find((text) => text.startsWith("--"));
        if (!tag) continue;
        if ("line_color" in glyph) glyph.line_color = { value: colour(tag) };
        if ("fill_color" in glyph) glyph.fill_color = { value: colour(tag) };
      }
    }
  };

  const front = figures.front;
  if (front) {
    const points = front.renderers.find((renderer) => renderer.name === "points").data_source;
    const edge = front.renderers.find((renderer) => renderer.name === "edge").data_source;
    const part = (name) => front.center.find((one) => one.name === name);
    const pick = { x: document.getElementById("axis-x"), y: document.getElementById("axis-y") };
    const log = { x: document.getElementById("log-x"), y: document.getElementById("log-y") };
    const make = (name) => new (Bokeh.Models.get(name))();

    const setAxis = (side, values) => {
      const { label, limit } = data.axes[pick[side].value];
      const shown = limit === null ? values : [...values, limit];
      const low = Math.min(...shown), high = Math.max(...shown);
      log[side].disabled = low <= 0;
      const logged = log[side].checked && low > 0;
      const axis = side === "x" ? front.below[0] : front.left[0];
      const grid = front.center.find((one) => "grid_line_color" in one && one.dimension === (side === "x" ? 0 : 1));
      if (front[`${side}_scale`].type !== (logged ? "LogScale" : "LinearScale")) {
        front[`${side}_scale`] = make(logged ? "LogScale" : "LinearScale");
        axis.ticker = make(logged ? "LogTicker" : "BasicTicker");
        grid.ticker = axis.ticker;
      }
      axis.axis_label = label;
      const pad = 0.07;
      const spread = logged ? high / low : high - low;
      const [start, end] = logged
        ? [low / Math.max(spread, 1.1) ** pad, high * Math.max(spread, 1.1) ** pad]
        : [low - pad * (spread || Math.abs(low) || 1), high + pad * (spread || Math.abs(high) || 1)];
      front[`${side}_range`].setv({ start, end, reset_start: start, reset_end: end });
    };

    // The lower envelope of the front in the two chosen axes, as steps towards the better side of both.
    const envelope = () => {
      const [mx, my] = [pick.x.value, pick.y.value];
      if (mx === my) return { x: [], y: [] };
      const turn = (metric, value) => (data.axes[metric].up ? -value : value);
      const rows = points.data.group
        .map((group, i) => [points.data.stands[i] || group === "chosen", points.data[mx][i], points.data[my][i]])
        .filter(([stands]) => stands)
        .sort((a, b) => turn(mx, a[1]) - turn(mx, b[1]) || turn(my, a[2]) - turn(my, b[2]));
      const kept = [];
      for (const row of rows) {
        if (!kept.length || turn(my, row[2]) < turn(my, kept[kept.length - 1][2])) kept.push(row);
      }
      return { x: kept.map((row) => row[1]), y: kept.map((row) => row[2]) };
    };

    const setLimit = (side) => {
      const { limit, limit_label: label } = data.axes[pick[side].value];
      part(`limit-${side}`).setv({ visible: limit !== null, location: limit });
      const { start, end } = front[`${side}_range`];
      const scaled = front[`${side}_scale`].type === "LogScale" ? Math.log : (value) => value;
      const late = side === "x" && limit !== null && scaled(limit) - scaled(start) > 0.6 * (scaled(end) - scaled(start));
      part(`label-${side}`).setv({
        visible: limit !== null,
        text: label,
        [side]: limit === null ? 0 : limit,
        text_align: late ? "right" : "left",
        x_offset: side === "y" ? 0 : late ? -5 : 5,
      });
    };

    const draw = () => {
      const [mx, my] = [pick.x.value, pick.y.value];
      points.data = { ...points.data, x: points.data[mx], y: points.data[my] };
      edge.data = envelope();
      setAxis("x", points.data[mx]);
      setAxis("y", points.data[my]);
      setLimit("x");
      setLimit("y");
      document.getElementById("front-says").textContent =
        `${data.axes[mx].label} across, ${data.axes[my].label} up.`;
    };
    const suggest = (side) => {
      const values = points.data[pick[side].value].filter((value) => value > 0);
      log[side].checked = !data.axes[pick[side].value].up && Math.max(...values) / Math.min(...values) > 8;
    };
    for (const side of ["x", "y"]) {
      pick[side].addEventListener("change", () => { suggest(side); draw(); });
      log[side].addEventListener("change", draw);
      suggest(side);
    }
    draw();
  }

  paint();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
  const closed = [];
  addEventListener("beforeprint", () => {
    root.dataset.print = "";
    for (const one of document.querySelectorAll("details:not([open])")) { one.open = true; closed.push(one); }
    paint();
  });
  addEventListener("afterprint", () => {
    delete root.dataset.print;
    for (const one of closed.splice(0)) one.open = false;
    paint();
  });
  root.dataset.ready = "";
})();
