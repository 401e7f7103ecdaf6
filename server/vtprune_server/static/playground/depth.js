// SPDX-License-Identifier: Apache-2.0
// How many of a prompt's tokens each decoder layer sees: a step for every band, as wide as it has layers.

/**
 * The bands of an answer: { from, to, tokens } each, first and last layer included. Empty where the server has
 * no prune layer or says nothing of its layers.
 */
export function bandsOf({ decoder_layers: layers, prune_layers: pruneLayers } = {}, counts) {
  if (!layers || !pruneLayers?.length || !counts) return [];
  const above = counts.kv_tokens_kept_by_layer ?? pruneLayers.map(() => counts.kv_tokens_kept);
  const edges = [0, ...pruneLayers.map((pruneLayer) => pruneLayer.layer), layers];
  return [counts.kv_tokens, ...above].map((tokens, at) => ({ from: edges[at], to: edges[at + 1] - 1, tokens }));
}

/** Fill a figure with the bands, side by side; it is hidden where there are none. */
export function drawDepth(figure, bands) {
  figure.hidden = bands.length === 0;
  const steps = figure.querySelector(".depth-steps");
  const most = Math.max(1, ...bands.map((band) => band.tokens));
  steps.replaceChildren(...bands.map((band) => step(band, band.tokens / most)));
  steps.setAttribute("aria-label", `Prompt tokens by depth: ${bands.map(words).join("; ")}`);
}

function step(band, share) {
  const [root, label, fill] = ["span", "small", "span"].map((name) => document.createElement(name));
  root.style.flexGrow = band.to - band.from + 1;
  root.title = words(band);
  label.textContent = band.tokens.toLocaleString("en");
  fill.style.height = `calc((100% - 1.2rem) * ${share})`;
  root.append(label, fill);
  return root;
}

function words({ from, to, tokens }) {
  return `${from === to ? `layer ${from}` : `layers ${from} to ${to}`}: ${tokens.toLocaleString("en")} tokens`;
}
