// The Med-LVLM's attention, word by word: models side by side and their difference, by layer and
// head, as raw attention, rollout, or gradient times attention.

const METHODS = [
  ["raw attention", "What one head, or the mean of several, mixes in when it writes the word."],
  [
    "rollout",
    "The layers' means multiplied, as if all information flowed through attention; it knows no head.",
  ],
  [
    "gradient times attention",
    "What raises the word's log-probability to first order, where attention is; negative parts are left out.",
  ],
];
const RISE = [230, 159, 0];
const FALL = [86, 180, 233];
const WALL_TILE = 40;
const LARGEST_WALL = 64; // tiles; a larger network gets one square a head instead
// Changes that leave the walls as they are.
const ONLY_THE_LARGE = ["layer", "head", "method", "smooth", "sinks", "outlines"];
const SINK = 5; // times the median cell

function view(values, arrays) {
  const [, height, width] = arrays.films.shape;
  const state = {
    asked: 0,
    words: values.models.map(() => 0),
    layer: -1, // -1: the mean of all
    head: -1,
    method: 0,
    threshold: 0.1,
    opacity: 0.9,
    smooth: false,
    sinks: true,
    outlines: true,
  };
  const [, layers, heads, cells] = arrays["raw 0 0"].shape;
  const two = values.models.length === 2;

  const panels = values.models.map((name) => {
    const made = panel(width, height, 280, name);
    const words = element("div");
    made.figure.prepend(element("b", {}, name), words);
    return { ...made, words };
  });
  const change = panel(width, height, 280, "difference");
  change.figure.prepend(element("b", {}, "difference"));

  const numbered = (count, what) => [
    "mean of all",
    ...Array.from({ length: count }, (_, n) => `${what} ${n + 1}`),
  ];
  const layerChoice = choice("layer", numbered(layers, "layer"), 0, (n) => set({ layer: n - 1 }));
  const headChoice = choice("head", numbered(heads, "head"), 0, (n) => set({ head: n - 1 }));
  const methodChoice = choice("method", METHODS.map(([name]) => name), 0, (method) =>
    set({ method }),
  );
  const question = element("p", { class: "note" });
  const methodNote = element("p", { class: "note" });
  const told = status();
  const controls = element(
    "div",
    { class: "row controls" },
    choice("question", values.asked.map((one) => one.label), 0, (asked) => set({ asked })),
    methodChoice,
    layerChoice,
    headChoice,
    slider("threshold", state.threshold, 0, 1, 0.05, (threshold) => set({ threshold })),
    slider("opacity", state.opacity, 0, 1, 0.05, (opacity) => set({ opacity })),
    tick("smooth", state.smooth, (smooth) => set({ smooth })),
    tick("attention sinks", state.sinks, (sinks) => set({ sinks })),
    tick("true lesions", state.outlines, (outlines) => set({ outlines })),
    sizes([...panels, change]),
  );

  const key = (kind, model) => `${kind} ${state.asked} ${model}`;

  /** The chosen map of one model's chosen word; it sums to what goes to the image. */
  function mapOf(model, layer = state.layer, head = state.head) {
    const word = state.words[model];
    if (state.method === 1) return Float32Array.from(part(arrays[key("rollout", model)], word));
    const chosen = [];
    for (let l = 0; l < layers; l += 1) {
      if (layer >= 0 && layer !== l) continue;
      if (state.method === 2) {
        chosen.push(part(arrays[key("gradient", model)], word, l));
        continue;
      }
      for (let h = 0; h < heads; h += 1) {
        if (head < 0 || head === h) chosen.push(part(arrays[key("raw", model)], word, l, h));
      }
    }
    const map = meanOf(chosen);
    if (!state.sinks) sinksOf(model).forEach((sink, n) => (map[n] = sink ? 0 : map[n]));
    return map;
  }

  const sinksKnown = {};
  /** Cells that draw attention whatever word is written: over five times the median cell. */
  function sinksOf(model) {
    const name = key("raw", model);
    if (!(name in sinksKnown)) {
      const { data, shape } = arrays[name];
      const rows = shape[0] * layers * heads;
      const all = Array.from({ length: rows }, (_, n) => data.subarray(n * cells, (n + 1) * cells));
      const mean = meanOf(all);
      const median = quantile(mean, 0.5);
      sinksKnown[name] = Array.from(mean, (value) => value > SINK * median);
    }
    return sinksKnown[name];
  }

  let lesions = [];
  let union = null;

  function readAsked() {
    const asked = values.asked[state.asked];
    lesions = lesionsOf(asked.masks, arrays.masks, width, height);
    union = unionOf(lesions);
    state.words = state.words.map(() => 0);
    question.textContent = `${asked.question} True answer: ${asked.truth}`;
    panels.forEach((panel, model) => {
      const { words, probabilities } = asked.readings[model];
      const buttons = words.map((word, n) => {
        const sure = probabilities[n].toFixed(2);
        return element("button", { title: `probability ${sure}` }, `${word} ${sure}`);
      });
      const made = radios(`words of ${values.models[model]}`, buttons, buttons.length, (word) => {
        const chosen = [...state.words];
        chosen[model] = word;
        set({ words: chosen });
      });
      made.group.className = "words";
      made.group.append(...buttons);
      made.choose(0);
      panel.words.replaceChildren(made.group);
    });
  }

  const film = () => part(arrays.films, values.asked[state.asked].film);
  const atSize = (map) => (state.smooth ? upsampled : inCells)(map, width, height);
  const percent = (share) => `${(100 * share).toFixed(0)}%`;

  function draw(changes) {
    if (changes.includes("asked")) readAsked();
    layerChoice.querySelector("select").disabled = state.method === 1;
    headChoice.querySelector("select").disabled = state.method !== 0;
    methodNote.textContent = METHODS[state.method][1];
    const maps = values.models.map((_, model) => mapOf(model));
    const full = Math.max(...maps.map(largest));
    const said = maps.map((map, model) => paintMap(map, model, full));
    if (two) paintChange(maps);
    if (changes.some((name) => !ONLY_THE_LARGE.includes(name))) paintWalls();
    markChosen();
    told.textContent = said.join(" ");
  }

  function paintMap(map, model, full) {
    const panel = panels[model];
    const heat = atSize(map);
    const pixels = blend(film(), heat, full, state, arrays.colours.data);
    panel.paint(pixels, state.outlines ? lesions : [], heat);
    const { words } = values.asked[state.asked].readings[model];
    const parts = [`"${words[state.words[model]]}"`];
    if (state.method === 0) {
      const sum = map.reduce((total, value) => total + value, 0);
      parts.push(`${percent(sum)} of the attention on the image`);
    }
    if (union) {
      const cellsOfFilm = inCells(map, width, height);
      const area = union.reduce((total, value) => total + value, 0) / union.length;
      parts.push(`${percent(shareInside(cellsOfFilm, union))} of that in the lesions`);
      parts.push(`which are ${percent(area)} of the film`);
    }
    panel.caption.textContent = parts.join(" · ");
    panel.canvas.setAttribute("aria-label", `${values.models[model]}: ${parts.join(", ")}`);
    return `${values.models[model]}: ${parts.join(", ")}.`;
  }

  /** The second model's map minus the first one's, each as shares; a box where it rose most. */
  function paintChange(maps) {
    const shares = maps.map((map) => {
      const sum = map.reduce((total, value) => total + value, 0) || 1;
      return map.map((value) => value / sum);
    });
    const rise = shares[1].map((value, n) => value - shares[0][n]);
    const most = largest(rise.map(Math.abs)) || 1;
    const heat = atSize(rise);
    const pixels = new Uint8ClampedArray(4 * heat.length);
    const below = film();
    for (let n = 0; n < heat.length; n += 1) {
      const strength = Math.min(Math.abs(heat[n]) / most, 1);
      const alpha = strength < state.threshold ? 0 : state.opacity * strength;
      const colour = heat[n] > 0 ? RISE : FALL;
      for (let channel = 0; channel < 3; channel += 1) {
        pixels[4 * n + channel] = below[n] * (1 - alpha) + colour[channel] * alpha;
      }
      pixels[4 * n + 3] = 255;
    }
    const box = { path: boxOf(rise), colour: "#e69f00", dash: [4, 3] };
    change.paint(pixels, [...(state.outlines ? lesions : []), box]);
    const names = values.models;
    change.caption.textContent =
      `orange: more attention in ${names[1]}, blue: more in ${names[0]}; ` +
      "the box holds the cells that rose by half of the largest rise or more";
  }

  function boxOf(rise) {
    const grid = Math.round(Math.sqrt(rise.length));
    const most = largest(rise);
    const path = new Path2D();
    if (most <= 0) return path;
    const places = [...rise.keys()].filter((n) => rise[n] >= most / 2);
    const columns = places.map((n) => n % grid);
    const rows = places.map((n) => Math.floor(n / grid));
    const across = width / grid;
    const down = height / grid;
    const left = Math.min(...columns);
    const top = Math.min(...rows);
    path.rect(
      left * across,
      top * down,
      (Math.max(...columns) - left + 1) * across,
      (Math.max(...rows) - top + 1) * down,
    );
    return path;
  }

  const small = layers * heads <= LARGEST_WALL;
  const walls = values.models.map((name, model) => {
    const tiles = Array.from({ length: layers * heads }, (_, place) => {
      const layer = Math.floor(place / heads);
      const title = `${name}, layer ${layer + 1}, head ${(place % heads) + 1}`;
      const tile = small ? picture(WALL_TILE, WALL_TILE, WALL_TILE, title) : null;
      const button = element("button", { title, "aria-label": title });
      if (tile) button.append(tile.canvas);
      else button.append(element("i", { style: "display:block;width:7px;height:7px" }));
      return { tile, button };
    });
    const buttons = tiles.map((tile) => tile.button);
    const wall = radios(`layers and heads of ${name}`, buttons, heads, (place) => {
      set({ layer: Math.floor(place / heads), head: place % heads, method: 0 });
    });
    wall.group.className = "wall";
    wall.group.style.gridTemplateColumns = `repeat(${heads}, max-content)`;
    if (!small) wall.group.style.gap = "0";
    wall.group.append(...buttons);
    const title = `${name}: layers down, heads across`;
    const figure = element("figure", {}, wall.group, element("figcaption", {}, title));
    return { tiles, choose: wall.choose, figure };
  });

  /** Every head's map of the word; in a large network, its share of attention on the image. */
  function paintWalls() {
    const smallFilm = small ? reduced(film(), width, height, WALL_TILE) : null;
    walls.forEach(({ tiles }, model) => {
      const raw = arrays[key("raw", model)];
      tiles.forEach(({ tile, button }, place) => {
        const row = part(raw, state.words[model], Math.floor(place / heads), place % heads);
        if (tile) {
          const heat = inCells(row, WALL_TILE, WALL_TILE);
          tile.paint(blend(smallFilm, heat, largest(row) || 1, state, arrays.colours.data));
        } else {
          const sum = row.reduce((total, value) => total + value, 0);
          const colour = 3 * Math.round(255 * Math.min(sum, 1));
          const [red, green, blue] = arrays.colours.data.subarray(colour, colour + 3);
          button.firstChild.style.background = `rgb(${red}, ${green}, ${blue})`;
        }
      });
    });
  }

  function markChosen() {
    walls.forEach(({ tiles, choose }) => {
      choose(state.layer >= 0 && state.head >= 0 ? state.layer * heads + state.head : -1);
      if (state.layer < 0 || state.head < 0) tiles[0].button.tabIndex = 0;
    });
    layerChoice.querySelector("select").selectedIndex = state.layer + 1;
    headChoice.querySelector("select").selectedIndex = state.head + 1;
    methodChoice.querySelector("select").selectedIndex = state.method;
  }

  const set = changer(state, draw);
  draw(["asked"]);
  return element(
    "div",
    {},
    controls,
    question,
    element("div", { class: "row" }, ...panels.map((panel) => panel.figure), ...(two ? [change.figure] : [])),
    element("div", { class: "row" }, ...walls.map((wall) => wall.figure)),
    methodNote,
    told,
  );
}
