/* The page of the memory calculator: knobs in, bars and a table out. The formulas are in memory.js, translated from reference/memory. */
"use strict";

const memory = modules["reference.memory"];
const COLOURS = {
  weights: "#56606b", "adapter weights": "#8a949e", "master weights": "#9aa5b0",
  gradients: "#e69f00", "adapter gradients": "#e69f00", "optimizer states": "#0072b2", "adapter states": "#0072b2",
  activations: "#009e73", "recomputed layer": "#66c4a8", "log-probabilities": "#cc79a7", "loss gradients": "#e3b4cf",
  temporaries: "#d55e00", "scores' gradients": "#a34a00", "step buffer": "#56b4e9",
};
const narrow = matchMedia("(max-width: 600px)");
const gb = (bytes) => python.format(bytes / 1e9, bytes < 1e10 ? ",.2f" : ",.1f", false);

/** What training_memory says for plain settings; the tests call this too. */
function answer({ shape, recipe, ...settings }) {
  return python.call(null, memory.training_memory, [memory.SHAPES[shape], memory.RECIPES[recipe]], settings);
}

function settings(form) {
  const read = {};
  for (const field of form.elements) {
    if (field.type === "checkbox") read[field.name] = field.checked;
    else if (field.type === "range") read[field.name] = 2 ** Number(field.value);
    else if (field.name) read[field.name] = field.value;
  }
  read.targets = read.targets === "all-linear" ? read.targets : read.targets.split(",");
  const card = Number(read.card);
  delete read.card;
  return [read, card];
}

/** Bars of all moments of the step, each divided into what is there. */
function bars(breakdown, card) {
  const moments = Object.entries(breakdown.moments);
  const [left, width, row] = narrow.matches ? [125, 240, 34] : [165, 560, 34];
  const scale = (width - 70) / Math.max(breakdown.peak, card * 1e9 < 2.5 * breakdown.peak ? card * 1e9 : 0);
  const drawn = moments.map(([moment, there], i) => {
    let x = left;
    const parts = Object.entries(there).map(([kind, bytes]) => {
      const part = `<rect x="${x}" y="${i * row + 4}" width="${bytes * scale}" height="${row - 10}" fill="${COLOURS[kind]}"><title>${kind}: ${gb(bytes)} GB</title></rect>`;
      x += bytes * scale;
      return part;
    });
    const total = python.sum(Object.values(there));
    const bold = moment === breakdown.moment ? ' font-weight="700"' : "";
    return `<text x="${left - 8}" y="${i * row + 22}" text-anchor="end"${bold}>${moment}</text>${parts.join("")}<text x="${x + 6}" y="${i * row + 22}"${bold}>${gb(total)}</text>`;
  });
  const height = moments.length * row + 4;
  const line = card && card * 1e9 * scale <= width - 70 + 1 ? `<line x1="${left + card * 1e9 * scale}" x2="${left + card * 1e9 * scale}" y1="0" y2="${height}" stroke="#d55e00" stroke-width="2" stroke-dasharray="5 4"/>` : "";
  const said = moments.map(([moment, there]) => `${moment} ${gb(python.sum(Object.values(there)))} GB`).join(", ");
  return `<svg viewBox="0 0 ${left + width} ${height}" role="img" aria-label="Memory at the moments of a step: ${said}">${drawn.join("")}${line}</svg>`;
}

function show(form) {
  for (const range of form.querySelectorAll("[data-power]")) {
    range.parentElement.querySelector("b").textContent = python.format(2 ** Number(range.value), ",", false);
    range.setAttribute("aria-valuetext", 2 ** Number(range.value));
  }
  const [read, card] = settings(form);
  const lora = !memory.RECIPES[read.recipe].trains_base;
  form.elements.rank.disabled = form.elements.targets.disabled = !lora;
  const [peak, verdict, error] = ["peak", "verdict", "error"].map((id) => document.getElementById(id));
  try {
    const breakdown = answer(read);
    error.textContent = "";
    peak.textContent = `${gb(breakdown.peak)} GB`;
    const room = card - breakdown.peak / 1e9;
    const fits = card ? (room >= 0 ? ` It fits into ${card} GB with ${gb(room * 1e9)} GB to spare.` : ` It needs ${gb(-room * 1e9)} GB more than ${card} GB.`) : "";
    verdict.textContent = `The fullest moment: ${breakdown.moment}.${fits}`;
    document.getElementById("bars").innerHTML = bars(breakdown, card);
    const at = breakdown.moments[breakdown.moment];
    const body = document.querySelector("#lines tbody");
    body.replaceChildren(
      ...Object.entries(breakdown.lines).map(([kind, line]) => {
        const tr = document.createElement("tr");
        const swatch = `<svg width="12" height="12" aria-hidden="true"><rect width="12" height="12" fill="${COLOURS[kind]}"/></svg> `;
        tr.innerHTML = `<td>${swatch}${kind}</td><td class="number">${python.format(line.bytes / 1e9, ",.3f", false)}</td><td></td>`;
        tr.lastChild.textContent = line.formula + (kind in at || !line.bytes ? "" : " (not at the fullest moment)");
        return tr;
      }),
    );
  } catch (problem) {
    error.textContent = problem.message;
  }
  dispatchEvent(new Event("resize")); // the table may have become wider than its place
}

document.addEventListener("DOMContentLoaded", () => {
  const form = document.getElementById("knobs");
  for (const [name, values, chosen] of [["shape", memory.SHAPES, "Llama-2-7B"], ["recipe", memory.RECIPES, "QLoRA"]]) {
    for (const value of Object.keys(values)) form.elements[name].append(new Option(value, value, value === chosen, value === chosen));
  }
  form.addEventListener("input", () => show(form));
  narrow.addEventListener("change", () => show(form));
  form.addEventListener("submit", (event) => event.preventDefault());
  show(form);
});
