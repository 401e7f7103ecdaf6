// SPDX-License-Identifier: Apache-2.0
// The parts of a picture that are pruned each by a curve of its own: one for most models, tiles for some.

/** Every part: the explanation with the part's own grid, scores and curve, and how many of its patches stay. */
export function partsOf(explanation) {
  if (!explanation) return [];
  const { more_views: others = [] } = explanation;
  if (!others.length) return [explanation];
  return [explanation, ...others].map((view) => ({
    ...explanation,
    ...view,
    part: true,
    vision_tokens: view.kept.length,
    vision_tokens_kept: view.kept.filter(Boolean).length + view.summary_tokens,
  }));
}

/** A name for each part: the whole picture, or a tile by its number. */
export function namesOf(parts) {
  let tile = 0;
  return parts.map(({ crop: { width, height } }) => (width === 1 && height === 1 ? "Whole picture" : `Tile ${++tile}`));
}
