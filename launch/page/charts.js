// A picture with one axis to move along: by mouse, touch and keyboard alike. What is under the cursor is said in words below it.

class Chart {
  // host: element; label: what it is; extent: [low, high]; draw(parts, x, width); ticks(low, high, most) → [[at, text]]; read(at) → nodes
  constructor(host, options) {
    Object.assign(this, options);
    this.window = this.keep || [...this.extent];
    this.area = h("div", { class: "chart", tabindex: "0", role: "group", "aria-roledescription": "chart", "aria-label": `${this.label}. Arrow keys move along it, plus and minus zoom, 0 shows all.`, "data-key": this.key });
    this.readout = h("p", { class: "readout", "aria-live": "polite" });
    this.zoomIn = h("button", { class: "tool", type: "button", "aria-label": "Zoom in", "data-key": `${this.key}+`, onclick: () => this.zoom(0.5) }, "+");
    this.zoomOut = h("button", { class: "tool", type: "button", "aria-label": "Zoom out", "data-key": `${this.key}-`, onclick: () => this.zoom(2) }, "−");
    this.all = h("button", { class: "tool", type: "button", "data-key": `${this.key}0`, onclick: () => this.show(...this.extent) }, "Show all");
    host.append(h("div", { class: "tools" }, this.tools || [], h("span", { class: "spring" }), this.zoomIn, this.zoomOut, this.all), this.area, this.readout);
    this.area.addEventListener("pointermove", (event) => this.moved(event));
    this.area.addEventListener("pointerdown", (event) => this.pressed(event));
    this.area.addEventListener("pointerup", (event) => this.released(event));
    this.area.addEventListener("pointercancel", () => { this.from = undefined; this.band.setAttribute("width", 0); });
    this.area.addEventListener("dblclick", () => this.show(...this.extent));
    this.area.addEventListener("keydown", (event) => this.typed(event));
    this.hint();
    this.render();
    this.observer = new ResizeObserver(() => { if (this.area.clientWidth !== this.width) this.render(); });
    this.observer.observe(this.area);
  }
  hint() { this.readout.textContent = this.note || "Point at it, or use the arrow keys; drag to zoom."; }
  render() {
    const width = (this.width = this.area.clientWidth || 800);
    const [low, high] = this.window, left = this.left, right = width - 12;
    this.x = (at) => left + ((at - low) / (high - low || 1)) * (right - left);
    this.back = (pixel) => low + ((pixel - left) / (right - left)) * (high - low);
    const id = `clip-${this.key}`;
    const axis = this.ticks(low, high, Math.max(2, Math.floor((right - left) / 90))).map(([tick, text]) => {
      const x = this.x(tick);
      return [s("line", { class: "grid", x1: x, x2: x, y1: 4, y2: this.height - 20 }), s("text", { x, y: this.height - 5, "text-anchor": x > right - 24 ? "end" : x < left + 16 ? "start" : "middle" }, text)];
    });
    const parts = [];
    this.clip = `url(#${id})`;
    this.draw(parts, this.x, [low, high], left, right);
    this.band = s("rect", { class: "band", y: 4, height: this.height - 24, width: 0 });
    this.cursor = s("line", { class: "cursor", y1: 4, y2: this.height - 20, visibility: "hidden" });
    const picture = s("svg", { height: this.height, viewBox: `0 0 ${width} ${this.height}`, "aria-hidden": "true", focusable: "false" },
      s("clipPath", { id }, s("rect", { x: left, y: 0, width: Math.max(0, right - left), height: this.height })), axis.flat(), parts, this.band, this.cursor);
    this.area.replaceChildren(picture);
    const whole = low === this.extent[0] && high === this.extent[1];
    this.all.disabled = this.zoomOut.disabled = whole;
    if (this.place !== undefined) this.point(this.place);
  }
  clamp(at) { return Math.min(this.window[1], Math.max(this.window[0], at)); }
  point(at) {
    this.place = this.clamp(at);
    const x = this.x(this.place);
    this.cursor.setAttribute("visibility", "visible"); this.cursor.setAttribute("x1", x); this.cursor.setAttribute("x2", x);
    this.readout.replaceChildren(...this.read(this.place));
  }
  show(low, high) {
    const [first, last] = this.extent, least = (last - first) / 5000;
    if (high - low < least) { const middle = (low + high) / 2; low = middle - least / 2; high = middle + least / 2; }
    this.window = [Math.max(first, low), Math.min(last, high)];
    if (this.window[1] - this.window[0] >= (last - first) * 0.999) this.window = [first, last];
    if (this.onwindow) this.onwindow(this.window);
    this.render();
  }
  zoom(factor) {
    const [low, high] = this.window, middle = this.place === undefined ? (low + high) / 2 : this.place;
    this.show(middle - (middle - low) * factor, middle + (high - middle) * factor);
  }
  at(event) { return this.clamp(this.back(event.clientX - this.area.getBoundingClientRect().left)); }
  moved(event) {
    const place = this.at(event);
    if (this.from !== undefined && event.buttons) {
      const a = this.x(this.from), b = this.x(place);
      this.band.setAttribute("x", Math.min(a, b)); this.band.setAttribute("width", Math.abs(b - a));
    }
    this.point(place);
  }
  pressed(event) { if (event.button === 0) { this.from = this.at(event); if (event.pointerType === "mouse") this.area.setPointerCapture(event.pointerId); } }
  released(event) {
    const from = this.from, to = this.at(event);
    this.from = undefined; this.band.setAttribute("width", 0);
    if (from !== undefined && Math.abs(this.x(from) - this.x(to)) > 8) this.show(Math.min(from, to), Math.max(from, to));
    else this.point(to);
  }
  typed(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const [low, high] = this.window, step = (high - low) / (event.shiftKey ? 10 : 60);
    const place = this.place === undefined ? low : this.place;
    const actions = { ArrowRight: () => this.walk(place + step), ArrowLeft: () => this.walk(place - step), Home: () => this.walk(low), End: () => this.walk(high), "+": () => this.zoom(0.5), "=": () => this.zoom(0.5), "-": () => this.zoom(2), 0: () => this.show(...this.extent), Escape: () => this.show(...this.extent) };
    if (actions[event.key]) { event.preventDefault(); actions[event.key](); }
  }
  walk(place) {  // over the edge of what is shown, the window moves along
    const [low, high] = this.window, [first, last] = this.extent;
    const shift = Math.max(first - low, Math.min(last - high, place > high ? place - high : place < low ? place - low : 0));
    if (shift) { this.window = [low + shift, high + shift]; if (this.onwindow) this.onwindow(this.window); this.place = undefined; this.render(); }
    this.point(place);
  }
  close() { this.observer.disconnect(); }
}

const path = (points) => points.map(([x, y], index) => `${index ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");

// where a line through [at, height] points crosses `level`: what lies at or below it, and what beyond
function parted(points, level) {
  if (level === null || level === undefined) return [points, []];
  const cut = points.findIndex((point) => point[1] > level);
  if (cut < 0) return [points, []];
  const below = points.slice(0, cut), above = points.slice(cut);
  if (cut > 0) {
    const [a, b] = [points[cut - 1], points[cut]], part = (level - a[1]) / (b[1] - a[1] || 1);
    const crossing = [a[0] + (b[0] - a[0]) * part, level];
    below.push(crossing); above.unshift(crossing);
  }
  return [below, above];
}

function nearest(sorted, wanted, get = (item) => item) {
  let low = 0, high = sorted.length - 1;
  while (low < high) { const middle = (low + high) >> 1; if (get(sorted[middle]) < wanted) low = middle + 1; else high = middle; }
  return low > 0 && wanted - get(sorted[low - 1]) < get(sorted[low]) - wanted ? low - 1 : low;
}
