// What `data/decode.py` does with a photograph, in a browser, and what the model says of it.

const about = JSON.parse(document.getElementById("description").textContent);
const { image_size: SIZE, channels: CHANNELS } = about.preprocessing;
const BITS = 22; // of the fixed-point weights of Pillow's resize for 8-bit pixels
const state = document.getElementById("state");

function bytesOf(id) {
  const node = document.getElementById(id);
  const text = atob(node.textContent.trim());
  node.remove();
  return Uint8Array.from(text, (character) => character.charCodeAt(0));
}

// Weights of a triangle filter for each output pixel, antialiased where the image becomes smaller, as Pillow rounds them.
function weights(from, to) {
  const scale = from / to, wide = Math.max(scale, 1), narrow = 1 / wide;
  return Array.from({ length: to }, (_, i) => {
    const center = (i + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - wide + 0.5)), last = Math.min(from, Math.trunc(center + wide + 0.5));
    const found = [];
    for (let x = first; x < last; x++) found.push(Math.max(0, 1 - Math.abs((x - center + 0.5) * narrow)));
    const sum = found.reduce((a, b) => a + b, 0);
    return { first, found: found.map((value) => Math.trunc(0.5 + (value / sum) * 2 ** BITS)) };
  });
}

const clip = (sum) => Math.max(0, Math.min(255, Math.floor(sum / 2 ** BITS)));

// Pixels (height, width, channels) resized to SIZE x SIZE: first along the rows, then along the columns. Of tall images new
// versions of Pillow begin with the columns, so that a pixel may differ by 1.
function resize(pixels, width, height, channels, size) {
  const across = weights(width, size), down = weights(height, size);
  const middle = new Uint8Array(height * size * channels), result = new Uint8Array(size * size * channels);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < size; x++) {
      const { first, found } = across[x];
      for (let c = 0; c < channels; c++) {
        let sum = 2 ** (BITS - 1);
        for (let k = 0; k < found.length; k++) sum += found[k] * pixels[(y * width + first + k) * channels + c];
        middle[(y * size + x) * channels + c] = clip(sum);
      }
    }
  }
  for (let y = 0; y < size; y++) {
    const { first, found } = down[y];
    for (let i = 0; i < size * channels; i++) {
      let sum = 2 ** (BITS - 1);
      for (let k = 0; k < found.length; k++) sum += found[k] * middle[(first + k) * size * channels + i];
      result[y * size * channels + i] = clip(sum);
    }
  }
  return result;
}

async function pixelsOf(file) {
  const options = { imageOrientation: "from-image", colorSpaceConversion: "none", premultiplyAlpha: "none" };
  const bitmap = await createImageBitmap(file, options);
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height), context = canvas.getContext("2d");
  context.drawImage(bitmap, 0, 0);
  const { data, width, height } = context.getImageData(0, 0, bitmap.width, bitmap.height);
  const pixels = new Uint8Array(width * height * CHANNELS);
  for (let i = 0; i < width * height; i++) {
    const [r, g, b] = [data[4 * i], data[4 * i + 1], data[4 * i + 2]];
    if (CHANNELS === 1) pixels[i] = (19595 * r + 38470 * g + 7471 * b + 0x8000) >> 16; // as Pillow's "L"
    else pixels.set([r, g, b], 3 * i);
  }
  return resize(pixels, width, height, CHANNELS, SIZE);
}

function addressOf(id, type) {
  return URL.createObjectURL(new Blob([bytesOf(id)], { type }));
}

function start() {
  ort.env.wasm.numThreads = 1; // more need headers that only a server can send
  ort.env.wasm.wasmPaths = { mjs: addressOf("glue", "text/javascript"), wasm: addressOf("runtime", "application/wasm") };
  return ort.InferenceSession.create(bytesOf("model"), { executionProviders: ["wasm"] });
}

async function answer(session, file) {
  const images = new ort.Tensor("uint8", await pixelsOf(file), [1, SIZE, SIZE, CHANNELS]);
  const { probabilities } = await session.run({ images }, ["probabilities"]);
  const values = Array.from(probabilities.data), best = values.indexOf(Math.max(...values));
  const accepted = about.threshold === null ? null : values[best] >= about.threshold;
  return { class: about.classes[best], probability: values[best], accepted };
}

// Names of files and classes are text, never markup.
function show(file, found, error) {
  const line = document.createElement("li"), text = document.createElement("div");
  line.dataset.name = file.name;
  if (error) {
    text.className = "error";
    text.textContent = `${file.name}: this browser cannot read it as an image`;
  } else {
    const picture = document.createElement("img"), name = document.createElement("small"), said = document.createElement("div");
    picture.src = URL.createObjectURL(file);
    picture.alt = "";
    name.textContent = file.name;
    said.textContent = `${found.class}  ${(100 * found.probability).toFixed(1)} %` + (found.accepted === false ? "  (not sure enough)" : "");
    said.className = found.accepted === false ? "rejected" : "accepted";
    Object.assign(line.dataset, { class: found.class, probability: found.probability, accepted: found.accepted });
    text.append(said, name);
    line.append(picture);
  }
  line.append(text);
  document.getElementById("answers").prepend(line);
}

const input = document.getElementById("files"), drop = document.getElementById("drop");
try {
  const session = await start();
  let last = Promise.resolve();
  const take = (files) => {
    for (const file of files) {
      last = last.then(() => answer(session, file)).then((found) => show(file, found), () => show(file, null, true));
    }
    last = last.then(() => { state.textContent = `${document.getElementById("answers").children.length} photographs`; });
  };
  input.addEventListener("change", () => { state.textContent = "Working …"; take([...input.files]); input.value = ""; });
  for (const name of ["dragover", "dragleave", "drop"]) {
    drop.addEventListener(name, (event) => { event.preventDefault(); drop.classList.toggle("over", name === "dragover"); });
  }
  drop.addEventListener("drop", (event) => take([...event.dataTransfer.files]));
  input.disabled = false;
  state.textContent = "Ready.";
} catch (error) {
  state.className = "error";
  state.textContent = `The model could not be started in this browser: ${error.message}`;
}
