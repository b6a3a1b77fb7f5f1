// Draws the charts of a report, and lets samples be filtered. charts.py says what a chart holds.
"use strict";
(() => {
  const HEIGHT = 220, LEFT = 52, RIGHT = 20, TOP = 10, BOTTOM = 24, COLORS = 8;
  const DASHES = ["", "6 4", "2 3", "8 3 2 3"];

  const element = (name, attributes, parent) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    parent?.append(made);
    return made;
  };

  const html = (name, kind, text, parent) => {
    const made = document.createElement(name);
    made.className = kind;
    made.textContent = text;
    parent?.append(made);
    return made;
  };

  const number = (x) => {
    if (x === null || x === undefined) return "not finite";
    const size = Math.abs(x);
    for (const [unit, letter] of [[1e12, "T"], [1e9, "G"], [1e6, "M"]])
      if (size >= unit) return `${+(x / unit).toPrecision(4)}${letter}`;
    if (size > 0 && size < 1e-3) return x.toExponential(2).replace(/\.?0+e/, "e");
    return size >= 1e4 ? `${+(x / 1e3).toPrecision(4)}k` : `${+x.toPrecision(4)}`;
  };

  const linearTicks = (low, high, count) => {
    const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].find((each) => each * power >= rough) * power;
    const ticks = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) ticks.push(i * step);
    return ticks;
  };

  const logTicks = (low, high) => {
    const ticks = [], decades = Math.log10(high / low);
    const steps = decades > 6 ? [1] : decades > 2 ? [1, 3] : [1, 2, 5];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      for (const step of steps) if (step * 10 ** power >= low && step * 10 ** power <= high) ticks.push(step * 10 ** power);
    return ticks.length > 1 ? ticks : linearTicks(low, high, 4);
  };

  const nearest = (xs, x) => {
    let low = 0, high = xs.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (xs[middle] < x) low = middle; else high = middle;
    }
    return Math.abs(xs[high] - x) < Math.abs(xs[low] - x) ? high : low;
  };

  const set_up = (figure) => {
    const chart = JSON.parse(figure.querySelector("script").textContent);
    const hidden = new Set(), whole = { from: Infinity, to: -Infinity };
    for (const curve of chart.curves) {
      whole.from = Math.min(whole.from, curve.x[0]);
      whole.to = Math.max(whole.to, curve.x[curve.x.length - 1]);
    }
    let view = whole, log = chart.log, scales = null;
    const positive = chart.curves.every((c) => c.y.every((y) => y === null || y > 0));
    const color = (i) => chart.curves.length > COLORS && !chart.colors
      ? `hsl(${(360 * i) / chart.curves.length} 60% 50%)` : `var(--c${chart.curves[i].color % COLORS})`;

    const caption = figure.querySelector("figcaption");
    const back = html("button", "tool", "whole", caption);
    const scale = html("button", "tool", "log scale", caption);
    back.hidden = true;
    scale.hidden = !positive;
    const svg = element("svg", { role: "img", "aria-label": chart.title, height: HEIGHT }, figure);
    const tip = html("div", "tip", "", figure);
    const legend = html("div", "legend", "", figure);

    const of_view = (curve) => {
      const points = [];
      curve.x.forEach((x, i) => { if (x >= view.from && x <= view.to) points.push(i); });
      return points;
    };

    const render = () => {
      const width = figure.clientWidth;
      if (!width) return;
      svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
      svg.setAttribute("width", width);
      svg.replaceChildren();
      const shown = chart.curves.map((curve, i) => ({ curve, i })).filter(({ i }) => !hidden.has(i));
      let low = Infinity, high = -Infinity;
      for (const { curve } of shown)
        for (const i of of_view(curve))
          for (const y of [curve.y[i], curve.low?.[i], curve.high?.[i]])
            if (y !== null && y !== undefined && !(log && y <= 0)) { low = Math.min(low, y); high = Math.max(high, y); }
      if (low > high) { low = log ? 0.1 : 0; high = 1; }
      if (low === high) { low -= Math.abs(low) * 0.05 || 0.5; high += Math.abs(high) * 0.05 || 0.5; }
      const to = log ? Math.log : (y) => y, pad = 0.05 * (to(high) - to(low));
      const bottom = to(low) - pad, top = to(high) + pad;
      const px = (x) => LEFT + ((x - view.from) / (view.to - view.from || 1)) * (width - LEFT - RIGHT);
      const py = (y) => HEIGHT - BOTTOM - ((to(y) - bottom) / (top - bottom)) * (HEIGHT - TOP - BOTTOM);
      scales = { px, py, x: (p) => view.from + ((p - LEFT) / (width - LEFT - RIGHT)) * (view.to - view.from), width };

      for (const y of log ? logTicks(Math.exp(bottom), Math.exp(top)) : linearTicks(bottom, top, 5)) {
        element("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: py(y), y2: py(y) }, svg);
        element("text", { class: "tick", x: LEFT - 6, y: py(y) + 4, "text-anchor": "end" }, svg).textContent = chart.percent
          ? `${+(100 * y).toPrecision(3)}%` : number(+y.toPrecision(12));
      }
      for (const x of linearTicks(view.from, view.to || 1, Math.max(2, Math.floor(width / 90))))
        element("text", { class: "tick", x: px(x), y: HEIGHT - 6, "text-anchor": "middle" }, svg).textContent = number(x);
      for (const x of chart.resumes) {
        if (x < view.from || x > view.to) continue;
        const line = element("line", { class: "resume", x1: px(x), x2: px(x), y1: TOP, y2: HEIGHT - BOTTOM }, svg);
        element("title", {}, line).textContent = `went on at step ${x}`;
      }
      for (const { curve, i } of shown) {
        const points = of_view(curve), ok = (ys, n) => ys[n] !== null && !(log && ys[n] <= 0);
        const path = (ys) => {
          let text = "", pen = "M";
          for (const n of points) {
            if (!ok(ys, n)) { pen = "M"; continue; }
            text += `${pen}${px(curve.x[n]).toFixed(1)} ${py(ys[n]).toFixed(1)}`;
            pen = "L";
          }
          return text;
        };
        const style = `stroke: ${color(i)}; stroke-dasharray: ${DASHES[curve.dash % 4] || "none"}`;
        if (curve.low) {
          const inside = points.filter((n) => ok(curve.low, n) && ok(curve.high, n));
          const edge = (n, ys) => `${px(curve.x[n]).toFixed(1)} ${py(ys[n]).toFixed(1)}`;
          const ring = [...inside.map((n) => edge(n, curve.high)), ...inside.reverse().map((n) => edge(n, curve.low))];
          element("polygon", { class: "band", style: `fill: ${color(i)}`, points: ring.join(" ") }, svg);
        }
        if (curve.smooth) element("path", { class: "raw", style, d: path(curve.y) }, svg);
        element("path", { class: "curve", style, d: path(curve.smooth ?? curve.y) }, svg);
        if (points.length <= 40 && !curve.smooth)
          for (const n of points)
            if (ok(curve.y, n)) element("circle", { style: `fill: ${color(i)}`, r: 2.2, cx: px(curve.x[n]), cy: py(curve.y[n]) }, svg);
        for (const n of points)
          if (curve.y[n] === null) element("text", { class: "broken", x: px(curve.x[n]), y: HEIGHT - BOTTOM - 3, "text-anchor": "middle" }, svg).textContent = "×";
      }
      scale.setAttribute("aria-pressed", log);
      back.hidden = view === whole;
    };

    const point = (event) => event.clientX - svg.getBoundingClientRect().left;
    let start = null, box = null, cross = null;

    const leave = () => {
      tip.style.display = "none";
      cross?.remove();
      cross = null;
    };

    const hover = (event) => {
      cross?.remove();
      const at = scales.x(point(event));
      cross = element("g", {}, svg);
      const rows = [];
      let step = null;
      chart.curves.forEach((curve, i) => {
        const points = hidden.has(i) ? [] : of_view(curve);
        if (!points.length) return;
        const n = points[nearest(points.map((each) => curve.x[each]), at)], y = curve.y[n];
        if (step === null || Math.abs(curve.x[n] - at) < Math.abs(step - at)) step = curve.x[n];
        rows.push({ i, n, y, x: curve.x[n], curve });
        if (y !== null && !(log && y <= 0))
          element("circle", { class: "dot", style: `stroke: ${color(i)}`, r: 3.5, cx: scales.px(curve.x[n]), cy: scales.py(y) }, cross);
      });
      if (step === null) return leave();
      element("line", { class: "cross", x1: scales.px(step), x2: scales.px(step), y1: TOP, y2: HEIGHT - BOTTOM }, cross);
      tip.replaceChildren();
      html("b", "", `step ${step.toLocaleString("en")}`, tip);
      for (const { i, n, y, x, curve } of rows) {
        const row = html("span", "", "", tip);
        html("i", "key", "", row).style.background = color(i);
        const range = curve.low ? ` [${number(curve.low[n])}, ${number(curve.high[n])}]` : "";
        row.append(`${curve.name} ${number(y)}${range}${x === step ? "" : ` (step ${x})`}`);
      }
      tip.style.display = "grid";
      const left = scales.px(step), right = left > scales.width / 2;
      tip.style.left = right ? "auto" : `${left + 12}px`;
      tip.style.right = right ? `${scales.width - left + 12}px` : "auto";
      tip.style.top = `${caption.offsetHeight + 14}px`;
    };

    svg.addEventListener("pointerdown", (event) => { if (event.button === 0) { start = point(event); svg.setPointerCapture(event.pointerId); } });
    svg.addEventListener("pointermove", (event) => {
      if (start === null) return hover(event);
      const now = Math.min(Math.max(point(event), LEFT), scales.width - RIGHT);
      if (Math.abs(now - start) < 6) return;
      leave();
      box ??= element("rect", { class: "box", y: TOP, height: HEIGHT - TOP - BOTTOM }, svg);
      box.setAttribute("x", Math.min(now, start));
      box.setAttribute("width", Math.abs(now - start));
    });
    svg.addEventListener("pointerup", (event) => {
      if (box) {
        const from = Number(box.getAttribute("x")), to = from + Number(box.getAttribute("width"));
        view = { from: Math.max(scales.x(from), whole.from), to: Math.min(scales.x(to), whole.to) };
        if (!chart.curves.some((curve) => of_view(curve).length > 1)) view = whole;
        box.remove();
        box = null;
        render();
      } else if (event.pointerType === "touch") hover(event);
      start = null;
    });
    svg.addEventListener("pointercancel", () => { box?.remove(); start = box = null; });
    svg.addEventListener("pointerleave", () => { if (start === null) leave(); });
    const reset = () => { view = whole; render(); };
    svg.addEventListener("dblclick", reset);
    back.addEventListener("click", reset);
    scale.addEventListener("click", () => { log = !log; render(); });
    if (chart.curves.length > 1)
      chart.curves.forEach((curve, i) => {
        const key = html("button", "entry", "", legend);
        const line = element("svg", { width: 18, height: 8 }, key);
        element("line", { x1: 0, x2: 18, y1: 4, y2: 4, style: `stroke: ${color(i)}; stroke-dasharray: ${DASHES[curve.dash % 4] || "none"}` }, line);
        key.append(curve.name);
        key.addEventListener("click", () => {
          if (!hidden.delete(i)) hidden.add(i);
          key.classList.toggle("off", hidden.has(i));
          render();
        });
      });
    new ResizeObserver(render).observe(figure);
  };

  document.querySelectorAll("figure.chart").forEach(set_up);
  document.querySelectorAll(".filters").forEach((filters) => {
    filters.addEventListener("change", (event) => {
      const kind = event.target.value;
      filters.nextElementSibling.querySelectorAll(".sample").forEach((sample) => {
        sample.hidden = kind !== "all" && !sample.dataset.kinds.split(" ").includes(kind);
      });
    });
  });
})();
