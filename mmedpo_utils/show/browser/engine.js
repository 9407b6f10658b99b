// The picture engine: numbers out of the packed text, films and maps onto a canvas, and controls
// that work by mouse and by keys. A view's script comes after it and uses these functions.

/** Numbers again: what `pages.pack` has made of values and arrays. */
async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const raw = await new Response(stream).arrayBuffer();
  const headerLength = new DataView(raw).getUint32(0, true);
  const header = new TextDecoder().decode(new Uint8Array(raw, 4, headerLength));
  const { values, arrays } = JSON.parse(header);
  const found = {};
  let place = 4 + headerLength;
  for (const { name, kind, shape } of arrays) {
    const count = shape.reduce((product, size) => product * size, 1);
    const length = kind === "half" ? 2 * count : kind === "bits" ? Math.ceil(count / 8) : count;
    const part = raw.slice(place, place + length);
    found[name] = { shape, data: READERS[kind](part, count, shape) };
    place += length;
  }
  return { values, arrays: found };
}

const READERS = {
  bytes: (part) => new Uint8Array(part),
  half: (part) => Float32Array.from(new Uint16Array(part), floatOfHalf),
  bits: (part, count) => {
    const packed = new Uint8Array(part);
    return Uint8Array.from({ length: count }, (_, n) => (packed[n >> 3] >> (7 - (n & 7))) & 1);
  },
  // Each row holds the differences from pixel to pixel, modulo 256.
  film: (part, count, shape) => {
    const pixels = new Uint8Array(part);
    const width = shape[shape.length - 1];
    for (let n = 0; n < count; n += 1) {
      if (n % width) pixels[n] = (pixels[n] + pixels[n - 1]) & 255;
    }
    return pixels;
  },
};

function floatOfHalf(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

/** The part of an array at the first indices, as a view on the same numbers. */
function part(array, ...indices) {
  let size = array.data.length;
  let start = 0;
  indices.forEach((index, axis) => {
    size /= array.shape[axis];
    start += index * size;
  });
  return array.data.subarray(start, start + size);
}

/** Mean of several arrays of equal length. */
function meanOf(parts) {
  const mean = new Float32Array(parts[0].length);
  for (const values of parts) {
    for (let n = 0; n < mean.length; n += 1) mean[n] += values[n] / parts.length;
  }
  return mean;
}

/** A square map at the film's size: bilinear between cell centres, the border held. */
function upsampled(map, width, height) {
  const grid = Math.round(Math.sqrt(map.length));
  const across = between(grid, width);
  const down = between(grid, height);
  const values = new Float32Array(width * height);
  for (let y = 0; y < height; y += 1) {
    const top = down.first[y] * grid;
    const bottom = down.second[y] * grid;
    const low = down.share[y];
    for (let x = 0; x < width; x += 1) {
      const left = across.first[x];
      const right = across.second[x];
      const near = across.share[x];
      const above = map[top + left] * (1 - near) + map[top + right] * near;
      const below = map[bottom + left] * (1 - near) + map[bottom + right] * near;
      values[y * width + x] = above * (1 - low) + below * low;
    }
  }
  return values;
}

/** For each pixel of a row the two cells that it lies between, and the second one's share. */
function between(cells, pixels) {
  const first = new Int32Array(pixels);
  const second = new Int32Array(pixels);
  const share = new Float32Array(pixels);
  for (let pixel = 0; pixel < pixels; pixel += 1) {
    const place = ((pixel + 0.5) * cells) / pixels - 0.5;
    const held = Math.min(Math.max(place, 0), cells - 1);
    first[pixel] = Math.floor(held);
    second[pixel] = Math.min(first[pixel] + 1, cells - 1);
    share[pixel] = held - first[pixel];
  }
  return { first, second, share };
}

/** A square map at the film's size, every cell one plain square. */
function inCells(map, width, height) {
  const grid = Math.round(Math.sqrt(map.length));
  const values = new Float32Array(width * height);
  const columns = Int32Array.from({ length: width }, (_, x) => Math.floor((x * grid) / width));
  for (let y = 0; y < height; y += 1) {
    const row = Math.floor((y * grid) / height) * grid;
    for (let x = 0; x < width; x += 1) values[y * width + x] = map[row + columns[x]];
  }
  return values;
}

function largest(values) {
  let found = -Infinity;
  for (const value of values) found = value > found ? value : found;
  return found;
}

/** A film at a lower size: the mean of the pixels that fall into each. */
function reduced(film, width, height, size) {
  const sums = new Float32Array(size * size);
  const counts = new Float32Array(size * size);
  for (let y = 0; y < height; y += 1) {
    const row = Math.floor((y * size) / height) * size;
    for (let x = 0; x < width; x += 1) {
      const place = row + Math.floor((x * size) / width);
      sums[place] += film[y * width + x];
      counts[place] += 1;
    }
  }
  return sums.map((sum, n) => sum / counts[n]);
}

const BINS = 1024;

/**
 * The value below which a share of the numbers lies, as numpy's quantile. Only the numbers near it
 * are sorted: sorting all pixels of a film takes half a frame.
 */
function quantile(values, share) {
  const high = largest(values);
  let low = Infinity;
  for (const value of values) low = value < low ? value : low;
  if (!(high > low)) return low;
  const binOf = (value) => Math.min(Math.floor(((value - low) / (high - low)) * BINS), BINS - 1);
  const counts = new Int32Array(BINS);
  for (const value of values) counts[binOf(value)] += 1;
  const place = share * (values.length - 1);
  const below = Math.floor(place);
  const above = Math.min(below + 1, values.length - 1);
  let before = 0;
  let first = 0;
  while (before + counts[first] <= below) before += counts[first++];
  let last = first;
  for (let end = before + counts[first]; end <= above; end += counts[last]) last += 1;
  const near = values.filter((value) => binOf(value) >= first && binOf(value) <= last).sort();
  const [one, next] = [near[below - before], near[above - before]];
  return one + (place - below) * (next - one);
}

/**
 * A film with a map over it. The film shows through: the colour's opacity follows the value, and
 * what lies under the threshold is not painted. Without a map it is the film alone.
 *
 * heat: numbers at the film's size; full: the value that gets the last colour.
 */
function blend(film, heat, full, { opacity, threshold }, colours) {
  const pixels = greyPixels(film);
  if (!heat) return pixels;
  const lowest = threshold * full;
  for (let n = 0; n < film.length; n += 1) {
    if (!(heat[n] > 0 && heat[n] >= lowest)) continue;
    const share = Math.min(heat[n] / full, 1);
    const alpha = opacity * share;
    const below = film[n] * (1 - alpha);
    const colour = 3 * Math.round(255 * share);
    const place = 4 * n;
    pixels[place] = below + colours[colour] * alpha;
    pixels[place + 1] = below + colours[colour + 1] * alpha;
    pixels[place + 2] = below + colours[colour + 2] * alpha;
  }
  return pixels;
}

/** A grey film as pixels of a canvas; values are rounded and cut to 0 and 255. */
function greyPixels(film) {
  const pixels = new Uint8ClampedArray(4 * film.length);
  const grey = new Uint8ClampedArray(film);
  for (let n = 0; n < film.length; n += 1) {
    const place = 4 * n;
    pixels[place] = grey[n];
    pixels[place + 1] = grey[n];
    pixels[place + 2] = grey[n];
    pixels[place + 3] = 255;
  }
  return pixels;
}

/** The border between inside and outside of a mask, as a path in film pixels. */
function outline(mask, width, height) {
  const path = new Path2D();
  // Across, then down. Neighbours are one long line: a path of few parts is drawn fast.
  borders(mask, height, width, width, 1, (line, from, to) => {
    path.moveTo(from, line);
    path.lineTo(to, line);
  });
  borders(mask, width, height, 1, width, (line, from, to) => {
    path.moveTo(line, from);
    path.lineTo(line, to);
  });
  return path;
}

/**
 * Where neighbouring lines of a mask differ: `found(line, from, to)` for each stretch of the border
 * above line `line`. A line holds `length` pixels, `along` apart; lines lie `across` apart.
 */
function borders(mask, lines, length, across, along, found) {
  for (let line = 0; line <= lines; line += 1) {
    const here = line * across;
    let from = -1;
    for (let place = 0; place <= length; place += 1) {
      const at = here + place * along;
      const inside = place < length && line < lines && mask[at] > 0;
      const before = place < length && line > 0 && mask[at - across] > 0;
      if (inside !== before && from < 0) from = place;
      if (inside === before && from >= 0) {
        found(line, from, place);
        from = -1;
      }
    }
  }
}

/**
 * A canvas of one film.
 *
 * `paint(pixels, paths, heat)` draws; a path has a colour and maybe a dash, and where `heat` (at the
 * film's size) is given, the pointer is told its value. `resize(factor)` draws the same again,
 * larger.
 */
function picture(width, height, shown, label) {
  const canvas = document.createElement("canvas");
  const density = window.devicePixelRatio || 1;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", label);
  const small = document.createElement("canvas");
  small.width = width;
  small.height = height;
  const draft = small.getContext("2d");
  const context = canvas.getContext("2d");
  let last = null;

  function paint(pixels, paths = [], heat = null) {
    last = { pixels, paths, heat };
    canvas.title = "";
    draft.putImageData(new ImageData(pixels, width, height), 0, 0);
    // Bilinear: without a graphics card the better ways take half a frame.
    context.imageSmoothingQuality = "low";
    context.drawImage(small, 0, 0, canvas.width, canvas.height);
    context.save();
    const scale = canvas.width / width;
    context.scale(scale, scale);
    for (const { path, colour, dash = [] } of paths) {
      context.setLineDash(dash);
      // A dark line beneath keeps the outline visible on bright films and bright colours.
      context.lineWidth = (3.2 * density) / scale;
      context.strokeStyle = "#000";
      context.stroke(path);
      context.lineWidth = (1.6 * density) / scale;
      context.strokeStyle = colour;
      context.stroke(path);
    }
    context.restore();
  }

  function resize(factor) {
    const size = shown * factor;
    canvas.width = Math.round(size * density);
    canvas.height = Math.round((size * density * height) / width);
    canvas.style.width = `${size}px`;
    if (last) paint(last.pixels, last.paths, last.heat);
  }

  canvas.addEventListener("pointermove", (event) => {
    if (!last || !last.heat) return;
    const along = (place, length, pixels) =>
      Math.min(Math.floor((place / length) * pixels), pixels - 1);
    const x = along(event.offsetX, canvas.clientWidth, width);
    const y = along(event.offsetY, canvas.clientHeight, height);
    const mean = last.heat.reduce((sum, value) => sum + value, 0) / last.heat.length;
    if (!mean) return; // a gradient may be negative everywhere, and its map is empty
    canvas.title = `${(last.heat[y * width + x] / mean).toFixed(2)} times the mean cell`;
  });
  resize(1);
  return { canvas, paint, resize };
}

/** A picture with a caption under it, as one figure. */
function panel(width, height, shown, label) {
  const drawn = picture(width, height, shown, label);
  const caption = element("figcaption");
  return { ...drawn, caption, figure: element("figure", {}, drawn.canvas, caption) };
}

/** A choice of how large panels are shown. */
function sizes(panels) {
  const factors = [1, 1.5, 2, 3];
  const names = factors.map((factor) => `${100 * factor}%`);
  return choice("size", names, 0, (n) => panels.forEach((one) => one.resize(factors[n])));
}

// Lesions' outlines: blue to green, which the map's purple to yellow does not use.
const OUTLINES = ["#56b4e9", "#009e73", "#ffffff", "#0072b2", "#99ddff", "#44bb99", "#bbbbbb"];

/** The lesions of `listed` (name and index among the masks), each with its outline and colour. */
function lesionsOf(listed, masks, width, height) {
  return listed.map(({ name, index }, n) => {
    const mask = part(masks, index);
    const colour = OUTLINES[n % OUTLINES.length];
    return { name, mask, path: outline(mask, width, height), colour };
  });
}

/** All lesions as one mask; null where there is none. */
function unionOf(lesions) {
  if (!lesions.length) return null;
  const union = new Uint8Array(lesions[0].mask.length);
  for (const { mask } of lesions) {
    for (let n = 0; n < union.length; n += 1) union[n] |= mask[n];
  }
  return union;
}

/** An element with attributes and children; texts are set as text and never read as HTML. */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

// JupyterLab takes keys such as x (cut the cell) from a focused control that lacks this attribute.
const KEEP_KEYS = { "data-lm-suppress-shortcuts": "true" };

/** A labelled choice. `changed` gets the option's number. */
function choice(label, options, chosen, changed) {
  const select = element("select", {
    ...KEEP_KEYS,
    onchange: (event) => changed(event.target.selectedIndex),
  });
  options.forEach((option, n) => {
    const made = element("option", {}, option);
    made.selected = n === chosen;
    select.append(made);
  });
  return element("label", {}, label, select);
}

/** Give a choice other options; the first is chosen. */
function refill(label, options) {
  const select = label.querySelector("select");
  select.replaceChildren(...options.map((option) => element("option", {}, option)));
  select.disabled = !options.length;
}

/** A table with a caption; its cells are shown as text. */
function table(caption, heads, rows) {
  const made = element("table", {}, element("caption", {}, caption));
  made.append(element("tr", {}, ...heads.map((head) => element("th", { scope: "col" }, head))));
  for (const row of rows) {
    made.append(element("tr", {}, ...row.map((cell) => element("td", {}, String(cell)))));
  }
  return made;
}

/** A labelled slider that draws while it is dragged. */
function slider(label, value, low, high, step, changed) {
  const digits = step < 1 ? 2 : 0;
  const shown = element("output", {}, Number(value).toFixed(digits));
  const input = element("input", {
    ...KEEP_KEYS,
    type: "range",
    min: low,
    max: high,
    step,
    value,
    oninput: (event) => {
      shown.textContent = Number(event.target.value).toFixed(digits);
      changed(Number(event.target.value));
    },
  });
  return element("label", {}, label, input, shown);
}

/** A labelled box to tick. */
function tick(label, checked, changed) {
  const input = element("input", {
    ...KEEP_KEYS,
    type: "checkbox",
    onchange: (event) => changed(event.target.checked),
  });
  input.checked = checked;
  return element("label", {}, input, label);
}

/**
 * Buttons of which one is chosen, in rows and columns: arrow keys walk, one stop for Tab.
 *
 * Returns the element and a function that chooses without telling.
 */
function radios(label, buttons, columns, changed) {
  const group = element("div", { role: "radiogroup", "aria-label": label });
  function choose(number) {
    buttons.forEach((button, n) => {
      button.setAttribute("aria-checked", n === number);
      button.tabIndex = n === number ? 0 : -1;
    });
  }
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns };
  buttons.forEach((button, n) => {
    button.setAttribute("role", "radio");
    button.setAttribute("type", "button");
    button.setAttribute("data-lm-suppress-shortcuts", "true");
    button.addEventListener("click", () => {
      choose(n);
      changed(n);
    });
    button.addEventListener("keydown", (event) => {
      const next = n + (steps[event.key] || 0);
      if (next === n || next < 0 || next >= buttons.length) return;
      event.preventDefault();
      buttons[next].focus();
      choose(next);
      changed(next);
    });
  });
  return { group, choose };
}

/**
 * A function that sets values of a state and has the view drawn: at once, and what changes again
 * before the next frame is drawn together in that frame. `draw` gets the names of what has changed.
 */
function changer(state, draw) {
  const changed = new Set();
  let waiting = false;

  function drawChanged() {
    const names = [...changed];
    changed.clear();
    draw(names);
  }

  return (changes) => {
    Object.assign(state, changes);
    Object.keys(changes).forEach((name) => changed.add(name));
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      if (changed.size) drawChanged();
    });
    drawChanged();
  };
}

/** A line that a screen reader speaks when it changes. */
function status() {
  return element("p", { role: "status", "aria-live": "polite", class: "note" });
}

/** Share of a map inside a mask. Both at the film's size. */
function shareInside(heat, mask) {
  let all = 0;
  let inside = 0;
  for (let n = 0; n < heat.length; n += 1) {
    all += heat[n];
    if (mask[n]) inside += heat[n];
  }
  return all ? inside / all : 0;
}

/** Intersection over union of two masks. */
function overlap(one, other) {
  let both = 0;
  let either = 0;
  for (let n = 0; n < one.length; n += 1) {
    both += one[n] && other[n] ? 1 : 0;
    either += one[n] || other[n] ? 1 : 0;
  }
  return either ? both / either : 0;
}

/** How many cells a map would fill evenly: the exponential of its entropy. */
function effectiveCells(map) {
  const sum = map.reduce((total, value) => total + value, 0);
  let entropy = 0;
  for (const value of map) {
    if (value > 0) entropy -= (value / sum) * Math.log(value / sum);
  }
  return Math.exp(entropy);
}

/** Put a view in the place of its still picture, once in every copy of the output. */
async function start(name, packed, view) {
  const places = document.querySelectorAll(`[data-view="${name}"]:not([data-live])`);
  for (const place of places) {
    place.setAttribute("data-live", "true");
    try {
      const { values, arrays } = await unpack(packed);
      const made = view(values, arrays);
      place.replaceChildren(made);
    } catch (error) {
      // The still picture stays; what went wrong is said beneath it.
      place.append(element("p", { class: "note" }, `The live view did not start: ${error.message}`));
    }
  }
}
