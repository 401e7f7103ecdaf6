// SPDX-License-Identifier: Apache-2.0
// What the pictures show, in words: for the captions, and for those who do not see them.

import { readCurve, scoreName } from "./curve.js";

export const POINT_HINT =
  "Point at the curve or the picture, or walk over the picture with the arrow keys, to find a patch in both.";

export function legend(view, explanation) {
  if (!explanation || view === "picture") return "The picture as it is sent.";
  const { left, top, width, height } = explanation.crop;
  const whole = left === 0 && top === 0 && width === 1 && height === 1;
  const beyond = explanation.part ? "this part of the picture" : "the square that the vision tower sees";
  const outside = whole ? "" : ` Hatched: outside ${beyond}.`;
  if (view === "scores") return `Each patch by its ${scoreName(explanation.score)}, dark is low, yellow is high.${outside}`;
  const { merged, summary_tokens: summary = 0 } = explanation;
  if (!merged) return `In colour: patches that the language model is given. Faded: dropped.${outside}`;
  const into = summary ? `those and into ${summary} summary token${summary === 1 ? "" : "s"}` : "those";
  return `In colour: patches that stay. Dotted: merged into ${into}.${outside}`;
}

/** What the curve decided, and where it did not, why. */
export function curveNote(explanation) {
  const { settings, vision_tokens_kept: kept } = explanation;
  const { count, inflection, first } = readCurve(explanation);
  const method = settings.method ?? "this method";
  if (count === null) {
    if (settings.keep_ratio) return "A fixed share was asked for, so the curve cuts nothing.";
    if (!settings.aggressiveness) return "Aggressiveness 0 keeps everything, so the curve cuts nothing.";
    return `Not cut here: the preset lets no more stay, ${method} counts by a rule of its own, or all scores are equal. ${kept} tokens stay.`;
  }
  const past = inflection !== null && inflection.index + 1 > count;
  const share = past ? `Past the knee the count is a share of the knee's ${inflection.index + 1}. ` : "";
  return first ? share : `${share}The curve says how many stay, ${count}; which ones, ${method} decides by a rule of its own.`;
}

export function describePicture({ name }, explanation) {
  return explanation
    ? `${name}: ${explanation.vision_tokens_kept} of ${explanation.vision_tokens} patches kept`
    : `${name}: not rated yet`;
}

export function describeCurve(explanation) {
  const { curve, cut, score, vision_tokens_kept: kept } = explanation;
  const { first } = readCurve(explanation);
  const where = cut === null ? "not cut by its inflection point" : first ? `cut at rank ${cut}` : `which sets the count to ${cut}`;
  return `${scoreName(score)} of ${curve.length} patches in falling order, ${where}; ${kept} patches kept`;
}

export function describePatch({ grid, scores, kept, score, merged }, patch, rank) {
  const row = Math.floor(patch / grid[1]) + 1;
  const column = (patch % grid[1]) + 1;
  const fate = kept[patch] ? "kept" : merged ? "merged" : "dropped";
  return `Patch in row ${row}, column ${column}: rank ${rank + 1}, ${scoreName(score)} ${scores[patch].toFixed(3)}, ${fate}.`;
}
