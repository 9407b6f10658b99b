// Cases: one question, what every model answers, which errors that holds and what they cost; the
// film with its lesions, and with a model's attention on request.

const ANY = "any";

function view(values, arrays) {
  const [, height, width] = arrays.films.shape;
  const state = {
    place: 0,
    type: 0,
    finding: 0,
    kind: 0,
    differ: false,
    least: 0,
    attention: 0,
    opacity: 0.9,
    outlines: true,
  };
  const last = values.models.length - 1;
  const unique = (lists) => [ANY, ...[...new Set(lists.flat().filter(Boolean))].sort()];
  const types = unique(values.cases.map((one) => one.type));
  const findings = unique(values.cases.map((one) => one.finding));
  const kindsOf = (one) => one.answers.map((answer) => answer.errors).flat();
  const kinds = unique(values.cases.map(kindsOf));

  function kept() {
    const numbers = [...values.cases.keys()];
    return numbers.filter((n) => {
      const one = values.cases[n];
      const of = (key, options) => state[key] === 0 || one[key] === options[state[key]];
      const holds = state.kind === 0 || kindsOf(one).includes(kinds[state.kind]);
      const texts = one.answers.map((answer) => answer.text.trim().toLowerCase());
      const same = texts.every((text) => text === texts[0]);
      const costs = one.answers.map((answer) => answer.severity);
      const grave = state.least === 0 || Math.max(...costs) >= state.least;
      return of("type", types) && of("finding", findings) && holds && grave && !(state.differ && same);
    });
  }

  const shown = panel(width, height, 320, "the film");
  const question = element("p", { class: "note" });
  const answers = element("div");
  const told = status();
  const caseChoice = choice("case", [], 0, (place) => set({ place }));
  const opacity = slider("opacity", state.opacity, 0, 1, 0.05, (value) => set({ opacity: value }));
  const attentionNames = ["none", ...values.attention];
  const attentionChoice = choice("attention of", attentionNames, 0, (attention) =>
    set({ attention }),
  );
  const controls = element(
    "div",
    { class: "row controls" },
    choice("type", types, 0, (type) => set({ type })),
    choice("finding", findings, 0, (finding) => set({ finding })),
    ...(values.costsKnown
      ? [
          choice("kind of error", kinds, 0, (kind) => set({ kind })),
          slider("severity at least", 0, 0, 1, 0.05, (least) => set({ least })),
        ]
      : []),
    tick("models disagree", state.differ, (differ) => set({ differ })),
    caseChoice,
    ...(values.attention.length ? [attentionChoice, opacity] : []),
    ...(values.masksKnown
      ? [tick("true lesions", state.outlines, (outlines) => set({ outlines }))]
      : []),
    sizes([shown]),
  );

  const outlined = values.masks.map((listed) => lesionsOf(listed, arrays.masks, width, height));

  function paintFilm(one, number) {
    const film = part(arrays.films, one.film);
    const lesions = outlined[one.film];
    let heat = null;
    let full = 1;
    if (state.attention > 0) {
      const map = part(arrays.attention, state.attention - 1, number);
      heat = inCells(map, width, height);
      full = largest(map);
    }
    const pixels = blend(film, heat, full, { opacity: state.opacity, threshold: 0.1 }, arrays.colours.data);
    shown.paint(pixels, state.outlines ? lesions : [], heat);
    const names = lesions.map((lesion) => lesion.name).join(", ");
    const parts = [one.image];
    if (values.masksKnown) parts.push(`on the film: ${names || "no finding"}`);
    if (heat) parts.push(`attention of ${values.attention[state.attention - 1]}`);
    shown.caption.textContent = parts.join(" · ");
    shown.canvas.setAttribute("aria-label", shown.caption.textContent);
  }

  function draw(changes) {
    const numbers = kept();
    const ofPicture = ["place", "attention", "opacity", "outlines"];
    if (changes.some((name) => !ofPicture.includes(name))) {
      state.place = 0;
      refill(caseChoice, numbers.map((n) => values.cases[n].label));
    }
    opacity.querySelector("input").disabled = state.attention === 0;
    body.style.visibility = numbers.length ? "visible" : "hidden";
    if (!numbers.length) {
      told.textContent = "No case fits these choices.";
      return;
    }
    const number = numbers[state.place];
    const one = values.cases[number];
    paintFilm(one, number);
    question.textContent = one.question;
    const lines = [["ground truth", one.truth, "", "", ""]];
    for (const [model, answer] of one.answers.entries()) {
      const score = (100 * answer.score).toFixed(0);
      const mark = answer.score === 1 ? "✓" : answer.score === 0 ? "✗" : "~";
      const cost = answer.severity === null ? "" : answer.severity.toFixed(2);
      const wrong = answer.errors.join(", ");
      lines.push([values.models[model], answer.text, `${mark} ${score}`, wrong, cost]);
    }
    const heads = ["", "answer", "score", "errors", "severity"];
    const columns = values.costsKnown ? heads.length : 3;
    const cut = lines.map((line) => line.slice(0, columns));
    answers.replaceChildren(table("answers", heads.slice(0, columns), cut));
    const said = one.answers[last].text;
    told.textContent =
      `Case ${state.place + 1} of ${numbers.length}. ${one.question} ` +
      `Truth: ${one.truth}. ${values.models[last]}: ${said}.`;
  }

  const texts = element("div", { class: "text" }, question, answers);
  const body = element("div", { class: "row" }, shown.figure, texts);
  const set = changer(state, draw);
  draw(Object.keys(state));
  return element("div", {}, controls, told, body);
}
