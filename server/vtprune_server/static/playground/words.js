// SPDX-License-Identifier: Apache-2.0
// What the pictures show, in words: for the captions, and for those who do not see them.

import { scoreName } from "./curve.js";

export const POINT_HINT =
  "Point at the curve or the picture, or walk over the picture with the arrow keys, to find a patch in both.";

export function legend(view, explanation) {
  if (!explanation || view === "picture") return "The picture as it is sent.";
  const { left, top, width, height } = explanation.crop;
  const whole = left === 0 && top === 0 && width === 1 && height === 1;
  const outside = whole ? "" : " Hatched: outside the square that the vision tower sees.";
  if (view === "scores") return `Each patch by its ${scoreName(explanation.score)}, dark is low, yellow is high.${outside}`;
  return `In colour: patches that the language model is given. Faded: dropped.${outside}`;
}

export function describePicture({ name }, explanation) {
  return explanation
    ? `${name}: ${explanation.vision_tokens_kept} of ${explanation.vision_tokens} patches kept`
    : `${name}: not rated yet`;
}

export function describeCurve({ curve, cut, score, vision_tokens_kept: kept }) {
  const where = cut === null ? "not cut by its inflection point" : `cut at rank ${cut}`;
  return `${scoreName(score)} of ${curve.length} patches in falling order, ${where}; ${kept} patches kept`;
}

export function describePatch({ grid, scores, kept, score }, patch, rank) {
  const row = Math.floor(patch / grid[1]) + 1;
  const column = (patch % grid[1]) + 1;
  const fate = kept[patch] ? "kept" : "dropped";
  return `Patch in row ${row}, column ${column}: rank ${rank + 1}, ${scoreName(score)} ${scores[patch].toFixed(3)}, ${fate}.`;
}
