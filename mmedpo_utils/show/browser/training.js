// Training runs overlaid: one quantity by step, a line a run; the values at a step, and what the
// model answered to held-out questions at its looks.

const WIDE = 620;
const HIGH = 260;
const FEW_POINTS = 30;
const EDGE = { left: 52, right: 12, top: 8, bottom: 34 };

function view(values) {
  const state = { metric: 0, smooth: 5, step: values.lastStep, hidden: new Set() };
  const drawing = element("figure");
  const legend = element("div");
  const samples = element("div");
  const told = status();
  const ticks = values.runs.map((run, n) => {
    const label = tick(run.name, true, (on) => {
      const hidden = new Set(state.hidden);
      hidden[on ? "delete" : "add"](n);
      set({ hidden });
    });
    label.append(swatch(run));
    return label;
  });
  const controls = element(
    "div",
    { class: "row controls" },
    choice("quantity", values.metrics.map(({ name }) => name), 0, (metric) => set({ metric })),
    slider("mean of steps", state.smooth, 1, 20, 1, (smooth) => set({ smooth })),
    slider("step", state.step, 1, values.lastStep, 1, (step) => set({ step })),
    ...ticks,
  );

  function swatch({ colour, dash }) {
    const line = dash ? "dashed" : "solid";
    const style = `display:inline-block;width:22px;border-top:3px ${line} ${colour}`;
    return element("i", { style });
  }

  /** A run's points of the chosen quantity, each the mean of the last few. */
  function pointsOf(run) {
    const { key } = values.metrics[state.metric];
    const found = run.points[key] || [];
    let first = 0;
    return found.map(([step], n) => {
      // Of steps, not of points: looks at held-out pairs lie far apart, and stay as they are.
      while (found[first][0] <= step - state.smooth) first += 1;
      const last = found.slice(first, n + 1);
      return [step, last.reduce((sum, [, value]) => sum + value, 0) / last.length];
    });
  }

  function draw() {
    const runs = values.runs
      .map((run) => ({ ...run, points: pointsOf(run) }))
      .filter((run, n) => !state.hidden.has(n) && run.points.length);
    drawing.replaceChildren(lines(runs));
    const rows = runs.map((run) => {
      const reached = run.points.filter(([step]) => step <= state.step);
      const [step, value] = reached.length ? reached[reached.length - 1] : ["", null];
      return [run.name, step, value === null ? "" : value.toFixed(3)];
    });
    const { name } = values.metrics[state.metric];
    legend.replaceChildren(table(`${name} up to step ${state.step}`, ["run", "step", "value"], rows));
    const said = [];
    for (const run of values.runs.filter((_, n) => !state.hidden.has(n))) {
      const looks = run.looks.filter((look) => look.step <= state.step);
      if (!looks.length) continue;
      const look = looks[looks.length - 1];
      for (const { question, preferred, answer } of look.samples) {
        said.push([run.name, look.step, question, preferred, answer]);
      }
    }
    const heads = ["run", "step", "question", "preferred", "answer"];
    samples.replaceChildren(
      ...(said.length ? [table("answers at the last look before", heads, said)] : []),
    );
    told.textContent = `${name}: ${rows.map(([run, , value]) => `${run} ${value}`).join(", ")}.`;
  }

  function lines(runs) {
    const all = runs.map((run) => run.points).flat();
    const low = all.length ? Math.min(...all.map(([, value]) => value)) : 0;
    const high = all.length ? Math.max(...all.map(([, value]) => value)) : 1;
    const room = 0.05 * (high - low || 1);
    const across = (step) =>
      EDGE.left + ((WIDE - EDGE.left - EDGE.right) * step) / values.lastStep;
    const down = (value) => {
      const share = (value - low + room) / (high - low + 2 * room);
      return HIGH - EDGE.bottom - (HIGH - EDGE.top - EDGE.bottom) * share;
    };
    const { name } = values.metrics[state.metric];
    const picture = drawn("svg", {
      viewBox: `0 0 ${WIDE} ${HIGH}`,
      width: WIDE,
      role: "img",
      "aria-label": `${name} by step, ${runs.map((run) => run.name).join(", ")}`,
    });
    const text = (x, y, words, anchor) => {
      const place = { x, y, "text-anchor": anchor, "font-size": 11, fill: "currentColor" };
      const made = drawn("text", place);
      made.textContent = words;
      return made;
    };
    for (const value of roundValues(low, high)) {
      const y = down(value);
      const grid = { x1: EDGE.left, x2: WIDE - EDGE.right, y1: y, y2: y, stroke: "#8884" };
      picture.append(drawn("line", grid), text(EDGE.left - 5, y + 4, String(value), "end"));
    }
    for (const step of roundValues(0, values.lastStep)) {
      picture.append(text(across(step), HIGH - 18, String(step), "middle"));
    }
    picture.append(text(WIDE / 2, HIGH - 3, "step", "middle"));
    const x = across(state.step);
    const cursor = { x1: x, x2: x, y1: EDGE.top, y2: HIGH - EDGE.bottom, stroke: "currentColor" };
    picture.append(drawn("line", { ...cursor, "stroke-dasharray": "3 3" }));
    for (const run of runs) {
      const points = run.points.map(([step, value]) => `${across(step)},${down(value)}`);
      const style = { fill: "none", stroke: run.colour, "stroke-width": 2 };
      const dash = run.dash ? { "stroke-dasharray": run.dash } : {};
      picture.append(drawn("polyline", { points: points.join(" "), ...style, ...dash }));
      if (run.points.length >= FEW_POINTS) continue;
      for (const [step, value] of run.points) {
        const dot = { cx: across(step), cy: down(value), r: 2.5, fill: run.colour };
        picture.append(drawn("circle", dot));
      }
    }
    return picture;
  }

  const set = changer(state, draw);
  draw();
  return element(
    "div",
    {},
    controls,
    element("div", { class: "row" }, drawing, legend),
    samples,
    told,
  );
}

function drawn(tag, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

/** About five round numbers between two others. */
function roundValues(low, high) {
  const rough = (high - low || 1) / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const size = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((step) => step >= rough);
  const found = [];
  for (let n = Math.ceil(low / size); n * size <= high; n += 1) {
    found.push(Number((n * size).toPrecision(6)));
  }
  return found;
}
