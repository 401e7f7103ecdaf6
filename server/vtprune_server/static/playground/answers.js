// SPDX-License-Identifier: Apache-2.0
// The two answers side by side: text as it streams in, then tokens and times against each other.

import { bandsOf, drawDepth } from "./depth.js";

const milliseconds = (value) => (value < 1000 ? `${value.toFixed(0)} ms` : `${(value / 1000).toFixed(2)} s`);
const count = (value) => value.toLocaleString("en");

/** Each metric: its value in a result, what it is out of, and how it is written. null means not known. */
const METRICS = [
  {
    name: "vision_tokens",
    label: "Vision tokens",
    of: (r) => r.usage?.vtprune?.vision_tokens_kept,
    total: (r) => r.usage?.vtprune?.vision_tokens,
    format: count,
  },
  { name: "prompt_tokens", label: "Prompt tokens", of: (r) => r.usage?.prompt_tokens, format: count },
  {
    name: "kv_tokens",
    label: "KV tokens kept",
    of: (r) => r.usage?.vtprune?.kv_tokens_kept,
    total: (r) => r.usage?.vtprune?.kv_tokens,
    format: count,
  },
  { name: "first_token", label: "First token", of: (r) => r.firstTextMs, format: milliseconds },
  { name: "total_time", label: "Total time", of: (r) => r.totalMs, format: milliseconds },
];

/** One of the two cards; `data-state` is idle, waiting, streaming, done or failed. */
export class AnswerCard {
  constructor(root) {
    this.root = root;
    root.append(document.getElementById("answer-body").content.cloneNode(true));
    this.settings = root.querySelector(".answer-settings");
    this.text = root.querySelector(".answer-text");
    this.error = root.querySelector(".error");
    this.metrics = root.querySelector(".metrics");
    this.depth = root.querySelector(".depth");
    this.model = {}; // of the server's configuration
    root.dataset.state = "idle";
    this.showMetrics(null, null);
  }

  start(settings) {
    this.root.dataset.state = "waiting";
    delete this.root.dataset.outdated;
    this.settings.textContent = settings;
    this.text.textContent = "";
    this.error.hidden = true;
    this.showMetrics(null, null);
  }

  stream(text) {
    this.root.dataset.state = "streaming";
    this.text.textContent = text.trimStart();
  }

  done(result) {
    this.root.dataset.state = "done";
    this.text.textContent = result.text.trim() || "(an empty answer)";
    this.showMetrics(result, null);
  }

  fail(sentence) {
    this.root.dataset.state = "failed";
    this.error.textContent = sentence;
    this.error.hidden = false;
  }

  /** Grey what is shown, which is about another picture or other settings; the next `start` ends that. */
  outdate() {
    if (this.root.dataset.state !== "idle") this.root.dataset.outdated = "";
  }

  /** Fill the table; with the other card's result, bars show the share of the larger of the two. */
  showMetrics(result, other) {
    const rows = METRICS.map((metric) => {
      const value = result ? metric.of(result) : null;
      const against = other ? metric.of(other) : null;
      return row(metric, value ?? null, result && metric.total ? metric.total(result) : null, against ?? null);
    });
    this.metrics.replaceChildren(...rows);
    drawDepth(this.depth, bandsOf(this.model, result?.usage?.vtprune));
  }
}

/** The first of several runs, with the medians of their times. */
export function median(runs) {
  const middle = (name) => runs.map((run) => run[name]).sort((a, b) => a - b)[Math.floor(runs.length / 2)];
  return { ...runs[0], firstTextMs: middle("firstTextMs"), totalMs: middle("totalMs") };
}

/** Say what pruning changed, and below it how the times were taken. */
export function showVerdict(pruned, full, runs) {
  const [said, taken] = ["strong", "span"].map((name) => document.createElement(name));
  said.textContent = verdict(pruned, full);
  const times = runs === 1 ? "One run of each" : `Median of ${runs} runs of each, taken in turn`;
  taken.textContent = `${times}, past the prefix cache; times are those of this browser.`;
  document.getElementById("verdict").replaceChildren(said, taken);
}

/** Say that the answers shown are not about what the page shows now; nothing before the first answer. */
export function showOutdated() {
  const box = document.getElementById("verdict");
  if (box.childElementCount === 0 && document.querySelector("[data-outdated]") === null) return;
  const said = document.createElement("strong");
  said.textContent = "The picture or the settings changed since these answers: ask again.";
  box.replaceChildren(said);
  box.dataset.outdated = "";
}

function verdict(pruned, full) {
  const answers = pruned.text.trim() === full.text.trim() ? "The same answer" : "A different answer";
  const [kept, all] = [pruned, full].map(METRICS[0].of);
  const tokens = all ? `${answers} with ${change(kept, all)} vision tokens` : answers;
  if (pruned.firstTextMs === null || full.firstTextMs === null) return `${tokens}.`;
  const sooner = full.firstTextMs - pruned.firstTextMs;
  return `${tokens}; first token ${milliseconds(Math.abs(sooner))} ${sooner >= 0 ? "sooner" : "later"}.`;
}

function change(value, reference) {
  const share = Math.round((1 - value / reference) * 100);
  if (share === 0) return "the same number of";
  return share > 0 ? `${share} % fewer` : `${-share} % more`;
}

function row({ name, label, format }, value, total, against) {
  const group = document.createElement("div");
  const term = document.createElement("dt");
  const data = document.createElement("dd");
  const bar = document.createElement("span");
  term.textContent = label;
  data.dataset.metric = name;
  data.textContent = value === null ? "–" : format(value);
  if (value !== null) data.dataset.value = String(value);
  if (value !== null && total !== null && total !== undefined) {
    const of = document.createElement("small");
    of.textContent = ` of ${format(total)}`;
    data.append(of);
  }
  bar.className = "bar";
  bar.setAttribute("aria-hidden", "true");
  if (value !== null) {
    const fill = document.createElement("span");
    fill.style.width = `${100 * (value / Math.max(value, against ?? value, Number.MIN_VALUE))}%`;
    bar.append(fill);
  }
  group.append(term, data, bar);
  return group;
}
