// SPDX-License-Identifier: Apache-2.0
// Three pictures drawn here, so that the page shows something before a picture is chosen.

const SIZE = 336;
const COLOURS = {
  red: "rgb(220 40 40)",
  green: "rgb(40 180 60)",
  blue: "rgb(50 80 220)",
  yellow: "rgb(232 212 40)",
  purple: "rgb(150 50 180)",
  orange: "rgb(242 142 30)",
  white: "rgb(245 245 245)",
  black: "rgb(15 15 15)",
};

/** Shapes are [colour, shape, column, row, radius]: cells of a 3x3 grid, the radius as a share of the picture. */
export const SCENES = [
  {
    name: "Two shapes",
    background: [126, 118, 142],
    shapes: [
      ["red", "circle", 0, 0, 0.12],
      ["yellow", "star", 2, 2, 0.13],
    ],
    questions: ["What color is the circle?", "Where is the star?", "How many objects?", "Is there a red circle?"],
  },
  {
    name: "Three shapes",
    background: [112, 134, 120],
    shapes: [
      ["blue", "square", 1, 0, 0.12],
      ["orange", "triangle", 0, 2, 0.12],
      ["white", "cross", 2, 1, 0.12],
    ],
    questions: ["How many objects?", "What color is the triangle?", "What shape is white?", "Is there a red cross?"],
  },
  {
    name: "Four shapes",
    background: [150, 128, 112],
    shapes: [
      ["green", "diamond", 1, 1, 0.12],
      ["purple", "circle", 0, 0, 0.1],
      ["black", "star", 2, 0, 0.11],
      ["red", "cross", 2, 2, 0.1],
    ],
    questions: ["Is there a red cross?", "How many objects?", "What color is the circle?", "Where is the star?"],
  },
];

/** Draw a scene as a SIZE x SIZE canvas; the same pixels every time. */
export function drawScene(scene) {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = SIZE;
  const context = canvas.getContext("2d");
  context.putImageData(grain(scene.background), 0, 0);
  for (const [colour, shape, column, row, radius] of scene.shapes) {
    const x = ((column + 0.5) * SIZE) / 3;
    const y = ((row + 0.5) * SIZE) / 3;
    context.fillStyle = COLOURS[colour];
    context.fill(outline(shape, x, y, radius * SIZE));
  }
  return canvas;
}

function grain(background) {
  const pixels = new ImageData(SIZE, SIZE);
  let seed = 20240901;
  const noise = () => {
    seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0; // a linear congruential generator
    return seed / 2 ** 32 - 0.5;
  };
  for (let i = 0; i < pixels.data.length; i += 4) {
    const level = 26 * noise();
    for (let channel = 0; channel < 3; channel++) pixels.data[i + channel] = background[channel] + level;
    pixels.data[i + 3] = 255;
  }
  return pixels;
}

function outline(shape, x, y, r) {
  const path = new Path2D();
  const polygon = (points) => {
    points.forEach(([dx, dy], i) => (i ? path.lineTo(x + dx, y + dy) : path.moveTo(x + dx, y + dy)));
    path.closePath();
  };
  if (shape === "circle") path.arc(x, y, r, 0, 2 * Math.PI);
  else if (shape === "square") path.rect(x - r, y - r, 2 * r, 2 * r);
  else if (shape === "triangle") polygon([[0, -r], [r, r], [-r, r]]);
  else if (shape === "diamond") polygon([[0, -r], [r, 0], [0, r], [-r, 0]]);
  else if (shape === "cross") {
    const a = r / 3;
    polygon([[-a, -r], [a, -r], [a, -a], [r, -a], [r, a], [a, a], [a, r], [-a, r], [-a, a], [-r, a], [-r, -a], [-a, -a]]);
  } else {
    polygon(
      Array.from({ length: 10 }, (_, i) => {
        const angle = -Math.PI / 2 + (i * Math.PI) / 5;
        const length = i % 2 ? 0.42 * r : r;
        return [length * Math.cos(angle), length * Math.sin(angle)];
      }),
    );
  }
  return path;
}
