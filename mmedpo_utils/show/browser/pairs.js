// Preference pairs: both sides with a wipe between their films, the words in which they differ, the
// score and the debate that gave it, and what words alone give away.

const ANY = "any";

function view(values, arrays) {
  const [, height, width] = arrays.films.shape;
  const state = { pair: 0, source: 0, finding: 0, origin: 0, least: 0, wipe: 0.5 };
  const kinds = {};
  for (const key of ["source", "finding", "origin"]) {
    const found = new Set(values.pairs.map((pair) => pair[key]).filter(Boolean));
    kinds[key] = [ANY, ...[...found].sort()];
  }

  function kept() {
    const numbers = [...values.pairs.keys()];
    return numbers.filter((n) => {
      const pair = values.pairs[n];
      const weight = pair.weight === null ? 0 : pair.weight;
      const fits = (key) => state[key] === 0 || pair[key] === kinds[key][state[key]];
      return fits("source") && fits("finding") && fits("origin") && weight >= state.least;
    });
  }

  const shown = panel(width, height, 320, "the pair's films");
  const question = element("p", { class: "note" });
  const sides = element("div", { class: "sides" });
  const debate = element("div");
  const told = status();
  const pairChoice = choice("pair", [], 0, (pair) => set({ pair }));
  const wipe = slider("wipe", state.wipe, 0, 1, 0.01, (place) => set({ wipe: place }));
  const controls = element(
    "div",
    { class: "row controls" },
    choice("source", kinds.source, 0, (source) => set({ source })),
    choice("finding", kinds.finding, 0, (finding) => set({ finding })),
    choice("origin", kinds.origin, 0, (origin) => set({ origin })),
    slider("relevance at least", 0, 0, 1, 0.05, (least) => set({ least })),
    pairChoice,
    wipe,
    sizes([shown]),
  );

  /** The film of the rejected side: the preferred side's, with what the noise changes added. */
  function rejectedFilm(pair, film) {
    if (pair.change === null) return film;
    return part(arrays.changes, pair.change).map((change, n) => (film[n] + change) & 255);
  }

  function paintFilms(pair) {
    const film = part(arrays.films, pair.film);
    const other = rejectedFilm(pair, film);
    const border = Math.round(state.wipe * width);
    const joined = film.map((value, n) => (n % width < border ? value : other[n]));
    const line = new Path2D();
    line.moveTo(border, 0);
    line.lineTo(border, height);
    const drawn = pair.change === null ? [] : [{ path: line, colour: "#f0e442" }];
    shown.paint(greyPixels(joined), drawn);
    let sides = "left of the line the preferred side's film, right of it the rejected one's";
    if (pair.change === null) {
      const missing = pair.source === "visual";
      sides = missing ? "the noised film is not at hand" : "both sides have this film";
    }
    shown.caption.textContent = `${pair.image}: ${sides}`;
    shown.canvas.setAttribute("aria-label", shown.caption.textContent);
  }

  function side(title, words) {
    const text = element("p");
    for (const [word, differs] of words) {
      text.append(differs ? element("mark", {}, word) : word, " ");
    }
    return element("div", {}, element("b", {}, title), text);
  }

  function draw(changes) {
    const numbers = kept();
    if (changes.some((name) => name !== "pair" && name !== "wipe")) {
      state.pair = 0;
      refill(pairChoice, numbers.map((n) => values.pairs[n].label));
    }
    body.style.visibility = numbers.length ? "visible" : "hidden";
    if (!numbers.length) {
      told.textContent = "No pair fits these choices.";
      return;
    }
    const pair = values.pairs[numbers[state.pair]];
    paintFilms(pair);
    wipe.querySelector("input").disabled = pair.change === null;
    if (changes.every((name) => name === "wipe")) return;
    question.textContent = pair.question;
    sides.replaceChildren(side("preferred", pair.preferred), side("rejected", pair.rejected));
    const lines = pair.history.map((turn) => [turn.member, turn.score, turn.agrees, turn.reason]);
    const heads = ["member", "score", "agrees", "reason"];
    debate.replaceChildren(...(lines.length ? [table("the debate", heads, lines)] : []));
    const parts = [`Pair ${state.pair + 1} of ${numbers.length}`, `source ${pair.source}`];
    if (pair.origin) parts.push(`rejected answer ${pair.origin}`);
    if (pair.finding) parts.push(`finding ${pair.finding}`);
    parts.push(pair.weight === null ? "no relevance score" : `relevance ${pair.weight.toFixed(2)}`);
    if (pair.leak !== null) {
      parts.push(`by words alone the right side is told with ${(100 * pair.leak).toFixed(0)}%`);
    }
    told.textContent = `${parts.join(" · ")}.`;
  }

  const texts = element("div", { class: "text" }, question, sides, debate);
  const body = element("div", { class: "row" }, shown.figure, texts);
  const set = changer(state, draw);
  draw(Object.keys(state));
  return element("div", {}, controls, told, body);
}
