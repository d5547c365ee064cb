"use strict";
// Small helpers: elements, numbers, times. Text from the job only ever becomes text nodes.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, part] of Object.entries(value)) node.style.setProperty(key, part);
    else node.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat(Infinity)) if (child !== null && child !== undefined && child !== false) node.append(child);
  return node;
}
const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const s = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
const at = (id) => document.getElementById(id);
const body = (id) => at(id).querySelector(".body");

const count = (number) => (number === null || number === undefined ? "–" : number.toLocaleString("en"));
const plural = (number, noun) => `${count(number)} ${noun}${number === 1 ? "" : "s"}`;
const percent = (part, digits = 1) => `${(100 * part).toFixed(digits)} %`;
function value(number) {
  if (number === null || number === undefined) return "–";
  const large = Math.abs(number);
  if (large !== 0 && (large < 1e-3 || large >= 1e7)) return number.toExponential(2).replace("e+", "e");
  return number.toLocaleString("en", { maximumSignificantDigits: 5 });
}

function duration(seconds) {
  seconds = Math.max(0, seconds);
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 120) return `${Math.round(seconds)} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 120) return `${minutes} min`;
  if (minutes < 48 * 60) return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
  return `${Math.floor(minutes / 1440)} d ${Math.floor((minutes % 1440) / 60)} h`;
}
function size(bytes) {
  for (const unit of ["B", "KB", "MB", "GB", "TB"]) {
    if (bytes < 999.5 || unit === "TB") return `${Number(bytes.toPrecision(3))} ${unit}`;
    bytes /= 1000;
  }
}
const two = (number) => String(number).padStart(2, "0");
function moment(unix, short = false) {
  if (unix === null || unix === undefined) return "–";
  const t = new Date(unix * 1000);
  const clock = `${two(t.getHours())}:${two(t.getMinutes())}:${two(t.getSeconds())}`;
  return short ? clock : `${t.getFullYear()}-${two(t.getMonth() + 1)}-${two(t.getDate())} ${clock}`;
}

function roundTicks(low, high, most) {
  if (!(high > low)) return [low];
  const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
  const unit = [1, 2, 5, 10].map((factor) => factor * power).find((step) => step >= rough);
  const ticks = [];
  for (let n = Math.ceil(low / unit); n * unit <= high + unit * 1e-9; n++) ticks.push(Number((n * unit).toPrecision(12)));
  return ticks;
}
const UNITS = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400, 172800, 345600, 604800, 1209600, 2592000];
function timeTicks(low, high, most) {
  const unit = UNITS.find((step) => (high - low) / step <= most) || UNITS[UNITS.length - 1];
  const shift = new Date(low * 1000).getTimezoneOffset() * 60;
  const ticks = [];
  for (let n = Math.ceil((low - shift) / unit); n * unit + shift <= high; n++) ticks.push(n * unit + shift);
  return ticks.map((time) => {
    const t = new Date(time * 1000);
    const day = `${two(t.getMonth() + 1)}-${two(t.getDate())}`;
    if (unit >= 86400) return [time, day];
    const clock = `${two(t.getHours())}:${two(t.getMinutes())}`;
    return [time, unit < 60 ? `${clock}:${two(t.getSeconds())}` : t.getHours() + t.getMinutes() === 0 ? day : clock];
  });
}
