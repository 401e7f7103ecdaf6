// SPDX-License-Identifier: Apache-2.0
// From a file to what is shown and sent. Drawing it anew applies its EXIF orientation and drops its metadata.

const LONGEST_SIDE = 1024; // pixels; vision towers see a few hundred, and every move of a slider sends the picture

/**
 * A picture of a file: its canvas, and the same pixels as a data: URL.
 *
 * Throws an Error with a sentence where the browser cannot decode the file.
 */
export async function pictureFromFile(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Error(`${file.name || "This file"} is not a picture that this browser can read.`);
  }
  const scale = Math.min(1, LONGEST_SIDE / Math.max(bitmap.width, bitmap.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.fillStyle = "white"; // below transparent pixels
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return pictureFromCanvas(canvas, file.name || "Your picture", !/png|gif|bmp/.test(file.type));
}

/** A picture of a canvas; a lossy one stays as small as a photograph should be. */
export function pictureFromCanvas(canvas, name, lossy = false) {
  const url = lossy ? canvas.toDataURL("image/jpeg", 0.92) : canvas.toDataURL("image/png");
  return { canvas, name, url };
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
