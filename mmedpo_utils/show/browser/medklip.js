// MedKLIP's attention: a finding's own map beside that of "disease", every layer and head, the true
// lesions where they are known, and the mask and the noise that the map would give.

const TILE = 56; // pixels of a small map on the wall
const LARGE = 300; // pixels of a large one
// Changes that leave the wall, or mask and noise, or all maps as they are.
const ONLY_THE_LARGE = ["cell", "smooth", "outlines", "quantile", "signal"];
const ONLY_THE_NOISE = ["quantile", "signal"];
const MASK_NEEDS = ["film", "cell", "quantile"];
const ONLY_THE_MAPS = ["query", "threshold", "opacity", "smooth", "own"];

function view(values, arrays) {
  const [, height, width] = arrays.films.shape;
  const [, layers, heads] = arrays.maps.shape;
  const disease = values.queries.indexOf(values.query);
  const columns = heads + 1;
  const state = {
    film: 0,
    query: disease,
    cell: layers * columns + heads, // of the wall: the mean of all
    threshold: 0.2,
    opacity: 0.8,
    smooth: true,
    own: true,
    outlines: true,
    quantile: values.quantile,
    signal: values.signal,
  };

  /** The map of a place on the wall; its last row and column are means. */
  function mapAt(query, cell) {
    const layer = Math.floor(cell / columns);
    const head = cell % columns;
    const chosen = [];
    for (let l = 0; l < layers; l += 1) {
      for (let h = 0; h < heads; h += 1) {
        if ((layer === layers || layer === l) && (head === heads || head === h)) {
          chosen.push(part(arrays.maps, state.film, l, h, query));
        }
      }
    }
    return chosen.length === 1 ? chosen[0] : meanOf(chosen);
  }

  function nameOf(cell) {
    const layer = Math.floor(cell / columns);
    const head = cell % columns;
    const parts = [];
    if (layer < layers) parts.push(`layer ${layer + 1}`);
    if (head < heads) parts.push(`head ${head + 1}`);
    return parts.length ? parts.join(", ") : "mean of all";
  }

  const chosen = panel(width, height, LARGE, "the chosen finding");
  const whole = panel(width, height, LARGE, values.query);
  const masked = panel(width, height, LARGE, "the mask");
  const noised = panel(width, height, LARGE, "the noised film");

  const walls = Array.from({ length: (layers + 1) * columns }, (_, cell) => {
    const small = picture(TILE, TILE, TILE, nameOf(cell));
    const button = element("button", { title: nameOf(cell), "aria-label": nameOf(cell) });
    button.append(small.canvas);
    return { ...small, button };
  });
  const wall = radios(
    "layer and head",
    walls.map((one) => one.button),
    columns,
    (cell) => set({ cell }),
  );
  wall.group.className = "wall";
  wall.group.style.gridTemplateColumns = `repeat(${columns + 1}, max-content)`;
  wall.group.append(element("span"));
  for (let head = 0; head <= heads; head += 1) {
    wall.group.append(element("span", {}, head < heads ? `head ${head + 1}` : "mean"));
  }
  walls.forEach((one, cell) => {
    if (cell % columns === 0) {
      const layer = cell / columns;
      wall.group.append(element("span", {}, layer < layers ? `layer ${layer + 1}` : "mean"));
    }
    wall.group.append(one.button);
  });

  const told = status();
  const controls = element(
    "div",
    { class: "row controls" },
    choice("film", values.films, state.film, (film) => set({ film })),
    choice("finding", values.queries, state.query, (query) => set({ query })),
    slider("threshold", state.threshold, 0, 1, 0.05, (threshold) => set({ threshold })),
    slider("opacity", state.opacity, 0, 1, 0.05, (opacity) => set({ opacity })),
    tick("smooth", state.smooth, (smooth) => set({ smooth })),
    tick("each map on its own scale", state.own, (own) => set({ own })),
    tick("true lesions", state.outlines, (outlines) => set({ outlines })),
    slider("mask: share left out", state.quantile, 0.5, 0.95, 0.01, (quantile) =>
      set({ quantile }),
    ),
    slider("signal kept", state.signal, 0, 1, 0.05, (signal) => set({ signal })),
    sizes([chosen, whole, masked, noised]),
  );

  let lesions = [];
  let union = null;
  let smallFilm = null;
  let smooth = new Map(); // of this film, by finding and place on the wall

  /** The map of a place on the wall at the film's size. */
  function heatAt(query, cell) {
    const key = `${query} ${cell}`;
    if (!smooth.has(key)) smooth.set(key, upsampled(mapAt(query, cell), width, height));
    return smooth.get(key);
  }

  /** What depends on the film alone. */
  function readFilm() {
    smooth = new Map();
    lesions = lesionsOf(values.masks[state.film], arrays.masks, width, height);
    union = unionOf(lesions);
    smallFilm = reduced(part(arrays.films, state.film), width, height, TILE);
  }

  function truth(query) {
    if (values.queries[query] === values.query) return union;
    const found = lesions.find((lesion) => lesion.name === values.queries[query]);
    return found ? found.mask : null;
  }

  function paintMap(panelOf, query, cell, full) {
    const map = mapAt(query, cell);
    const film = part(arrays.films, state.film);
    const heat = state.smooth ? heatAt(query, cell) : inCells(map, width, height);
    const scale = state.own ? largest(map) : full;
    const pixels = blend(film, heat, scale, state, arrays.colours.data);
    panelOf.paint(pixels, state.outlines ? lesions : [], heat);
    return map;
  }

  function paintWall(full) {
    walls.forEach((one, cell) => {
      const map = mapAt(state.query, cell);
      const scale = state.own ? largest(map) : full;
      const heat = inCells(map, TILE, TILE);
      one.paint(blend(smallFilm, heat, scale, state, arrays.colours.data));
    });
  }

  function numbers(query, map, cell) {
    const parts = [`${values.queries[query]}: confidence ${confidence(query)}`];
    parts.push(`peak ${(largest(map) * map.length).toFixed(0)} times the mean cell`);
    parts.push(`${effectiveCells(map).toFixed(0)} effective cells`);
    const mask = truth(query);
    if (mask) {
      const inside = shareInside(inCells(map, width, height), mask);
      parts.push(`${(100 * inside).toFixed(0)}% of it in the true lesion`);
      parts.push(pointing(heatAt(query, cell), mask) ? "the peak hits" : "the peak misses");
    } else if (values.masksKnown) {
      parts.push("not on this film");
    }
    return parts.join(" · ");
  }

  function confidence(query) {
    return arrays.confidences.data[state.film * values.queries.length + query].toFixed(3);
  }

  /** Whether the map's highest pixel lies in the lesion, or at most 8 pixels beside it. */
  function pointing(heat, mask) {
    const peak = heat.indexOf(largest(heat));
    const x = peak % width;
    const y = Math.floor(peak / width);
    for (let row = Math.max(0, y - 8); row <= Math.min(height - 1, y + 8); row += 1) {
      for (let column = Math.max(0, x - 8); column <= Math.min(width - 1, x + 8); column += 1) {
        const near = (row - y) ** 2 + (column - x) ** 2 <= 64;
        if (near && mask[row * width + column]) return true;
      }
    }
    return false;
  }

  // What the noise would hide.
  let mask = null;
  let path = null;

  function readMask() {
    const heat = heatAt(disease, state.cell);
    const border = quantile(heat, state.quantile);
    mask = new Uint8Array(heat.length);
    for (let n = 0; n < heat.length; n += 1) mask[n] = heat[n] > border ? 1 : 0;
    path = { path: outline(mask, width, height), colour: "#f0e442" };
  }

  function paintMask() {
    const film = part(arrays.films, state.film);
    masked.paint(greyPixels(film), [path, ...(state.outlines ? lesions : [])]);
    let text = `The mask: the brightest ${(100 * (1 - state.quantile)).toFixed(0)}% of the map`;
    if (union) {
      const covered = shareInside(union, mask);
      text += ` · ${(100 * covered).toFixed(0)}% of the lesions inside`;
      text += ` · intersection over union ${overlap(mask, union).toFixed(2)}`;
    }
    masked.caption.textContent = text;
  }

  function paintNoise() {
    const film = part(arrays.films, state.film);
    const kept = state.signal;
    const spread = 255 * Math.sqrt(1 - kept * kept);
    const noise = arrays.noise.data;
    const hidden = new Float32Array(film);
    for (let n = 0; n < film.length; n += 1) {
      if (mask[n]) hidden[n] = spread * noise[n] + kept * film[n];
    }
    noised.paint(greyPixels(hidden), state.outlines ? lesions : []);
    noised.caption.textContent = `The noised film: ${(100 * kept).toFixed(0)}% of the signal kept`;
  }

  function draw(changes) {
    if (changes.some((name) => !ONLY_THE_NOISE.includes(name))) paintMaps(changes);
    if (changes.some((name) => MASK_NEEDS.includes(name))) readMask();
    if (changes.every((name) => ONLY_THE_MAPS.includes(name))) return;
    if (changes.some((name) => name !== "signal")) paintMask();
    paintNoise();
  }

  function paintMaps(changes) {
    const all = layers * columns + heads;
    const full = Math.max(largest(mapAt(state.query, all)), largest(mapAt(disease, all)));
    const map = paintMap(chosen, state.query, state.cell, full);
    const ofDisease = paintMap(whole, disease, state.cell, full);
    if (changes.some((name) => !ONLY_THE_LARGE.includes(name))) paintWall(full);
    chosen.caption.textContent = numbers(state.query, map, state.cell);
    whole.caption.textContent = numbers(disease, ofDisease, state.cell);
    const onFilm = lesions.map((lesion) => lesion.name).join(", ");
    const shown = `${values.films[state.film]}, ${nameOf(state.cell)}. `;
    const known = values.masksKnown ? `On the film: ${onFilm || "no finding"}. ` : "";
    told.textContent = shown + known + chosen.caption.textContent;
    const alt = `${values.films[state.film]}, attention of ${numbers(state.query, map, state.cell)}`;
    chosen.canvas.setAttribute("aria-label", alt);
  }

  const set = changer(state, (changes) => {
    if (changes.includes("film")) readFilm();
    draw(changes);
  });

  readFilm();
  wall.choose(state.cell);
  draw(Object.keys(state));
  return element(
    "div",
    {},
    controls,
    element("div", { class: "row" }, chosen.figure, whole.figure, wall.group),
    element("div", { class: "row" }, masked.figure, noised.figure),
    told,
  );
}
