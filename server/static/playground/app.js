// SPDX-License-Identifier: Apache-2.0
// The page: one picture, one question, one set of settings; what the server says of them is shown as it comes.

import { AnswerCard, verdict } from "./answers.js";
import { ApiError, ask, explain, getConfig, getModels, setApiKey } from "./api.js";
import { drawCurve, rankAt, slopeOf } from "./curve.js";
import { drawOverlay, patchAt } from "./overlay.js";
import { onFile, pictureFromCanvas, pictureFromFile } from "./picture.js";
import { SCENES, drawScene } from "./scenes.js";
import { SettingsPanel } from "./settings.js";
import { describeCurve, describePatch, describePicture, legend } from "./words.js";

const DEBOUNCE_MS = 80;
const PICTURE_HEIGHT = { wide: 400, narrow: 320 }; // CSS pixels at most
const CURVE_HEIGHT = { wide: 262, narrow: 230 };

const id = (name) => document.getElementById(name);
const narrow = window.matchMedia("(max-width: 640px)");

const state = {
  model: null,
  picture: null,
  explanation: null, // the server's last answer on what stays of it
  patch: null, // the one pointed at
  asking: null, // AbortController while answers stream
};
const settings = new SettingsPanel(scheduleExplain);
const cards = { pruned: new AnswerCard(id("pruned")), full: new AnswerCard(id("full")) };

// ---- the server -----------------------------------------------------------------------------------------------

async function connect() {
  try {
    const [models, config] = await Promise.all([getModels(), getConfig()]);
    state.model = config.model?.id ?? models.data[0].id;
    showError("page-error", null);
    showFacts(config);
    settings.configure(config);
  } catch (error) {
    report("page-error", error);
  }
}

function showFacts({ model = {}, versions = {} }) {
  const layer = model.prune_layer ?? null;
  const facts = [
    state.model,
    layer === null ? "no prune layer" : `prune layer ${layer}`,
    ...Object.entries(versions).map(([name, version]) => `${name} ${version}`),
  ];
  id("facts").replaceChildren(...facts.map((fact) => Object.assign(document.createElement("li"), { textContent: fact })));
}

// ---- what stays of the picture ----------------------------------------------------------------------------------

let explainTimer = 0;
let explaining = new AbortController();

function scheduleExplain() {
  clearTimeout(explainTimer);
  explainTimer = setTimeout(refreshExplanation, DEBOUNCE_MS);
  id("overlay").setAttribute("aria-busy", "true");
}

/** Ask what stays; an answer that a newer question overtook is dropped. */
async function refreshExplanation() {
  explaining.abort();
  const { signal } = (explaining = new AbortController());
  const { picture } = state;
  if (!picture || !state.model) return;
  try {
    const explanation = await explain(picture.url, settings.values, signal);
    if (signal.aborted) return;
    state.explanation = explanation;
    showError("explain-error", null);
  } catch (error) {
    if (signal.aborted) return;
    state.explanation = null;
    report("explain-error", error);
  }
  id("overlay").removeAttribute("aria-busy");
  showExplanation();
}

function showExplanation() {
  const { explanation } = state;
  id("kept").textContent = explanation ? String(explanation.vision_tokens_kept) : "–";
  id("kept-of").textContent = explanation
    ? `of ${explanation.vision_tokens} vision tokens kept (${percent(explanation)})`
    : "vision tokens kept";
  const slope = explanation ? slopeOf(explanation) : null;
  id("slope-key").hidden = slope === null;
  if (slope !== null) id("slope").textContent = `slope −${slope.toFixed(2)} at the cut`;
  draw();
}

const percent = ({ vision_tokens_kept: kept, vision_tokens: all }) => `${((100 * kept) / all).toFixed(1)} %`;

// ---- drawing ----------------------------------------------------------------------------------------------------

function draw() {
  const { picture, explanation, patch } = state;
  if (!picture) return;
  const size = narrow.matches ? "narrow" : "wide";
  const view = document.querySelector("input[name=view]:checked").value;
  const box = { width: id("drop").clientWidth, height: PICTURE_HEIGHT[size] };
  drawOverlay(id("overlay"), box, { picture, explanation, view, patch });
  id("overlay").setAttribute("aria-label", describePicture(picture, explanation));
  id("legend").textContent = legend(view, explanation);
  const svg = id("curve");
  if (!explanation) {
    svg.replaceChildren();
    svg.setAttribute("aria-label", "No curve yet");
    return;
  }
  const rank = patch === null ? null : explanation.order.indexOf(patch);
  const area = { width: svg.clientWidth, height: CURVE_HEIGHT[size] };
  svg.setAttribute("height", String(area.height));
  drawCurve(svg, area, explanation, rank);
  svg.setAttribute("aria-label", describeCurve(explanation));
  if (patch !== null) id("readout").textContent = describePatch(explanation, patch, rank);
}

function point(patch) {
  if (patch === state.patch) return;
  state.patch = patch;
  draw();
}

// ---- choosing a picture -----------------------------------------------------------------------------------------

function usePicture(picture, scene = null) {
  state.picture = picture;
  state.explanation = null;
  state.patch = null;
  for (const button of id("samples").children) {
    button.setAttribute("aria-pressed", String(scene !== null && button.dataset.scene === scene.name));
  }
  const questions = scene?.questions ?? ["What is in the picture?", "How many objects?"];
  id("suggestions").replaceChildren(...questions.map(suggestion));
  id("question").value = questions[0];
  showError("explain-error", null);
  showExplanation();
  scheduleExplain();
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
  });
  return button;
}

// ---- asking -----------------------------------------------------------------------------------------------------

/** Ask with the chosen settings, then with pruning off: never both at once, so that neither slows the other. */
async function askBoth() {
  const { signal } = (state.asking = new AbortController());
  const common = {
    model: state.model,
    image: state.picture.url,
    question: id("question").value,
    maxTokens: Number(id("max-tokens").value),
    signal,
  };
  id("ask-button").textContent = "Stop";
  id("verdict").textContent = "";
  cards.full.start("everything kept");
  const results = {
    pruned: await askOne(cards.pruned, settings.summary, common, settings.values),
    full: signal.aborted ? null : await askOne(cards.full, "everything kept", common, { preset: "off" }),
  };
  if (results.pruned && results.full) {
    cards.pruned.showMetrics(results.pruned, results.full);
    cards.full.showMetrics(results.full, results.pruned);
    id("verdict").textContent = verdict(results.pruned, results.full);
  }
  state.asking = null;
  id("ask-button").textContent = "Ask pruned and full";
}

async function askOne(card, summary, common, values) {
  card.start(summary);
  try {
    const result = await ask({ ...common, settings: values, onText: (text) => card.stream(text) });
    card.done(result);
    return result;
  } catch (error) {
    card.fail(common.signal.aborted ? "Stopped." : sentence(error));
    return null;
  }
}

// ---- errors -----------------------------------------------------------------------------------------------------

/** What to tell the user: the server's sentence, with the field to blame and a way out of a missing key. */
function sentence(error) {
  if (error instanceof ApiError && error.status === 401) {
    id("key-box").open = true;
    return `${error.message}: enter the server's API key at the top of the page.`;
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
  id("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    if (state.asking) state.asking.abort();
    else if (state.model && state.picture) askBoth();
  });
  id("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    setApiKey(id("key").value);
    id("key-box").open = false;
    connect();
  });
  id("overlay").addEventListener("pointermove", (event) => {
    if (state.explanation) point(patchAt(id("overlay"), event.offsetX, event.offsetY, state.explanation));
  });
  id("curve").addEventListener("pointermove", (event) => {
    if (!state.explanation) return;
    const { left, width } = id("curve").getBoundingClientRect();
    point(state.explanation.order[rankAt(event.clientX - left, width, state.explanation.order.length)]);
  });
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
