// The page's form, its picture and its history.

import { History } from "./history.js";
import { Painter } from "./painter.js";
import { ServerError, asBlob, keepKey, readModel, streamPicture } from "./stream.js";

const RATIOS = [[1, 1], [4, 3], [3, 4], [16, 9], [9, 16]];
const NUMBERS = ["width", "height", "num_inference_steps", "guidance_scale", "true_cfg_scale", "seed"];
const SEEDS = 2 ** 32; // all are exact in JavaScript's numbers, and short enough to be told
const TOO_LARGE = "The image of this drawing was too large to be kept. Choose it again.";
const THUMBNAIL = 256; // pixels of the longer side

const $ = (id) => document.getElementById(id);
const history = new History();
const painter = new Painter($("mask"), $("brush"), () => ({
  size: Number($("brush-size").value),
  erase: $("erase").checked,
}));

let limits = null; // what the model draws, as /v1/models tells it
let image = null; // the file to draw from
let shown = null; // the drawing of the history that is seen
let running = null; // the AbortController of the picture that is being drawn
let filled = Promise.resolve(); // once the form has what was put into it: images take a moment

// --- What the model draws ---------------------------------------------------------------------

async function start() {
  listen();
  await Promise.all([loadModel(), history.open()]);
  listHistory();
}

async function loadModel() {
  try {
    const model = await readModel();
    limits = model.limits;
    $("model").textContent = model.id;
    $("key-section").hidden = true;
    showError(null);
    fillForm();
  } catch (error) {
    showError(error);
  }
}

function fillForm() {
  for (const side of ["width", "height"]) limitSide(side);
  limit("num_inference_steps", limits.num_inference_steps);
  $("guidance-field").hidden = limits.guidance_scale === null;
  $("guidance_scale").value = limits.guidance_scale ?? "";
  $("image-section").hidden = !canEdit();
  for (const part of document.querySelectorAll("[data-mask]")) part.hidden = !limits.mask;
  $("strength-field").hidden = limits.strength === null;
  $("strength").value = limits.strength ?? "";
  showStrength();
  $("size-hint").textContent = describeSizes();
  $("presets").replaceChildren(...presetSizes().map(presetButton));
  markPreset();
}

function canEdit() {
  return Boolean(limits?.image);
}

function limitSide(side) {
  limit(side, limits[side]);
  $(side).step = limits.multiple_of;
  $(side).readOnly = limits[side].min === limits[side].max;
}

function limit(id, range) {
  Object.assign($(id), { min: range.min ?? 1, max: range.max, value: range.default });
}

function describeSizes() {
  const { width, height, multiple_of: multiple } = limits;
  const range = ({ min, max }) => (min === max ? `${min}` : `${min} to ${max}`);
  const both = range(width) === range(height);
  const sizes = both ? range(width) : `${range(width)} wide, ${range(height)} high`;
  return `${sizes}, in steps of ${multiple} pixels`;
}

/** Sizes of common proportions, about as large as the model's own, that fit its range. */
function presetSizes() {
  const area = limits.width.default * limits.height.default;
  const sizes = RATIOS.map(([x, y]) => {
    const scale = Math.sqrt(area / (x * y));
    return { name: `${x}:${y}`, width: snap(x * scale), height: snap(y * scale) };
  });
  return sizes.filter(fits);
}

function snap(pixels) {
  return Math.max(Math.round(pixels / limits.multiple_of), 1) * limits.multiple_of;
}

function fits({ width, height }) {
  const inside = (pixels, { min, max }) => min <= pixels && pixels <= max;
  const small = width * height <= limits.max_pixels;
  return inside(width, limits.width) && inside(height, limits.height) && small;
}

function presetButton(size) {
  const button = make("button", { type: "button", title: `${size.width} × ${size.height}` });
  const shape = make("span", { className: "shape" });
  shape.style.aspectRatio = `${size.width} / ${size.height}`;
  shape.classList.toggle("tall", size.height > size.width);
  button.append(shape, size.name);
  Object.assign(button.dataset, { width: size.width, height: size.height });
  button.addEventListener("click", () => setSize(size));
  return button;
}

function setSize({ width, height }) {
  $("width").value = width;
  $("height").value = height;
  showError(null);
  markPreset();
}

function markPreset() {
  for (const button of $("presets").children) {
    const { width, height } = button.dataset;
    const chosen = width === $("width").value && height === $("height").value;
    button.setAttribute("aria-pressed", chosen);
  }
}

// --- Drawing ----------------------------------------------------------------------------------

async function draw() {
  if (running) return;
  if (!limits) return loadModel();
  running = new AbortController();
  showError(null);
  try {
    await filled;
    if ($("random").checked) $("seed").value = Math.floor(Math.random() * SEEDS);
    const entry = { id: Date.now(), fields: readFields(), image };
    entry.mask = image && limits.mask && (await painter.file());
    showRunning(entry.fields);
    await follow(entry, running.signal);
  } catch (error) {
    if (error.name === "AbortError") announce("Cancelled.");
    else showError(error);
  } finally {
    running = null;
    showIdle();
  }
}

/** What the form says; a number that is left empty is the server's to choose. */
function readFields() {
  const fields = { prompt: $("prompt").value };
  for (const name of NUMBERS) if ($(name).value !== "") fields[name] = Number($(name).value);
  if ($("negative_prompt").value) fields.negative_prompt = $("negative_prompt").value;
  else delete fields.true_cfg_scale;
  if (limits.guidance_scale === null) delete fields.guidance_scale;
  if (image && limits.strength !== null) fields.strength = Number($("strength").value);
  return fields;
}

/** The fields as the server reads them. */
function asRequest({ width, height, ...fields }) {
  return width && height ? { ...fields, size: `${width}x${height}` } : fields;
}

async function follow(entry, signal) {
  const began = performance.now();
  const files = entry.image && { [limits.image]: entry.image, mask: entry.mask };
  for await (const event of streamPicture(asRequest(entry.fields), files, signal)) {
    const kind = event.type.split(".")[1];
    if (kind === "step") showStep(event.step, entry.fields.num_inference_steps);
    if (kind === "partial_image") showPreview(event);
    if (kind === "completed") return keep(entry, event, (performance.now() - began) / 1000);
  }
  throw new Error("The connection ended before the picture was there.");
}

async function keep(entry, event, seconds) {
  const [width, height] = event.size.split("x").map(Number);
  const { seed, num_inference_steps } = event;
  Object.assign(entry.fields, { width, height, seed, num_inference_steps });
  entry.picture = asBlob(event);
  entry.seconds = seconds;
  entry.thumbnail = await shrink(entry.picture);
  history.add(entry);
  shown = entry;
  listHistory();
  announce(`The picture is there, after ${seconds.toFixed(1)} seconds.`);
}

async function shrink(picture) {
  const bitmap = await createImageBitmap(picture);
  const scale = Math.min(THUMBNAIL / Math.max(bitmap.width, bitmap.height), 1);
  const canvas = make("canvas", {
    width: Math.ceil(bitmap.width * scale),
    height: Math.ceil(bitmap.height * scale),
  });
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/webp"));
}

function cancel() {
  running?.abort();
}

// --- The picture ------------------------------------------------------------------------------

function showRunning(fields) {
  $("stage").setAttribute("aria-busy", "true");
  $("draw").setAttribute("aria-disabled", "true");
  $("cancel").hidden = false;
  $("caption").hidden = true;
  $("progress-section").hidden = false;
  $("progress").removeAttribute("value");
  $("progress-text").textContent = "Waiting for its turn";
  showPlaceholder("", fields);
  announce("Drawing.");
  $("stage").scrollIntoView({ block: "start" });
}

function showStep(step, steps = limits.num_inference_steps.default) {
  const text = `Step ${step} of ${steps}`;
  Object.assign($("progress"), { max: steps, value: step });
  $("progress").setAttribute("aria-valuetext", text);
  $("progress-text").textContent = text;
}

function showPreview(event) {
  showPicture(asBlob(event), event.size.split("x"), "The picture as it is so far");
  announce(`Preview ${event.partial_image_index + 1}, after step ${event.step}.`);
}

function showIdle() {
  const focused = document.activeElement === $("cancel");
  $("stage").removeAttribute("aria-busy");
  $("draw").removeAttribute("aria-disabled");
  $("cancel").hidden = true;
  $("progress-section").hidden = true;
  if (focused) $("draw").focus();
  showDrawing();
}

function showDrawing() {
  $("caption").hidden = !shown;
  $("again").disabled = !shown;
  markShown();
  if (!shown) return showPlaceholder("The picture appears here as it becomes clear.");
  const { fields, picture, thumbnail } = shown;
  showPicture(picture ?? thumbnail, [fields.width, fields.height], fields.prompt);
  $("caption-prompt").textContent = fields.prompt;
  $("caption-parameters").textContent = describe(shown);
  $("use").hidden = !canEdit();
  const name = picture ? `fluxdeploy-${fields.seed}.png` : `fluxdeploy-${fields.seed}-small.webp`;
  Object.assign($("download"), { href: $("picture").src, download: name });
}

function describe({ fields, seconds, image: source, mask }) {
  const parts = [`${fields.width} × ${fields.height}`, `${fields.num_inference_steps} steps`];
  parts.push(`seed ${fields.seed}`);
  if (fields.guidance_scale !== undefined) parts.push(`guidance ${fields.guidance_scale}`);
  if (fields.true_cfg_scale > 1) parts.push(`true CFG ${fields.true_cfg_scale}`);
  if (source || fields.strength !== undefined) parts.push(`strength ${fields.strength}`);
  if (mask) parts.push("with a mask");
  return [...parts, `${seconds.toFixed(1)} s`].join(" · ");
}

function showPicture(file, [width, height], text) {
  URL.revokeObjectURL($("picture").src);
  Object.assign($("picture"), { src: URL.createObjectURL(file), alt: text, hidden: false });
  $("placeholder").hidden = true;
  shapeFrame(width / height);
}

function showPlaceholder(text, { width, height } = {}) {
  $("picture").hidden = true;
  Object.assign($("placeholder"), { textContent: text, hidden: false });
  if (width && height) shapeFrame(width / height);
}

function shapeFrame(ratio) {
  $("stage").style.setProperty("--ratio", ratio);
}

function announce(text) {
  $("announcer").textContent = text;
}

/** Where one looks: beside the button that was pressed, and on the field that is wrong. */
function showError(error) {
  for (const field of document.querySelectorAll("[aria-invalid]")) {
    field.removeAttribute("aria-invalid");
    field.removeAttribute("aria-errormessage");
  }
  $("error").hidden = !error;
  $("error").textContent = error?.message ?? "";
  if (error instanceof ServerError) markFields(error);
}

function markFields({ status, param }) {
  if (status === 401) askForKey();
  for (const id of param === "size" ? ["width", "height"] : [param]) {
    $(id)?.setAttribute("aria-invalid", "true");
    $(id)?.setAttribute("aria-errormessage", "error");
  }
}

function askForKey() {
  $("key-section").hidden = false;
  $("key").focus();
}

async function useKey() {
  keepKey($("key").value.trim());
  $("key").value = "";
  await loadModel();
  if ($("key-section").hidden) $("prompt").focus();
}

// --- The image to draw from -------------------------------------------------------------------

function takeImage(file) {
  filled = readImage(file);
}

async function readImage(file) {
  if (!canEdit()) return;
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    showError(new Error(`${file.name ?? "The file"} is no picture that this browser can read.`));
    return;
  }
  image = file;
  URL.revokeObjectURL($("source").src);
  $("source").src = URL.createObjectURL(file);
  painter.reset(bitmap.width, bitmap.height);
  const area = limits.width.default * limits.height.default;
  const scale = Math.sqrt(area / (bitmap.width * bitmap.height));
  setSize({
    width: clamp(snap(bitmap.width * scale), limits.width),
    height: clamp(snap(bitmap.height * scale), limits.height),
  });
  showImage();
}

function clamp(pixels, { min, max }) {
  return Math.min(Math.max(pixels, min), max);
}

function dropImage() {
  image = null;
  $("image").value = "";
  showImage();
}

function showImage() {
  $("drop").hidden = image !== null;
  $("edit").hidden = image === null;
}

function showStrength() {
  $("strength-shown").textContent = Number($("strength").value).toFixed(2);
}

function onPaste(event) {
  const files = [...event.clipboardData.files];
  const file = files.find(({ type }) => type.startsWith("image/"));
  if (!file) return;
  event.preventDefault();
  takeImage(file);
}

function onDrop(event) {
  $("drop").classList.remove("over");
  const [file] = event.dataTransfer.files;
  if (!file) return;
  event.preventDefault(); // or the browser leaves the page for the file
  takeImage(file);
}

function onDragOver(event) {
  if (!event.dataTransfer.types.includes("Files")) return;
  event.preventDefault();
  $("drop").classList.add("over");
}

// --- History ----------------------------------------------------------------------------------

function listHistory() {
  for (const old of $("history").querySelectorAll("img")) URL.revokeObjectURL(old.src);
  $("history").replaceChildren(...history.entries.map(historyItem));
  $("history-section").hidden = history.entries.length === 0;
  markShown();
}

function historyItem(entry) {
  const src = URL.createObjectURL(entry.thumbnail);
  const button = make("button", { type: "button", className: "thumbnail" });
  button.append(make("img", { src, alt: entry.fields.prompt }));
  button.title = `${entry.fields.prompt}\n${describe(entry)}`;
  button.addEventListener("click", () => restore(entry));
  const remove = make("button", { type: "button", className: "delete", textContent: "×" });
  remove.setAttribute("aria-label", `Delete ${entry.fields.prompt}, seed ${entry.fields.seed}`);
  remove.addEventListener("click", () => forget(entry));
  const item = make("li");
  item.append(button, remove);
  return item;
}

function markShown() {
  history.entries.forEach((entry, place) => {
    const button = $("history").children[place]?.firstChild;
    button?.setAttribute("aria-current", entry === shown);
  });
}

function restore(entry) {
  filled = fillFrom(entry);
}

async function fillFrom(entry) {
  if (entry.image) await readImage(entry.image);
  else dropImage();
  if (entry.mask) await painter.load(entry.mask);
  const { prompt, negative_prompt = "", true_cfg_scale = 1, strength, ...numbers } = entry.fields;
  $("prompt").value = prompt;
  $("negative_prompt").value = negative_prompt;
  $("true_cfg_scale").value = true_cfg_scale;
  for (const [name, value] of Object.entries(numbers)) $(name).value = value;
  $("random").checked = false;
  if (strength !== undefined) $("strength").value = strength;
  showStrength();
  markPreset();
  showError(strength !== undefined && !entry.image ? new Error(TOO_LARGE) : null);
  if (running) return;
  shown = entry;
  showDrawing();
  $("stage").scrollIntoView({ block: "start" });
}

function forget(entry) {
  const place = history.entries.indexOf(entry);
  history.remove(entry);
  listHistory();
  const next = $("history").children[Math.min(place, history.entries.length - 1)];
  (next?.lastChild ?? $("prompt")).focus();
  if (entry === shown) showNothing();
}

function forgetAll() {
  history.clear();
  listHistory();
  showNothing();
  $("prompt").focus();
}

function showNothing() {
  shown = null;
  if (!running) showDrawing();
}

function sameAgain() {
  $("random").checked = false;
  $("seed").value = shown.fields.seed;
}

// --- Keys and buttons -------------------------------------------------------------------------

function listen() {
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    draw();
  });
  $("form").addEventListener("input", () => showError(null));
  $("seed").addEventListener("input", () => ($("random").checked = false));
  $("strength").addEventListener("input", showStrength);
  $("brush-size").addEventListener("input", () => painter.resized());
  $("image").addEventListener("change", () => $("image").files[0] && takeImage($("image").files[0]));
  for (const side of ["width", "height"]) $(side).addEventListener("input", markPreset);
  const clicks = {
    "use-key": useKey,
    swap: () => setSize({ width: $("height").value, height: $("width").value }),
    again: sameAgain,
    undo: () => painter.undo(),
    clear: () => painter.clear(),
    remove: dropImage,
    cancel,
    use: () => takeImage(shown.picture ?? shown.thumbnail),
    forget: forgetAll,
  };
  for (const [id, action] of Object.entries(clicks)) $(id).addEventListener("click", action);
  document.addEventListener("keydown", onKey);
  document.addEventListener("paste", onPaste);
  document.addEventListener("drop", onDrop);
  document.addEventListener("dragover", onDragOver);
  document.addEventListener("dragleave", () => $("drop").classList.remove("over"));
}

function onKey(event) {
  if (event.key === "Escape" && running) cancel();
  else if (event.key === "Enter" && event.target === $("key")) useKey();
  else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) draw();
  else return;
  event.preventDefault();
}

function make(tag, properties = {}) {
  return Object.assign(document.createElement(tag), properties);
}

start();
