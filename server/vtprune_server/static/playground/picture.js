// SPDX-License-Identifier: Apache-2.0
// From a file to what is shown and sent: the very file where the server reads its format, so that page and API agree.

const LONGEST_SIDE = 1024; // pixels of the canvas that is shown
const SENT_AS_THEY_ARE = ["image/png", "image/jpeg", "image/webp", "image/gif"];

/**
 * A picture of a file: a canvas to show, turned by its EXIF orientation as the server turns it, and a data: URL to send.
 *
 * Throws an Error with a sentence where the browser cannot decode the file.
 */
export async function pictureFromFile(file) {
  const name = file.name || "Your picture";
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Error(`${file.name || "This file"} is not a picture that this browser can read.`);
  }
  const asItIs = SENT_AS_THEY_ARE.includes(file.type);
  const canvas = drawn(bitmap, Math.min(1, LONGEST_SIDE / Math.max(bitmap.width, bitmap.height)));
  const url = asItIs ? await dataUrl(file) : drawn(bitmap, 1).toDataURL("image/png");
  bitmap.close();
  return { canvas, name, url };
}

/** A picture of a canvas. */
export const pictureFromCanvas = (canvas, name) => ({ canvas, name, url: canvas.toDataURL("image/png") });

function drawn(bitmap, scale) {
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.fillStyle = "white"; // below transparent pixels
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas;
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(new Error(`${file.name || "This file"} cannot be read.`)));
    reader.readAsDataURL(file);
  });
}

/** Call `use` with each file that the user chooses, drops or pastes. */
export function onFile(use) {
  document.getElementById("file").addEventListener("change", ({ target }) => target.files[0] && use(target.files[0]));
  const over = (event) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    document.body.classList.add("dragging");
  };
  document.addEventListener("dragenter", over);
  document.addEventListener("dragover", over);
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) document.body.classList.remove("dragging");
  });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("dragging");
    if (event.dataTransfer.files[0]) use(event.dataTransfer.files[0]);
  });
  document.addEventListener("paste", (event) => {
    const file = Array.from(event.clipboardData?.files ?? []).find(({ type }) => type.startsWith("image/"));
    if (file) use(file);
  });
}
