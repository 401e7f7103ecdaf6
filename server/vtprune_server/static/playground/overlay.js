// SPDX-License-Identifier: Apache-2.0
// The picture with what the server keeps of it: dropped patches dimmed, scores as colours, or nothing over it.

const DIMMED = 0.66; // share of the surface's colour over a dropped patch
const HEAT = ["#0b1d51", "#3b4cc0", "#8e6fbf", "#e8845a", "#ffd97a"]; // low to high

/** Fit a picture into a box of CSS pixels and draw it; `explanation` may be null, `patch` is the one pointed at. */
export function drawOverlay(canvas, box, { picture, explanation, view, patch }) {
  const { width, height } = fit(picture.canvas, box);
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  context.imageSmoothingQuality = "high";
  const paint = () => context.drawImage(picture.canvas, 0, 0, width, height);
  if (!explanation || view === "picture") return paint();

  const grid = new PatchGrid(explanation, width, height);
  const style = getComputedStyle(canvas);
  const surface = style.getPropertyValue("--surface");
  context.filter = "grayscale(1)"; // browsers without it dim all the same
  paint();
  context.filter = "none";
  if (view === "scores") paintScores(context, grid, explanation);
  else paintKept(context, grid, explanation, { paint, surface, line: style.getPropertyValue("--kept") });
  paintOutside(context, grid, width, height, surface);
  if (patch !== null) paintPointer(context, grid.cell(patch));
}

/** The patch below a point, in CSS pixels of the canvas; null outside the grid. */
export function patchAt(canvas, x, y, explanation) {
  const { width, height } = canvas.getBoundingClientRect();
  return new PatchGrid(explanation, width, height).patchAt(x, y);
}

/** The patch that an arrow key leads to, the first one from nowhere; null for other keys and past the edge. */
export function patchBeside([rows, columns], patch, key) {
  const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[key];
  if (!step) return null;
  if (patch === null) return 0;
  const row = Math.floor(patch / columns) + step[0];
  const column = (patch % columns) + step[1];
  return row >= 0 && row < rows && column >= 0 && column < columns ? row * columns + column : null;
}

/** Where each patch lies on the shown picture; the grid may cover only a crop of it. */
class PatchGrid {
  constructor({ grid: [rows, columns], crop }, width, height) {
    this.rows = rows;
    this.columns = columns;
    this.x = crop.left * width;
    this.y = crop.top * height;
    this.width = crop.width * width;
    this.height = crop.height * height;
  }

  /** [x, y, width, height]. */
  cell(index) {
    const width = this.width / this.columns;
    const height = this.height / this.rows;
    return [this.x + (index % this.columns) * width, this.y + Math.floor(index / this.columns) * height, width, height];
  }

  patchAt(x, y) {
    const column = Math.floor(((x - this.x) / this.width) * this.columns);
    const row = Math.floor(((y - this.y) / this.height) * this.rows);
    const inside = column >= 0 && column < this.columns && row >= 0 && row < this.rows;
    return inside ? row * this.columns + column : null;
  }
}

function fit({ width, height }, box) {
  const scale = Math.min(box.width / width, box.height / height);
  return { width: Math.max(1, Math.floor(width * scale)), height: Math.max(1, Math.floor(height * scale)) };
}

function paintKept(context, grid, { kept, merged }, { paint, surface, line }) {
  const region = new Path2D();
  const keeps = (index, inside) => inside && kept[index];
  kept.forEach((keep, index) => {
    if (!keep) return;
    const [x, y, width, height] = snapped(grid.cell(index));
    // over the edge to a kept neighbour: rectangles that only touch leave a seam
    const right = keeps(index + 1, (index + 1) % grid.columns !== 0) ? 1 : 0;
    const below = keeps(index + grid.columns, true) ? 1 : 0;
    region.rect(x, y, width + right, height + below);
  });
  context.globalAlpha = DIMMED;
  context.fillStyle = surface;
  context.fillRect(grid.x, grid.y, grid.width, grid.height);
  context.globalAlpha = 1;
  if (merged) paintMerged(context, grid, kept, line);
  context.save();
  context.clip(region);
  paint();
  context.restore();
  if (!kept.every(Boolean)) {
    context.strokeStyle = line;
    context.lineWidth = 1.5;
    context.stroke(border(grid, kept));
  }
}

/** A dot in each patch that was folded into tokens that stay. */
function paintMerged(context, grid, kept, line) {
  context.fillStyle = line;
  kept.forEach((keep, index) => {
    if (keep) return;
    const [x, y, width, height] = snapped(grid.cell(index));
    context.beginPath();
    context.arc(x + width / 2, y + height / 2, Math.max(1, Math.min(width, height) / 9), 0, 2 * Math.PI);
    context.fill();
  });
}

/** The edges between kept patches and everything else. */
function border(grid, kept) {
  const path = new Path2D();
  const keeps = (row, column) =>
    row >= 0 && row < grid.rows && column >= 0 && column < grid.columns && kept[row * grid.columns + column];
  kept.forEach((keep, index) => {
    if (!keep) return;
    const row = Math.floor(index / grid.columns);
    const column = index % grid.columns;
    const [x, y, width, height] = snapped(grid.cell(index));
    const edge = (x1, y1, x2, y2) => (path.moveTo(x1, y1), path.lineTo(x2, y2));
    if (!keeps(row - 1, column)) edge(x, y, x + width, y);
    if (!keeps(row + 1, column)) edge(x, y + height, x + width, y + height);
    if (!keeps(row, column - 1)) edge(x, y, x, y + height);
    if (!keeps(row, column + 1)) edge(x + width, y, x + width, y + height);
  });
  return path;
}

function paintScores(context, grid, { scores }) {
  const low = Math.min(...scores);
  const span = Math.max(...scores) - low || 1;
  context.globalAlpha = 0.8;
  scores.forEach((score, index) => {
    context.fillStyle = heat((score - low) / span);
    context.fillRect(...snapped(grid.cell(index)));
  });
  context.globalAlpha = 1;
}

/** What the vision tower never sees of the picture. */
function paintOutside(context, grid, width, height, surface) {
  const outside = new Path2D();
  outside.rect(0, 0, width, height);
  outside.rect(grid.x, grid.y, grid.width, grid.height);
  context.save();
  context.clip(outside, "evenodd");
  context.globalAlpha = 0.85;
  context.fillStyle = surface;
  context.fillRect(0, 0, width, height);
  context.globalAlpha = 0.35;
  context.strokeStyle = "gray";
  context.lineWidth = 1;
  context.beginPath();
  for (let offset = -height; offset < width; offset += 9) {
    context.moveTo(offset, height);
    context.lineTo(offset + height, 0);
  }
  context.stroke();
  context.restore();
}

function paintPointer(context, [x, y, width, height]) {
  context.lineWidth = 4;
  context.strokeStyle = "#000";
  context.strokeRect(x, y, width, height);
  context.lineWidth = 2;
  context.strokeStyle = "#fff";
  context.strokeRect(x, y, width, height);
}

/** To whole pixels, so that neighbours share an edge without a seam. */
function snapped([x, y, width, height]) {
  const left = Math.round(x);
  const top = Math.round(y);
  return [left, top, Math.round(x + width) - left, Math.round(y + height) - top];
}

function heat(value) {
  const at = value * (HEAT.length - 1);
  const step = Math.min(Math.floor(at), HEAT.length - 2);
  const channel = (colour, i) => parseInt(colour.slice(1 + 2 * i, 3 + 2 * i), 16);
  const mixed = [0, 1, 2].map((i) => {
    const from = channel(HEAT[step], i);
    return Math.round(from + (channel(HEAT[step + 1], i) - from) * (at - step));
  });
  return `rgb(${mixed.join(" ")})`;
}
