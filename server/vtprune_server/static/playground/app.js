// SPDX-License-Identifier: Apache-2.0
// The page: one picture, one question, one set of settings; what the server says of them is shown as it comes.

import { AnswerCard, median, showOutdated, showVerdict } from "./answers.js";
import { ApiError, ask, explain, getConfig, getModels, hasApiKey, setApiKey } from "./api.js";
import { drawCurve, rankAt, readCurve } from "./curve.js";
import { drawOverlay, patchAt, patchBeside } from "./overlay.js";
import { onFile, pictureFromCanvas, pictureFromFile } from "./picture.js";
import { SCENES, drawScene } from "./scenes.js";
import { SettingsPanel } from "./settings.js";
import { namesOf, partsOf } from "./parts.js";
import { POINT_HINT, curveNote, describeCurve, describePatch, describePicture, legend } from "./words.js";

const DEBOUNCE_MS = 60;
const ASK = "Ask pruned and full";
const PICTURE_HEIGHT = 432; // CSS pixels at most

const id = (name) => document.getElementById(name);

const state = {
  model: null,
  picture: null,
  explanation: null, // the server's last answer on what stays of it
  parts: [], // of that answer, each with a curve of its own
  patch: null, // the one pointed at
  asking: null, // AbortController while answers stream
  demo: false, // whether the server's model is the embedded one
};
const settings = new SettingsPanel({ onVision: refreshExplanation, onChange: markAnswersOutdated });
const cards = { pruned: new AnswerCard(id("pruned")), full: new AnswerCard(id("full")) };

// ---- the server -----------------------------------------------------------------------------------------------

async function connect() {
  try {
    // the models' route is under the API key wherever there is one: a missing key shows here, not at the first question
    const [models, config] = await Promise.all([getModels(), getConfig()]);
    state.model = config.model?.id ?? models.data[0].id;
    state.demo = config.model?.demo === true;
    showError("page-error", null);
    showFacts(config);
    showModelNote();
    settings.configure(config);
    for (const card of Object.values(cards)) card.model = config.model ?? {};
    id("ask-button").disabled = false;
  } catch (error) {
    report("page-error", error);
  }
}

function showFacts({ model = {}, versions = {} }) {
  const layer = model.prune_layer ?? null;
  const layers = model.prune_layers?.map((pruneLayer) => pruneLayer.layer) ?? [layer];
  const facts = [
    state.model,
    layer === null ? "no prune layer" : `prune layer${layers.length > 1 ? "s" : ""} ${layers.join(", ")}`,
    ...["vtprune", "vllm"].filter((name) => versions[name]).map((name) => `${name} ${versions[name]}`),
  ];
  id("facts").replaceChildren(...facts.map((fact) => Object.assign(document.createElement("li"), { textContent: fact })));
}

/** The embedded model answers about anything, and is right about what it was trained on. */
function showModelNote() {
  const known = state.picture?.sample ?? true;
  id("model-note").hidden = !state.demo;
  id("model-note").classList.toggle("warning", !known);
  id("model-note").textContent = known
    ? "The demo model knows drawn shapes, as in these samples, and nothing else."
    : "The demo model knows drawn shapes only: what it says of this picture means nothing. What stays of it is real.";
}

// ---- what stays of the picture ----------------------------------------------------------------------------------

let outdated = false; // whether settings or picture changed since the last request
let refreshing = false;

/**
 * Ask what stays, one request at a time: while a slider is dragged, answers come in order and as fast as the
 * server gives them, and the values it passed over in between are never asked for.
 */
async function refreshExplanation() {
  outdated = true;
  if (refreshing) return;
  refreshing = true;
  id("overlay").setAttribute("aria-busy", "true");
  while (outdated && state.model && state.picture) {
    await new Promise((resolve) => setTimeout(resolve, DEBOUNCE_MS));
    outdated = false;
    await explainOnce(state.picture);
  }
  id("overlay").removeAttribute("aria-busy");
  refreshing = false;
}

async function explainOnce(picture) {
  let explanation = null;
  let problem = null;
  try {
    explanation = await explain(picture.url, settings.values, id("question").value);
  } catch (error) {
    problem = sentence(error);
  }
  if (picture !== state.picture) return; // the answer is about a picture that is gone
  state.explanation = explanation;
  showError("explain-error", problem);
  showExplanation();
}

function showExplanation() {
  const { explanation } = state;
  id("kept").textContent = explanation ? String(explanation.vision_tokens_kept) : "–";
  id("kept-of").textContent = explanation
    ? `of ${explanation.vision_tokens} vision tokens kept (${percent(explanation)})`
    : "vision tokens kept";
  state.parts = partsOf(explanation);
  showParts();
  draw();
}

/** The parts to choose from, where there are several; the one that was chosen before stays so. */
function showParts() {
  const select = id("part");
  const chosen = select.selectedIndex;
  select.replaceChildren(...namesOf(state.parts).map((name) => new Option(name)));
  select.selectedIndex = chosen >= 0 && chosen < state.parts.length ? chosen : 0;
  select.hidden = state.parts.length < 2;
}

const shownPart = () => state.parts[Math.max(id("part").selectedIndex, 0)] ?? null;

function showCurveNote(explanation) {
  const inflection = explanation ? readCurve(explanation).inflection : null;
  id("slope-key").hidden = inflection === null;
  if (inflection) id("slope").textContent = `slope −${inflection.slope.toFixed(2)}`;
  id("curve-note").textContent = explanation ? curveNote(explanation) : "";
}

const percent = ({ vision_tokens_kept: kept, vision_tokens: all }) => `${((100 * kept) / all).toFixed(1)} %`;

// ---- drawing ----------------------------------------------------------------------------------------------------

function draw() {
  const { picture, patch } = state;
  const explanation = shownPart();
  showCurveNote(explanation);
  if (!picture) return;
  const view = document.querySelector("input[name=view]:checked").value;
  const box = { width: id("drop").clientWidth, height: PICTURE_HEIGHT };
  drawOverlay(id("overlay"), box, { picture, explanation, view, patch });
  id("overlay").setAttribute("aria-label", describePicture(picture, state.explanation));
  id("legend").textContent = legend(view, explanation);
  const svg = id("curve");
  if (!explanation) {
    svg.replaceChildren();
    svg.setAttribute("aria-label", "No curve yet");
    return;
  }
  const rank = patch === null ? null : explanation.order.indexOf(patch);
  drawCurve(svg, explanation, rank);
  svg.setAttribute("aria-label", describeCurve(explanation));
  id("readout").textContent = patch === null ? POINT_HINT : describePatch(explanation, patch, rank);
}

function point(patch) {
  if (patch === state.patch) return;
  state.patch = patch;
  draw();
}

// ---- choosing a picture -----------------------------------------------------------------------------------------

function usePicture(picture, scene = null) {
  state.picture = { ...picture, sample: scene !== null };
  markAnswersOutdated();
  showModelNote();
  state.explanation = null;
  state.parts = [];
  state.patch = null;
  for (const button of id("samples").children) {
    button.setAttribute("aria-pressed", String(scene !== null && button.dataset.scene === scene.name));
  }
  const questions = scene?.questions ?? ["What is in the picture?", "How many objects?"];
  id("suggestions").replaceChildren(...questions.map(suggestion));
  id("question").value = questions[0];
  showError("explain-error", null);
  showExplanation();
  refreshExplanation();
}

/** The answers on the page are about another picture or other settings than those shown. */
function markAnswersOutdated() {
  for (const card of Object.values(cards)) card.outdate();
  showOutdated();
}

async function useFile(file) {
  try {
    usePicture(await pictureFromFile(file));
  } catch (error) {
    report("explain-error", error);
  }
}

function sampleButton(scene) {
  const button = document.createElement("button");
  const canvas = drawScene(scene);
  const label = document.createElement("span");
  button.type = "button";
  button.className = "sample";
  button.dataset.scene = scene.name;
  label.textContent = scene.name;
  button.append(canvas, label);
  button.addEventListener("click", () => usePicture(pictureFromCanvas(canvas, scene.name), scene));
  return button;
}

function suggestion(text) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = text;
  button.addEventListener("click", () => {
    id("question").value = text;
    id("question").focus();
    followQuestion();
  });
  return button;
}

/** A method may keep other patches for another question. */
function followQuestion() {
  if (settings.followQuestion) refreshExplanation();
}

// ---- asking -----------------------------------------------------------------------------------------------------

/**
 * Ask with the chosen settings and with pruning off, in turn and as often as the user wants: never both at once,
 * so that neither slows the other. The answers are those of the first run, the times medians over all.
 */
async function askBoth() {
  const { signal } = (state.asking = new AbortController());
  const common = {
    model: state.model,
    image: state.picture.url,
    question: id("question").value,
    maxTokens: Number(id("max-tokens").value),
    signal,
  };
  const sides = [
    { card: cards.pruned, settings: settings.values, summary: settings.summary, runs: [] },
    { card: cards.full, settings: { preset: "off" }, summary: "everything kept", runs: [] },
  ];
  id("ask-button").textContent = "Stop";
  id("verdict").textContent = "";
  id("verdict").removeAttribute("data-outdated");
  for (const { card, summary } of sides) card.start(summary);
  const runs = Number(id("runs").value);
  for (let run = 0; run < runs && !signal.aborted; run++) {
    for (const side of sides) if (side.runs.length === run) await askOne(side, common);
  }
  if (sides.every((side) => side.runs.length === runs)) {
    const [pruned, full] = sides.map((side) => median(side.runs));
    cards.pruned.showMetrics(pruned, full);
    cards.full.showMetrics(full, pruned);
    if ("outdated" in id("pruned").dataset) showOutdated();
    else showVerdict(pruned, full, runs);
  }
  state.asking = null;
  id("ask-button").textContent = ASK;
}

/** One run of one side; a side that failed is left with fewer runs than the other and not asked again. */
async function askOne({ card, settings, runs }, common) {
  try {
    const onText = runs.length === 0 ? (text) => card.stream(text) : () => {};
    runs.push(await ask({ ...common, settings, onText }));
    card.done(median(runs));
  } catch (error) {
    card.fail(common.signal.aborted ? "Stopped." : sentence(error));
  }
}

// ---- errors -----------------------------------------------------------------------------------------------------

/** What to tell the user: the server's sentence, with the field to blame and a way out of a missing key. */
function sentence(error) {
  if (error instanceof ApiError && error.status === 401) {
    id("key-box").open = true;
    return hasApiKey()
      ? "The server refuses this API key: enter another one at the top of the page."
      : `${error.message}: enter the server's API key at the top of the page.`;
  }
  const blame = error instanceof ApiError && error.param && !error.message.includes(error.param);
  return blame ? `${error.message} (${error.param})` : error.message;
}

const report = (box, error) => showError(box, sentence(error));

function showError(box, text) {
  id(box).hidden = text === null;
  id(box).textContent = text ?? "";
}

// ---- wiring -----------------------------------------------------------------------------------------------------

function listen() {
  id("views").addEventListener("change", draw);
  id("question").addEventListener("change", followQuestion);
  id("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    if (state.asking) state.asking.abort();
    else if (state.picture) askBoth();
  });
  id("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    setApiKey(id("key").value);
    id("key-box").open = false;
    connect();
  });
  id("part").addEventListener("change", () => {
    state.patch = null;
    draw();
  });
  id("overlay").addEventListener("pointermove", (event) => {
    if (shownPart()) point(patchAt(id("overlay"), event.offsetX, event.offsetY, shownPart()));
  });
  id("curve").addEventListener("pointermove", (event) => {
    const part = shownPart();
    if (!part) return;
    const { left, width } = id("curve").getBoundingClientRect();
    point(part.order[rankAt(event.clientX - left, width, part.order.length)]);
  });
  id("overlay").addEventListener("keydown", (event) => {
    const next = shownPart() && patchBeside(shownPart().grid, state.patch, event.key);
    if (next === null) return;
    event.preventDefault();
    point(next);
  });
  id("overlay").addEventListener("blur", () => point(null));
  for (const surface of [id("overlay"), id("curve")]) surface.addEventListener("pointerleave", () => point(null));
  onFile(useFile);
  new ResizeObserver(draw).observe(id("drop"));
  new ResizeObserver(draw).observe(id("curve"));
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
}

id("samples").replaceChildren(...SCENES.map(sampleButton));
listen();
id("samples").firstElementChild.click();
connect();
