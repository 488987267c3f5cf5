// Keeps the status page up to date from the JSON routes. The attributes `data-text`, `data-attr-NAME`, `data-if`,
// `data-unless` and `data-each` in page.html say where a value is shown; template.rs describes them and fills them for
// the first paint. Values reach the page only as text and as attributes, never as HTML.
"use strict";

const POLL_MS = 2000;
// Longest pause between two attempts while the daemon does not answer.
const POLL_MAX_MS = 60000;
const REQUEST_MAX_MS = 10000;
// The doctor waits up to 10 s for each service, and for several one after the other.
const DOCTOR_REQUEST_MAX_MS = 60000;
// Longest age of the doctor's report. The daemon runs the doctor only when its last report is older.
const DOCTOR_MAX_AGE_S = 300;
const ROWS_MAX = 500;

// The answers of the JSON routes, by the names that page.html uses.
const data = { stats: null, activity: null, metrics: null, doctor: null, error: null };
const sorting = { field: "reference", descending: false };

// Values

function lookup(scope, path) {
  if (path === ".") return scope;
  return path.split(".").reduce((value, key) => value?.[key], scope) ?? null;
}

function isShown(value) {
  if (Array.isArray(value)) return value.length > 0;
  if (value !== null && typeof value === "object") return Object.keys(value).length > 0;
  return Boolean(value);
}

function evaluate(scope, expression) {
  const [operands, format] = expression.split("|").map((part) => part.trim());
  const [value, divisor] = operands.split("/").map((path) => lookup(scope, path.trim()));
  if (divisor === undefined) return [value, format];
  return [typeof value === "number" && divisor > 0 ? Math.min(value / divisor, 1) : null, format];
}

// The text of an expression; null if there is no value.
function text(scope, expression) {
  const [value, format] = evaluate(scope, expression);
  if (value === null || value === undefined) return null;
  if (format) return FORMATS[format](value);
  if (Array.isArray(value)) return value.join(", ");
  return String(value);
}

const FORMATS = {
  bytes: (number) => {
    const units = ["B", "kB", "MB", "GB", "TB", "PB", "EB"];
    let unit = 0;
    for (; number >= 999.5 && unit + 1 < units.length; unit++) number /= 1000;
    return `${number.toFixed(unit > 0 && number < 99.95 ? 1 : 0)} ${units[unit]}`;
  },
  percent: (fraction) => `${Math.round(fraction * 100)} %`,
  number: (fraction) => String(Math.round(fraction * 100)),
  width: (fraction) => `${(fraction * 100).toFixed(2)}%`,
  duration: (seconds) => {
    if (seconds < 60) return `${Math.round(seconds)} s`;
    if (seconds < 3600) return `${Math.floor(seconds / 60)} min`;
    return seconds < 86400 ? `${Math.floor(seconds / 3600)} h` : `${Math.floor(seconds / 86400)} d`;
  },
  ago: (time) => {
    const unix = typeof time === "number" ? time : Date.parse(time) / 1000;
    if (Number.isNaN(unix)) return null;
    return `${FORMATS.duration(Math.max(0, Math.floor(Date.now() / 1000 - unix)))} ago`;
  },
  rate: (fill) => (fill.rate > 0 ? `${FORMATS.bytes(fill.rate)}/s` : null),
  left: (fill) => {
    if (fill.total_bytes === null || !(fill.rate > 0)) return null;
    return FORMATS.duration(Math.max(0, fill.total_bytes - fill.done_bytes) / fill.rate);
  },
  tier: (fill) => {
    const tiers = ["remote", "origin"].filter((tier) => fill[`${tier}_bytes`] > 0);
    return tiers.length > 0 ? tiers.join(", ") : null;
  },
};

// Rates of fills: a moving average between polls, and before that the average since the start of the fill.

const samples = new Map();

function receivedBytes(fill) {
  return fill.remote_bytes + fill.origin_bytes;
}

// Sets the key and the rate of each fill. Several fills of one artifact, for different files, are told apart by their
// order.
function sampleRates(fills) {
  const counts = new Map();
  for (const fill of fills) {
    counts.set(fill.reference, (counts.get(fill.reference) ?? 0) + 1);
    fill.key = `${fill.reference} ${counts.get(fill.reference)}`;
    const last = samples.get(fill.key);
    const sample = { bytes: receivedBytes(fill), seconds: fill.seconds, rate: receivedBytes(fill) / fill.seconds };
    if (last && sample.seconds > last.seconds && sample.bytes >= last.bytes) {
      const rate = (sample.bytes - last.bytes) / (sample.seconds - last.seconds);
      sample.rate = last.rate * 0.6 + rate * 0.4;
    }
    samples.set(fill.key, sample);
    fill.rate = sample.rate;
  }
  const running = new Set(fills.map((fill) => fill.key));
  for (const key of samples.keys()) if (!running.has(key)) samples.delete(key);
}

// Elements

function setText(element, value) {
  if (element.textContent !== value) element.textContent = value;
}

function bind(element, scope) {
  for (const { name, value } of [...element.attributes]) {
    if (name === "data-text") setText(element, text(scope, value) ?? "–");
    else if (name === "data-if") element.hidden = !isShown(lookup(scope, value));
    else if (name === "data-unless") element.hidden = isShown(lookup(scope, value));
    else if (name.startsWith("data-attr-")) setAttribute(element, name.slice("data-attr-".length), text(scope, value));
  }
  if (element.dataset.each) return repeat(element, lookup(scope, element.dataset.each));
  for (const child of element.children) bind(child, scope);
}

function setAttribute(element, name, value) {
  if (value === null) element.removeAttribute(name);
  else if (element.getAttribute(name) !== value) element.setAttribute(name, value);
}

// The rows of each list by key, so that a row stays the same element as long as its item exists.
const rowsOf = new WeakMap();

function repeat(list, items) {
  const template = list.querySelector("template");
  const old = rowsOf.get(list) ?? new Map();
  if (!rowsOf.has(list)) while (template.nextElementSibling) template.nextElementSibling.remove();
  const rows = new Map();
  for (const [index, item] of entries(items).slice(0, ROWS_MAX).entries()) {
    let key = item.key ?? item.reference ?? String(index);
    if (rows.has(key)) key = `${key} ${index}`;
    const row = old.get(key) ?? template.content.firstElementChild.cloneNode(true);
    bind(row, item);
    rows.set(key, row);
  }
  for (const [key, row] of old) if (!rows.has(key)) row.remove();
  let last = template;
  for (const row of rows.values()) {
    if (last.nextElementSibling !== row) last.after(row);
    last = row;
  }
  rowsOf.set(list, rows);
}

// The items of an array, or of an object as items with a `key`.
function entries(items) {
  if (Array.isArray(items)) return items;
  return Object.entries(items ?? {}).map(([key, item]) => ({ ...item, key }));
}

// The list of artifacts

function sortedArtifacts() {
  const needle = byId("filter").value.trim().toLowerCase();
  const items = (data.stats?.items ?? []).filter((item) => item.reference.toLowerCase().includes(needle));
  const value = (item) => {
    const value = item[sorting.field];
    return typeof value === "string" || typeof value === "number" ? value : Number(isShown(value));
  };
  const compare = (a, b) => {
    const [x, y] = [value(a), value(b)];
    if (typeof x === typeof y) return x < y ? -1 : Number(x > y);
    // Absent times come first.
    return typeof x === "string" ? 1 : -1;
  };
  const direction = sorting.descending ? -1 : 1;
  return items.sort((a, b) => direction * compare(a, b) || (a.reference < b.reference ? -1 : 1));
}

function render() {
  const items = sortedArtifacts();
  bind(document.body, { ...data, stats: data.stats && { ...data.stats, items } });
  const total = data.stats?.items.length ?? 0;
  const cut = items.length > ROWS_MAX ? `, the first ${ROWS_MAX} are shown` : "";
  setText(byId("shown"), items.length === total ? `${total} artifacts${cut}` : `${items.length} of ${total} artifacts${cut}`);
}

function sortBy(field) {
  sorting.descending = sorting.field === field && !sorting.descending;
  sorting.field = field;
  for (const button of document.querySelectorAll("[data-sort]")) {
    const isSorted = button.dataset.sort === field;
    button.closest("th").setAttribute("aria-sort", isSorted ? (sorting.descending ? "descending" : "ascending") : "none");
  }
  if (data.stats) render();
}

// Names the artifacts that are gone since the last poll.
function reportRemoved(before, after) {
  const kept = new Set(after.map((item) => item.reference));
  const gone = before.map((item) => item.reference).filter((reference) => !kept.has(reference));
  if (gone.length === 0) return;
  const names = gone.slice(0, 5).join(", ") + (gone.length > 5 ? ` and ${gone.length - 5} more` : "");
  setText(byId("removed"), `Evicted or removed at ${new Date().toLocaleTimeString()}: ${names}`);
}

// Requests

function byId(id) {
  return document.getElementById(id);
}

async function read(path, maxMs = REQUEST_MAX_MS) {
  // The address of the page may hold a user name and a password, which fetch() does not accept.
  const response = await fetch(new URL(path, location.origin), { cache: "no-store", signal: AbortSignal.timeout(maxMs) });
  if (response.status === 401) throw new Error("The token is no longer accepted. Reload the page to enter it.");
  return response.json();
}

function cause(error) {
  // Failed requests and timeouts. Their messages differ between browsers.
  if (error instanceof TypeError || error instanceof SyntaxError || error.name === "TimeoutError") return "The daemon does not answer.";
  return error.message;
}

let failures = 0;
let timer = null;
let isPolling = false;

async function poll() {
  if (isPolling) return;
  isPolling = true;
  clearTimeout(timer);
  const started = performance.now();
  try {
    const [stats, activity, metrics] = await Promise.all(["/cache/stats", "/cache/activity", "/cache/metrics"].map((path) => read(path)));
    const refused = activity.error ?? metrics.error;
    if (refused) throw new Error(refused.message);
    data.error = stats.error ?? null;
    if (!stats.error) {
      reportRemoved(data.stats?.items ?? [], stats.items);
      data.stats = stats;
    }
    Object.assign(data, { activity, metrics });
    sampleRates(activity.fills);
    failures = 0;
    render();
    setText(byId("connection"), "Updated every 2 seconds.");
  } catch (error) {
    failures += 1;
    const seconds = Math.round(pause(0) / 1000);
    setText(byId("connection"), `${cause(error)} This is the last known state. Trying again every ${seconds} s.`);
  }
  document.body.classList.toggle("stale", failures > 0);
  isPolling = false;
  if (!document.hidden) timer = setTimeout(poll, pause(performance.now() - started));
  if (!failures && !document.hidden && Date.now() - examinedAt > DOCTOR_MAX_AGE_S * 1000) examine(DOCTOR_MAX_AGE_S);
}

// The pause until the next poll. Requests that take long are sent less often.
function pause(tookMs) {
  return Math.min(POLL_MAX_MS, Math.max(POLL_MS * 2 ** Math.min(failures, 5), tookMs * 5));
}

let examinedAt = 0;

async function examine(maxAgeSeconds) {
  examinedAt = Date.now();
  byId("examine").disabled = true;
  setText(byId("doctor-state"), "Running …");
  try {
    const report = await read(`/cache/doctor?max_age=${maxAgeSeconds}`, DOCTOR_REQUEST_MAX_MS);
    if (report.error) throw new Error(report.error.message);
    data.doctor = report;
    setText(byId("doctor-state"), "");
    render();
  } catch (error) {
    setText(byId("doctor-state"), cause(error));
  }
  byId("examine").disabled = false;
}

for (const button of document.querySelectorAll("[data-sort]")) {
  button.addEventListener("click", () => sortBy(button.dataset.sort));
}
byId("filter").addEventListener("input", () => data.stats && render());
byId("examine").addEventListener("click", () => examine(0));
document.addEventListener("visibilitychange", () => {
  if (document.hidden) {
    clearTimeout(timer);
    setText(byId("connection"), "Paused while this tab is hidden.");
  } else {
    poll();
  }
});
poll();
