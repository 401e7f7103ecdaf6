// SPDX-License-Identifier: Apache-2.0
// The sorted similarity curve of one picture, the point where it is cut, and which ranks stay.

const SVG = "http://www.w3.org/2000/svg";
const MARGIN = { top: 14, right: 14, bottom: 58, left: 40 };
const STRIP = 9; // height of the strip below the axis that marks the kept ranks
const CLOSE = 34; // pixels from the axis within which a label would stand on the curve

const SCORE_NAMES = {
  cosine: "cosine similarity to CLS",
  cls_attention: "attention from CLS",
  received: "attention received",
};

/** What the scores measure, in words. */
export const scoreName = (score) => SCORE_NAMES[score] ?? score;

/**
 * What the curve decided: { count, inflection, first }.
 *
 * `count` is how many patches it lets stay, null where the method or the settings do not ask it. `inflection` is
 * { index, slope }, where the curve's slope falls to -slope: aggressiveness / (1 - aggressiveness) up to the knee's 1;
 * past the knee the count is a share of the knee's, so the inflection point lies behind the cut. Null where no finite
 * slope decided. `first` says whether the patches that stay are the first `count` ranks.
 */
export function readCurve({ curve, cut, order, kept, settings: { aggressiveness } }) {
  if (cut === null) return { count: null, inflection: null, first: false };
  const first = order.every((patch, rank) => kept[patch] === rank < cut);
  if (!aggressiveness || aggressiveness === 1) return { count: cut, inflection: null, first };
  if (aggressiveness <= 0.5) {
    return { count: cut, inflection: { index: cut - 1, slope: aggressiveness / (1 - aggressiveness) }, first };
  }
  const heights = curve.map((y, i) => y + i / Math.max(curve.length - 1, 1));
  return { count: cut, inflection: { index: heights.indexOf(Math.min(...heights)), slope: 1 }, first };
}

/** Fill an <svg> at the size it has on the page; `rank` is the one pointed at, from 0, or null. */
export function drawCurve(svg, explanation, rank) {
  const { curve, order, kept, score } = explanation;
  const { count, inflection, first } = readCurve(explanation);
  const plot = new Plot(svg, curve.length);
  plot.axes(scoreName(score));
  plot.keptRanks(order.map((patch) => kept[patch]), curve);
  plot.line("curve-line", curve.map((y, i) => [plot.x(i), plot.y(y)]));
  if (inflection !== null) plot.tangent(inflection.index, curve[inflection.index], inflection.slope);
  if (count !== null) {
    const atPoint = inflection?.index === count - 1;
    // a method that chooses by a rule of its own takes the count from the curve, not the ranks before it
    const name = !first ? "count" : atPoint ? "inflection point" : "cut";
    plot.cut(count - 1, curve[count - 1], first ? `${name}: rank ${count}` : `${name}: ${count}`);
    if (inflection !== null && !atPoint) plot.knee(inflection.index, curve[inflection.index]);
  }
  if (rank !== null) plot.pointer(rank, curve[rank]);
}

/** The rank (from 0) below a horizontal position, in CSS pixels of the <svg>. */
export function rankAt(x, width, tokens) {
  const share = (x - MARGIN.left) / (width - MARGIN.left - MARGIN.right);
  return Math.min(tokens - 1, Math.max(0, Math.round(share * (tokens - 1))));
}

class Plot {
  constructor(svg, tokens) {
    const { clientWidth: width, clientHeight: height } = svg;
    this.svg = svg;
    this.tokens = tokens;
    this.right = width - MARGIN.right;
    this.bottom = height - MARGIN.bottom;
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  }

  x(index) {
    return MARGIN.left + ((this.right - MARGIN.left) * index) / Math.max(this.tokens - 1, 1);
  }

  y(value) {
    return this.bottom - (this.bottom - MARGIN.top) * value;
  }

  add(name, className, attributes, text) {
    const element = document.createElementNS(SVG, name);
    element.setAttribute("class", className);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    this.svg.append(element);
    return element;
  }

  line(className, points) {
    const rounded = points.map((point) => point.map((value) => value.toFixed(1)).join(","));
    this.add("polyline", className, { points: rounded.join(" ") });
  }

  axes(name) {
    for (const value of [0, 0.5, 1]) {
      const y = this.y(value);
      this.add("line", "curve-grid", { x1: MARGIN.left, x2: this.right, y1: y, y2: y });
      this.add("text", "curve-tick", { x: MARGIN.left - 8, y: y + 4, "text-anchor": "end" }, String(value));
    }
    for (const share of [0, 0.25, 0.5, 0.75, 1]) {
      const index = Math.round(share * (this.tokens - 1));
      const anchor = share === 0 ? "start" : share === 1 ? "end" : "middle";
      const at = { x: this.x(index), y: this.bottom + STRIP + 21, "text-anchor": anchor };
      this.add("text", "curve-tick", at, String(index + 1));
    }
    const middle = (MARGIN.left + this.right) / 2;
    const below = { x: middle, y: this.bottom + STRIP + 41, "text-anchor": "middle" };
    const long = `Patches by ${name}, highest first (scaled to 0–1)`;
    this.add("text", "curve-label", below, this.right > 420 ? long : "Patches, most similar first");
  }

  /** A filled area below the curve and a strip below the axis, for each run of kept ranks. */
  keptRanks(keeps, curve) {
    const half = (this.x(1) - this.x(0)) / 2;
    const top = this.bottom + 4;
    const strip = (className, from, to) => {
      const x = Math.max(this.x(from) - half, MARGIN.left);
      const end = Math.min(this.x(to) + half, this.right);
      this.add("rect", className, { x, y: top, width: Math.max(end - x, 1), height: STRIP });
    };
    strip("curve-dropped", 0, keeps.length - 1);
    for (let from = 0; from < keeps.length; from++) {
      if (!keeps[from]) continue;
      let to = from;
      while (keeps[to + 1]) to++;
      strip("curve-kept", from, to);
      const edge = curve.slice(from, to + 1).map((y, i) => `${this.x(from + i).toFixed(1)},${this.y(y).toFixed(1)}`);
      const points = [`${this.x(from)},${this.bottom}`, ...edge, `${this.x(to)},${this.bottom}`];
      this.add("polygon", "curve-area", { points: points.join(" ") });
      from = to;
    }
  }

  /** A vertical line where the curve was cut, and what that point is. */
  cut(index, value, name) {
    const x = this.x(index);
    this.add("line", "curve-cut", { x1: x, x2: x, y1: MARGIN.top, y2: this.bottom + STRIP + 4 });
    this.add("circle", "curve-point", { cx: x, cy: this.y(value), r: 5 });
    // near the first ranks the curve itself runs where the label would stand
    this.label("curve-cut-label", x, MARGIN.top + 12, x - MARGIN.left < CLOSE ? CLOSE : 10, name);
  }

  /** A text beside a point, on the side with room for it; in a narrow plot as near as it fits. */
  label(className, x, y, away, text) {
    const element = this.add("text", className, { y }, text);
    const width = element.getComputedTextLength();
    const right = x + away + width <= this.right;
    const start = right ? x + away : Math.max(MARGIN.left, Math.min(x - 10 - width, this.right - width));
    element.setAttribute("x", start);
  }

  /** The inflection point, where the cut lies before it. */
  knee(index, value) {
    const x = this.x(index);
    const y = this.y(value);
    this.add("circle", "curve-knee", { cx: x, cy: y, r: 4 });
    this.label("curve-knee-label", x, y - 9, 9, `inflection point: rank ${index + 1}`);
  }

  /** The line of slope -slope through the inflection point. */
  tangent(index, value, slope) {
    const span = Math.max(this.tokens - 1, 1);
    const at = (height) => Math.min(1, Math.max(0, index / span + (value - height) / slope));
    const heightAt = (share) => value - slope * (share - index / span);
    const ends = [at(1), at(0)].map((share) => [this.x(share * span), this.y(heightAt(share))]);
    this.line("curve-tangent", ends);
  }

  pointer(index, value) {
    this.add("line", "curve-pointer", { x1: this.x(index), x2: this.x(index), y1: MARGIN.top, y2: this.bottom });
    this.add("circle", "curve-pointer-dot", { cx: this.x(index), cy: this.y(value), r: 4 });
  }
}
