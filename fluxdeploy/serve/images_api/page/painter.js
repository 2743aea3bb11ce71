// A mask that is painted over an image: white where the picture is to be redrawn.

/** Paints on a canvas as large as the image. Brush sizes are percent of the image's longer side. */
export class Painter {
  #strokes = [];
  #current = null;
  #spot = { x: 0, y: 0 };

  /** brush: the element that shows where one paints. options: returns `{size, erase}`. */
  constructor(canvas, brush, options) {
    this.canvas = canvas;
    this.brush = brush;
    this.options = options;
    canvas.addEventListener("pointerdown", (event) => this.#press(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    for (const name of ["pointerup", "pointercancel"])
      canvas.addEventListener(name, () => (this.#current = null));
    canvas.addEventListener("keydown", (event) => this.#key(event));
  }

  /** Begin anew over an image of so many pixels. */
  reset(width, height) {
    Object.assign(this.canvas, { width, height });
    this.#strokes = [];
    this.#show({ x: width / 2, y: height / 2 });
  }

  /** Show the brush as large as it has become. */
  resized() {
    this.#show(this.#spot);
  }

  undo() {
    this.#strokes.pop();
    this.#repaint();
  }

  clear() {
    this.#strokes = [];
    this.#repaint();
  }

  /** A PNG whose transparent pixels are to be redrawn; null where nothing is painted. */
  async file() {
    if (!this.#strokes.some((stroke) => !stroke.erase)) return null;
    const { width, height } = this.canvas;
    const turned = Object.assign(document.createElement("canvas"), { width, height });
    const context = turned.getContext("2d");
    context.fillRect(0, 0, width, height);
    context.globalCompositeOperation = "destination-out";
    context.drawImage(this.canvas, 0, 0);
    return new Promise((resolve) => turned.toBlob(resolve, "image/png"));
  }

  /** Go on from such a file. */
  async load(file) {
    const bitmap = await createImageBitmap(file);
    this.#strokes.push({ erase: false, bitmap });
    this.#repaint();
  }

  #press(event) {
    this.canvas.setPointerCapture(event.pointerId);
    this.#begin(this.#place(event));
  }

  #move(event) {
    const spot = this.#place(event);
    if (this.#current && event.buttons) this.#extend(spot);
    else this.#show(spot);
  }

  #place(event) {
    const box = this.canvas.getBoundingClientRect();
    const scale = this.canvas.width / box.width;
    return { x: (event.clientX - box.left) * scale, y: (event.clientY - box.top) * scale };
  }

  #key(event) {
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (event.key === " ") this.#begin(this.#spot);
    else if (event.key === "z" && (event.ctrlKey || event.metaKey)) this.undo();
    else if (event.key in way) this.#step(way[event.key], event.shiftKey);
    else return;
    if (!event.shiftKey) this.#current = null;
    event.preventDefault();
  }

  #step([x, y], painting) {
    const length = this.#width() / 2;
    const to = { x: this.#spot.x + x * length, y: this.#spot.y + y * length };
    to.x = Math.min(Math.max(to.x, 0), this.canvas.width);
    to.y = Math.min(Math.max(to.y, 0), this.canvas.height);
    if (!painting) return this.#show(to);
    if (!this.#current) this.#begin(this.#spot);
    this.#extend(to);
  }

  #begin(spot) {
    const { erase } = this.options();
    this.#current = { erase, width: this.#width(), points: [spot] };
    this.#strokes.push(this.#current);
    this.#extend(spot);
  }

  #extend(spot) {
    this.#current.points.push(spot);
    const points = this.#current.points.slice(-2);
    drawStroke(this.canvas.getContext("2d"), { ...this.#current, points });
    this.#show(spot);
  }

  #repaint() {
    const context = this.canvas.getContext("2d");
    context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    for (const stroke of this.#strokes) drawStroke(context, stroke);
  }

  #width() {
    return (this.options().size / 100) * Math.max(this.canvas.width, this.canvas.height);
  }

  #show(spot) {
    this.#spot = spot;
    const { width, height } = this.canvas;
    this.brush.style.left = `${(100 * spot.x) / width}%`;
    this.brush.style.top = `${(100 * spot.y) / height}%`;
    this.brush.style.width = `${(100 * this.#width()) / width}%`;
  }
}

function drawStroke(context, stroke) {
  if (stroke.bitmap) return drawMask(context, stroke.bitmap);
  context.save();
  context.globalCompositeOperation = stroke.erase ? "destination-out" : "source-over";
  context.strokeStyle = "#fff";
  context.lineCap = context.lineJoin = "round";
  context.lineWidth = stroke.width;
  context.beginPath();
  for (const { x, y } of stroke.points) context.lineTo(x, y);
  context.stroke();
  context.restore();
}

/** White where a mask is transparent. */
function drawMask(context, bitmap) {
  const { width, height } = context.canvas;
  context.save();
  context.fillStyle = "#fff";
  context.fillRect(0, 0, width, height);
  context.globalCompositeOperation = "destination-out";
  context.drawImage(bitmap, 0, 0, width, height);
  context.restore();
}
