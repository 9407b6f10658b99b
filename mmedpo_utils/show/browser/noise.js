// Noise: where it lies, how much of the signal it keeps, and what the Med-LVLM still says.

const CHART = { width: 300, height: 170, left: 34, right: 8, top: 8, bottom: 30 };

function view(values, arrays) {
  const [, height, width] = arrays.films.shape;
  const state = { asked: 0, place: 1, signal: 4, seed: 0, outlines: true };

  const clean = panel(width, height, 300, "the film with the mask");
  const noised = panel(width, height, 300, "the noised film");
  const chart = element("canvas", { role: "img" });
  const density = window.devicePixelRatio || 1;
  chart.width = CHART.width * density;
  chart.height = CHART.height * density;
  chart.style.width = `${CHART.width}px`;
  chart.style.background = "#fff";
  const chartCaption = element("figcaption", {}, "Probability of the true answer by signal kept");

  const askedChoice = choice("question", values.asked.map((one) => one.label), 0, (asked) =>
    set({ asked }),
  );
  const placeChoice = element("span");
  const signalSlider = slider("signal kept", state.signal, 0, values.signals.length - 1, 1, (n) =>
    set({ signal: n }),
  );
  const seedChoice = choice("seed", values.seeds.map(String), 0, (seed) => set({ seed }));
  const controls = element(
    "div",
    { class: "row controls" },
    askedChoice,
    placeChoice,
    signalSlider,
    seedChoice,
    tick("true lesions", state.outlines, (outlines) => set({ outlines })),
    sizes([clean, noised]),
  );
  const told = status();

  const asked = () => values.asked[state.asked];
  const place = () => asked().places[state.place];
  const isReleased = () => place().name === values.released;
  const maskOf = (index) => part(arrays.masks, index);

  /** Where the answers to one strength of the chosen place are kept. */
  function answerAt(signal) {
    const strengths = isReleased() ? 1 : values.signals.length;
    return place().first + state.seed * strengths + (isReleased() ? 0 : signal);
  }

  function readAsked() {
    const names = asked().places.map(({ name }) => name);
    state.place = Math.min(state.place, names.length - 1);
    const made = choice("noise on", names, state.place, (chosen) => set({ place: chosen }));
    placeChoice.replaceChildren(made);
  }

  function noisedPixels() {
    const film = part(arrays.films, state.asked);
    const noise = part(arrays.noise, state.seed);
    const mask = maskOf(place().mask);
    const kept = values.kept[state.signal];
    const signal = Math.sqrt(kept);
    const spread = 255 * Math.sqrt(1 - kept);
    const released = isReleased();
    const hidden = new Float32Array(film);
    for (let n = 0; n < film.length; n += 1) {
      if (!mask[n]) continue;
      // The released code wraps its noise at 256, the paper's is cut at black and white.
      if (released) hidden[n] = ((Math.trunc(10 * noise[n]) % 256) + 256) % 256;
      else hidden[n] = signal * film[n] + spread * noise[n];
    }
    return greyPixels(hidden);
  }

  function draw(changes) {
    if (changes.includes("asked")) readAsked();
    const slide = signalSlider.querySelector("input");
    slide.disabled = isReleased();
    const signal = values.signals[state.signal];
    signalSlider.querySelector("output").textContent = isReleased() ? "none" : signal.toFixed(2);
    seedChoice.querySelector("select").disabled = !isReleased() && signal === 1;
    const film = part(arrays.films, state.asked);
    const mask = { path: outline(maskOf(place().mask), width, height), colour: "#f0e442" };
    const lesion = [];
    if (state.outlines && asked().lesion !== null) {
      lesion.push({ path: outline(maskOf(asked().lesion), width, height), colour: "#56b4e9" });
    }
    clean.paint(greyPixels(film), [mask, ...lesion]);
    noised.paint(noisedPixels(), lesion);
    const share = maskOf(place().mask).reduce((sum, value) => sum + value, 0) / film.length;
    clean.caption.textContent = `yellow: the noise's mask, ${(100 * share).toFixed(0)}% of the film`;
    const at = answerAt(state.signal);
    const sure = arrays.sure.data[at].toFixed(2);
    const isTrue = arrays.true.data[at].toFixed(2);
    noised.caption.textContent = `The model says "${values.said[at]}", probability ${sure}`;
    const truth = `the true answer, "${asked().truth}", has ${isTrue}`;
    told.textContent = `${place().name}. ${noised.caption.textContent}; ${truth}.`;
    noised.canvas.setAttribute("aria-label", told.textContent);
    paintChart();
  }

  /** The true answer's probability at every strength of the chosen place; the chosen one marked. */
  function paintChart() {
    const context = chart.getContext("2d");
    context.setTransform(density, 0, 0, density, 0, 0);
    context.clearRect(0, 0, CHART.width, CHART.height);
    context.font = "11px system-ui, sans-serif";
    context.fillStyle = "#000";
    context.strokeStyle = "#888";
    context.lineWidth = 1;
    const across = (signal) =>
      CHART.left + signal * (CHART.width - CHART.left - CHART.right);
    const down = (share) => CHART.top + (1 - share) * (CHART.height - CHART.top - CHART.bottom);
    context.beginPath();
    context.moveTo(across(0), down(1));
    context.lineTo(across(0), down(0));
    context.lineTo(across(1), down(0));
    context.stroke();
    context.fillText("1", 20, down(1) + 8);
    context.fillText("0", 20, down(0));
    context.fillText("0", across(0) - 3, down(0) + 13);
    context.fillText("1", across(1) - 6, down(0) + 13);
    context.fillText("signal kept", across(0.5) - 28, down(0) + 26);
    const shares = values.signals.map((_, n) => arrays.true.data[answerAt(n)]);
    context.strokeStyle = "#0072b2";
    context.lineWidth = 1.8;
    context.beginPath();
    values.signals.forEach((signal, n) => context.lineTo(across(signal), down(shares[n])));
    if (isReleased()) context.setLineDash([4, 3]);
    context.stroke();
    context.setLineDash([]);
    context.fillStyle = "#d55e00";
    context.beginPath();
    const signal = values.signals[state.signal];
    context.arc(across(signal), down(shares[state.signal]), 4, 0, 2 * Math.PI);
    context.fill();
    const list = shares.map((share) => share.toFixed(2)).join(", ");
    chart.setAttribute("aria-label", `Probability of the true answer by signal kept: ${list}`);
  }

  const set = changer(state, draw);
  draw(["asked"]);
  return element(
    "div",
    {},
    controls,
    element(
      "div",
      { class: "row" },
      clean.figure,
      noised.figure,
      element("figure", {}, chart, chartCaption),
    ),
    told,
  );
}
