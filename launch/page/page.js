// The page: draws the document that lies in it, and draws it anew when a live job tells of more.

const memory = {};  // what the reader chose: sorting, windows, what is open
const open = new Set();
let story = null, charts = [];

const TONE = { running: "plain", starting: "plain", restarting: "warn", stopping: "warn", completed: "good", preempted: "warn", failed: "bad", new: "plain" };
const MEANING = {
  productive: "steps that still count", redone: "steps that were lost and done again", snapshot: "standing still for a copy of the state",
  startup: "launch, imports, up to the first step", detection: "from the last step to noticing a failure", teardown: "clearing away, the last save before a stop",
  restore: "reading the state back", stopped: "no supervisor, or a pause before the next attempt",
};
const key = (activity) => { const box = h("span", { class: "key", "aria-hidden": "true" }); box.style.background = `var(--${activity})`; return box; };
const from = (tier) => ({ ram: "memory", checkpoint: "a checkpoint" })[tier] || "the beginning";
const begins = (attempt) => (attempt.resumed ? attempt.resumed.step : attempt.first_step ? attempt.first_step - 1 : null);
const section = (id, draw) => { const host = body(id); host.replaceChildren(); draw(host); };

// ---------------------------------------------------------------- summary

function tile(name, big, small, extra) {
  return h("div", { class: "tile" }, h("dt", {}, name), h("dd", {}, h("div", { class: "big" }, big), extra, small && h("div", { class: "small" }, small)));
}

function summary(status) {
  at("name").textContent = story.name;
  const state = at("state");
  state.textContent = status.state; state.className = `pill ${TONE[status.state] || "plain"}`;
  document.title = `${story.name}: ${status.state}`;
  const done = status.total_steps ? Math.min(1, status.step / status.total_steps) : null;
  const track = done === null ? null : h("div", { class: "track", role: "progressbar", "aria-label": "Steps", "aria-valuemin": "0", "aria-valuemax": "100", "aria-valuenow": Math.round(100 * done) }, h("i", { style: { width: `${100 * done}%` } }));
  const rate = status.rate ? `${Number(status.rate.toPrecision(3))} steps/s` : null;
  const left = status.rate && status.total_steps > status.step ? `${duration((status.total_steps - status.step) / status.rate)} to go` : null;
  const total = Object.values(status.seconds).reduce((a, b) => a + b, 0);
  const point = (held) => (held ? `step ${count(held.step)}` : "none");
  const age = (held) => (!held || held.age_s === null ? null : status.supervisor.alive ? `${duration(held.age_s)} ago` : moment(story.made - held.age_s));
  const tiles = [
    tile("Steps", count(status.step), [status.total_steps && `of ${count(status.total_steps)}`, rate, left].filter(Boolean).join(", "), track),
    tile("Goodput", percent(status.goodput), `of ${duration(total - status.seconds.stopped)} under supervision`),
    tile("Attempts", count(story.attempts.length), `${plural(status.restarts, "restart")}, ${plural(status.preemptions, "preemption")}`),
    tile("Done again", count(status.lost_steps), `${status.lost_steps === 1 ? "step" : "steps"} that were lost, ${duration(status.seconds.redone)}`),
    tile("Snapshot", point(status.snapshot), age(status.snapshot)),
    tile("Checkpoint", point(status.checkpoint), status.checkpoint_failure ? h("span", { class: "bad" }, `a newer one failed: ${status.checkpoint_failure}`) : age(status.checkpoint)),
  ];
  for (const [name, number] of Object.entries(status.metrics).sort(([a], [b]) => (b === "loss") - (a === "loss")).slice(0, 2)) tiles.push(tile(name, value(number), "newest value"));
  const { problems, warnings } = status;
  at("summary").replaceChildren(
    status.reason ? h("p", { class: "reason" }, status.reason) : "",
    ...warnings.map((warning) => h("p", { class: "reason warn" }, `Warning: ${warning.text}`)),
    status.deadline ? h("p", { class: "reason" }, `${status.deadline.source} in ${duration(status.deadline.seconds)}`) : "",
    status.slow_rank !== null ? h("p", { class: "reason warn" }, `The others wait for rank ${status.slow_rank}${status.slow_node ? ` on ${status.slow_node}` : ""}.`) : "",
    h("dl", { class: "tiles" }, tiles),
    problems.length ? h("details", {}, h("summary", { class: "warn" }, `${plural(problems.length, "remark")} on the journal`), problems.map((text) => h("p", { class: "quiet" }, text))) : "",
  );
}

// ---------------------------------------------------------------- time

function timeSection(host) {
  const { ribbon, activities, status } = story, seconds = status.seconds;
  const total = Object.values(seconds).reduce((a, b) => a + b, 0);
  if (!total || !ribbon.columns.length) { host.append(h("p", { class: "empty" }, "No time has passed yet.")); return; }
  const sorted = activities.filter((name) => seconds[name] > 0).sort((a, b) => seconds[b] - seconds[a]);
  host.append(h("div", { class: "stack", role: "img", "aria-label": `Of ${duration(total)}: ${sorted.map((name) => `${name} ${percent(seconds[name] / total)}`).join(", ")}` },
    sorted.map((name) => h("i", { title: `${name} ${duration(seconds[name])}`, style: { background: `var(--${name})`, width: `${(100 * seconds[name]) / total}%` } }))));
  const hold = h("div");
  table(hold, "time", `What ${duration(total)} went into; goodput is productive over all but stopped`, [
    { name: "Activity", of: (name) => [key(name), name], by: (name) => name, tight: true },
    { name: "Time", number: true, of: (name) => duration(seconds[name]), by: (name) => seconds[name], tight: true },
    { name: "Share", number: true, of: (name) => percent(seconds[name] / total, 2), by: (name) => seconds[name], tight: true },
    { name: "What it is", of: (name) => MEANING[name] || "", by: (name) => MEANING[name] || "", class: "hint" },
  ], sorted, memory.time ? memory : Object.assign(memory, { time: { by: 1, up: false, all: true } }));
  host.append(hold, h("h3", {}, "Over time"));
  timeChart(host, total);
}

function timeChart(host, total) {
  const { ribbon, activities, attempts } = story;
  const first = ribbon.start, last = first + total, top = Math.max(1, ...attempts.map((each) => each.step || 0));
  const order = activities.map((name, index) => [name, index]);
  const HIGH = 110, GAP = 22, STEPS = 190, base = HIGH + GAP + STEPS;
  const y = (at) => 8 + HIGH + GAP + STEPS - 8 - (at / top) * (STEPS - 12);
  const ways = attempts.map((each) => {
    const points = each.way.map(([time, at]) => [time, at]);
    const begin = begins(each);
    if (points.length && begin !== null) points.unshift([Math.min(each.first_time, points[0][0]), Math.min(begin, points[0][1])]);
    return parted(points, each.kept);
  });
  charts.push(new Chart(host, {
    key: "time", label: `What each moment went into, and completed steps, over ${duration(total)}`, height: base + 28, left: 52, extent: [first, last],
    keep: kept("time", first, last), onwindow: (window) => { memory.timeWindow = window[0] === first && window[1] === last ? null : window; },
    ticks: timeTicks,
    tools: h("span", { class: "quiet" }, "Above: share of each moment by activity. Below: completed steps; ", h("span", { class: "warn" }, "amber"), " was lost and done again."),
    draw(parts, x, [low, high], left, right) {
      const layers = order.map(() => []);
      ribbon.columns.forEach((row, index) => {
        const begin = first + index * ribbon.width, end = Math.min(begin + ribbon.width, last);
        if (end < low || begin > high) return;
        const sum = row.reduce((a, b) => a + b, 0);
        if (!(sum > 0)) return;
        let foot = 8 + HIGH;
        const a = x(begin), b = Math.max(x(end), a + 0.3);
        order.forEach(([, activity], layer) => {
          const tall = (Math.max(0, row[activity]) / sum) * HIGH;
          if (tall > 0.05) layers[layer].push(`M${a.toFixed(2)} ${foot.toFixed(2)}V${(foot - tall).toFixed(2)}H${(b + 0.35).toFixed(2)}V${foot.toFixed(2)}Z`);
          foot -= tall;
        });
      });
      const clipped = s("g", { "clip-path": this.clip });
      order.forEach(([name], layer) => { if (layers[layer].length) clipped.append(s("path", { d: layers[layer].join(""), style: { fill: `var(--${name})` } })); });
      for (const [share, text] of [[0, "0 %"], [0.5, "50 %"], [1, "100 %"]]) parts.push(s("text", { x: left - 7, y: 12 + HIGH - share * HIGH, "text-anchor": "end" }, text));
      for (const tick of roundTicks(0, top, 4)) parts.push(s("line", { class: "grid", x1: left, x2: right, y1: y(tick), y2: y(tick) }), s("text", { x: left - 7, y: y(tick) + 4, "text-anchor": "end" }, tick >= 1e6 ? `${tick / 1e6}M` : tick >= 1e4 ? `${tick / 1e3}k` : tick));
      const place = ([time, at]) => [x(time), y(at)];
      const draw = (kind, lines) => { const d = lines.filter((line) => line.length > 1).map((line) => path(line.map(place))).join(""); if (d) clipped.append(s("path", { class: kind, d })); };
      draw("gone", ways.map(([, lost]) => lost));
      draw("way", ways.map(([stays]) => stays));
      draw("back", attempts.slice(1).map((each, index) => {
        const before = attempts[index], begin = begins(each);
        return before.ended && before.step && begin !== null && each.first_time ? [[before.ended, before.step], [each.first_time, begin]] : [];
      }));
      const many = attempts.length > 120;
      for (const each of attempts) {
        if (!each.ended || each.ended < low || each.ended > high) continue;
        clipped.append(s("circle", { class: `end ${each.outcome === "cut off" ? "cut" : each.outcome}`, cx: x(each.ended), cy: y(each.step || begins(each) || 0), r: many ? 1.8 : 3.4 }));
      }
      parts.push(clipped);
    },
    read(time) {
      const index = attempts.length ? nearest(attempts, time, (each) => each.began) : -1;
      const each = index < 0 ? null : attempts[attempts[index].began > time && index ? index - 1 : index];
      const row = ribbon.columns[Math.min(ribbon.columns.length - 1, Math.floor((time - first) / ribbon.width))] || [], sum = row.reduce((a, b) => a + b, 0);
      const what = activities.map((name, i) => [name, row[i]]).filter(([, part]) => part > 0.005 * sum).sort((a, b) => b[1] - a[1]).map(([name, part]) => (part > 0.995 * sum ? name : `${name} ${percent(part / sum, 0)}`));
      const nodes = [h("b", {}, moment(time)), `, ${duration(time - first)} in: `, what.join(", ") || "nothing yet"];
      if (each) {
        const way = each.way, near = way.length ? way[nearest(way, time, (point) => point[0])] : null;
        nodes.push("; attempt ", h("b", {}, each.attempt), near && time <= (each.ended || Infinity) ? `, about step ${count(near[1])}` : each.ended && time > each.ended ? ` had ended (${each.outcome})` : "");
      }
      return nodes;
    },
  }));
  host.append(h("ul", { class: "legend" }, activities.filter((name) => story.status.seconds[name] > 0).map((name) => h("li", {}, key(name), name))));
}

function kept(name, first, last) {
  const window = memory[`${name}Window`];
  if (!window) return null;
  const [low, high] = [Math.max(first, window[0]), Math.min(last, window[1])];
  return high > low ? [low, high] : null;
}

// ---------------------------------------------------------------- metrics

function metricsSection(host) {
  const { metrics, attempts } = story;
  if (!metrics.length) { host.append(h("p", { class: "empty" }, "Nothing was logged: session.log(loss=loss) does.")); return; }
  const metric = metrics.find((each) => each.name === memory.metric) || metrics[0];
  const chips = metrics.length > 1 && h("div", { class: "chips", role: "group", "aria-label": "Metric" }, metrics.map((each) =>
    h("button", { class: "chip", type: "button", "data-key": `metric-${each.name}`, "aria-pressed": String(each === metric), onclick: () => { memory.metric = each.name; keepingFocus(redrawMetrics); } }, each.name)));
  if (chips) host.append(chips);
  const numbers = metric.stretches.flatMap((stretch) => stretch[2]);
  const keptAt = new Map(attempts.map((each) => [each.attempt, each.kept]));
  const steps = metric.stretches.flatMap((stretch) => stretch[1]);
  const reduce = (list, pick) => list.reduce((a, b) => pick(a, b), list[0]);
  let first = reduce([...steps, ...metric.not_finite], Math.min), last = reduce([...steps, ...metric.not_finite], Math.max);
  if (first === last) { first -= 1; last += 1; }
  const low0 = reduce(numbers, Math.min), high0 = reduce(numbers, Math.max), canLog = numbers.length > 0 && low0 > 0 && high0 / low0 > 3;
  const log = canLog && memory.log;
  const HIGH = 250, level = (v) => (log ? Math.log10(v) : v);
  const points = metric.stretches.map(([attempt, xs, ys]) => [attempt, xs.map((x, index) => [x, ys[index]])]);
  const split = points.map(([attempt, line]) => { const limit = keptAt.get(attempt), cut = limit === null || limit === undefined ? -1 : line.findIndex(([at]) => at > limit); return cut < 0 ? [attempt, line, []] : [attempt, line.slice(0, cut), line.slice(Math.max(0, cut - 1))]; });
  const flat = points.flatMap(([attempt, line]) => line.map(([at, v]) => [at, v, attempt])).sort((a, b) => a[0] - b[0]);
  const back = attempts.filter((each) => each.lost > 0 && each.kept !== null);
  const thin = metric.shown < metric.count - metric.not_finite_count;
  charts.push(new Chart(host, {
    key: "metric", label: `${metric.name} over steps: ${plural(metric.count, "value")}`, height: HIGH + 32, left: 64, extent: [first, last], keep: kept("metric", first, last),
    onwindow: (window) => { memory.metricWindow = window[0] === first && window[1] === last ? null : window; },
    ticks: (low, high, most) => roundTicks(low, high, most).filter((tick) => tick === Math.round(tick)).map((tick) => [tick, count(tick)]),
    tools: [h("b", {}, metric.name), h("span", { class: "quiet" }, thin ? `${count(metric.count)} values drawn by ${count(metric.shown)}: of each column the first, lowest, highest and last` : plural(metric.count, "value")),
      canLog && h("button", { class: "chip", type: "button", "data-key": "log", "aria-pressed": String(Boolean(log)), onclick: () => { memory.log = !memory.log; keepingFocus(redrawMetrics); } }, "logarithmic")],
    draw(parts, x, [low, high], left, right) {
      const seen = flat.filter(([at]) => at >= low && at <= high).map((point) => level(point[1]));
      let bottom = reduce(seen.length ? seen : [0], Math.min), top = reduce(seen.length ? seen : [1], Math.max);
      if (!(top > bottom)) { const pad = Math.abs(top) * 0.05 || 1; bottom -= pad; top += pad; }
      const pad = (top - bottom) * 0.05; bottom -= pad; top += pad;
      const y = (v) => 10 + (1 - (level(v) - bottom) / (top - bottom)) * (HIGH - 14);
      for (const tick of roundTicks(bottom, top, 5)) {
        const at = 10 + (1 - (tick - bottom) / (top - bottom)) * (HIGH - 14);
        parts.push(s("line", { class: "grid", x1: left, x2: right, y1: at, y2: at }), s("text", { x: left - 7, y: at + 4, "text-anchor": "end" }, value(log ? Number((10 ** tick).toPrecision(3)) : tick)));
      }
      const clipped = s("g", { "clip-path": this.clip }), place = ([at, v]) => [x(at), y(v)];
      const draw = (kind, lines) => {
        const d = lines.filter((line) => line.length > 1).map((line) => path(line.map(place))).join("");
        if (d) clipped.append(s("path", { class: kind, d }));
        for (const line of lines) if (line.length === 1) clipped.append(s("circle", { class: `dot ${kind === "gone" ? "gone" : ""}`, cx: x(line[0][0]), cy: y(line[0][1]), r: 1.8 }));
      };
      draw("gone", split.map(([, , lost]) => lost));
      draw("way", split.map(([, stays]) => stays));
      const floor = HIGH + 4;
      for (const each of back) clipped.append(s("line", { class: "mark", x1: x(each.kept), x2: Math.max(x(each.step), x(each.kept) + 1.5), y1: floor, y2: floor }));
      for (const at of metric.not_finite) clipped.append(s("line", { class: "nan", x1: x(at), x2: x(at), y1: 2, y2: 10 }));
      parts.push(clipped);
    },
    read(at) {
      if (!flat.length) return [`step ${count(Math.round(at))}`];
      const [near, v, attempt] = flat[nearest(flat, at, (point) => point[0])];
      const limit = keptAt.get(attempt), lost = limit !== null && limit !== undefined && near > limit;
      return ["step ", h("b", {}, count(near)), `: ${metric.name} `, h("b", {}, value(v)), `, attempt ${attempt}`, lost ? h("span", { class: "warn" }, " (lost, done again)") : ""];
    },
  }));
  const notes = [];
  if (back.length) notes.push(`Amber: steps that were lost and done again (${plural(back.length, "roll-back")}, marked below the curve).`);
  if (metric.not_finite_count) notes.push(`${plural(metric.not_finite_count, "value")} not finite (red marks above)${metric.not_finite_count > metric.not_finite.length ? `, the last ${metric.not_finite.length} shown` : ""}.`);
  if (story.metrics_left_out.length) notes.push(`Not shown: ${story.metrics_left_out.join(", ")}.`);
  if (notes.length) host.append(h("p", { class: "quiet" }, notes.join(" ")));
}

function redrawMetrics() {
  for (const chart of charts.filter((each) => each.key === "metric")) chart.close();
  charts = charts.filter((each) => each.key !== "metric");
  section("metrics", metricsSection);
}

// ---------------------------------------------------------------- attempts, failures, checkpoints, settings

const OUTCOME = { failed: "bad", finished: "good", stopped: "warn", "cut off": "warn", running: "" };
const whyEnded = (each) => (each.failure ? each.failure.reason : each.outcome === "cut off" ? "its supervisor died" : each.stop ? `${each.stop}` : each.verdict ? each.verdict.reason : "");
const lasted = (each) => (each.ended || story.made) - each.began;

function attemptsSection(host) {
  if (!story.attempts.length) { host.append(h("p", { class: "empty" }, "None yet.")); return; }
  const nodes = new Set(story.attempts.map((each) => `${each.host} ${each.world_size}`));
  const only = story.attempts[story.attempts.length - 1], all = nodes.size > 1 ? "" : `, all on ${only.host}${only.world_size ? ` with ${plural(only.world_size, "rank")}` : ""}`;
  table(host, "attempts", `${plural(story.attempts.length, "attempt")}${all}: what ran, what of it was done again, and why each ended`, [
    { name: "Attempt", number: true, of: (each) => each.attempt, by: (each) => each.attempt },
    { name: "Began", of: (each) => moment(each.began), by: (each) => each.began, tight: true },
    { name: "Lasted", number: true, of: (each) => duration(lasted(each)), by: lasted, tight: true },
    { name: "From", of: (each) => [each.resumed ? from(each.resumed.tier) : "–", h("span", { class: "quiet" }, each.standby ? ", standby" : ", cold start")], by: (each) => (each.resumed ? from(each.resumed.tier) : null), tight: true },
    { name: "Steps", number: true, of: (each) => (each.step === null ? "–" : `${count(begins(each))} – ${count(each.step)}`), by: (each) => each.step, tight: true },
    { name: "Done again", number: true, of: (each) => (each.lost ? count(each.lost) : ""), by: (each) => each.lost },
    { name: "Ended", of: (each) => h("span", { class: OUTCOME[each.outcome] }, each.failure ? each.failure.kind.replace(/_/g, " ") : each.outcome), by: (each) => (each.failure ? each.failure.kind : each.outcome), tight: true },
    { name: "Why", of: whyEnded, by: whyEnded, class: "long" },
    ...(nodes.size > 1 ? [{ name: "Node", of: (each) => `${each.host || ""}${each.world_size ? `, ${plural(each.world_size, "rank")}` : ""}`, by: (each) => each.host || "", tight: true }] : []),
  ], story.attempts, memory);
}

function failuresSection(host) {
  const failed = story.attempts.filter((each) => each.failure).reverse();
  if (!failed.length) { host.append(h("p", { class: "empty" }, "None.")); return; }
  const kinds = new Map();
  for (const each of failed) kinds.set(each.failure.kind, (kinds.get(each.failure.kind) || 0) + 1);
  const chosen = kinds.has(memory.kind) ? memory.kind : null;
  const choose = (kind) => () => { memory.kind = kind; keepingFocus(() => section("failures", failuresSection)); };
  const chip = (kind, text) => h("button", { class: "chip", type: "button", "data-key": `kind-${kind}`, "aria-pressed": String(chosen === kind), onclick: choose(kind) }, text);
  host.append(h("div", { class: "chips", role: "group", "aria-label": "Kind of failure" }, chip(null, `all ${failed.length}`), [...kinds].map(([kind, number]) => chip(kind, `${kind.replace(/_/g, " ")} ${number}`))));
  const wanted = failed.filter((each) => chosen === null || each.failure.kind === chosen);
  const list = h("div"), show = (some) => list.append(...some.map(failureItem));
  host.append(list);
  show(wanted.slice(0, 30));
  if (wanted.length > 30) { const more = h("button", { class: "tool more", type: "button", onclick: () => { more.remove(); show(wanted.slice(30)); } }, `Show all ${wanted.length}`); host.append(more); }
}

function opened(id, head, inside) {  // its content is made when it is opened
  const item = h("details", {}, h("summary", { "data-key": id }, head));
  const make = () => { if (item.open && item.children.length === 1) item.append(...inside().filter(Boolean)); if (item.open) open.add(id); else open.delete(id); };
  item.addEventListener("toggle", make);
  if (open.has(id)) { item.open = true; make(); }
  return item;
}

function failureItem(each) {
  const { failure, evidence } = each;
  const where = [failure.rank !== null && `rank ${failure.rank}`, failure.step !== null && `after step ${count(failure.step)}`, moment(failure.time)].filter(Boolean).join(", ");
  return opened(`failure-${each.attempt}`, [h("b", {}, `Attempt ${each.attempt}: ${failure.kind.replace(/_/g, " ")}`), ` ${failure.reason} `, h("span", { class: "quiet" }, where)], () => {
    const parts = [each.verdict && h("p", {}, "Verdict: ", each.verdict.reason)];
    if (failure.exception) parts.push(h("p", {}, "Exception: ", h("code", {}, failure.exception)));
    if (!evidence || evidence.left_out) { parts.push(h("p", { class: "quiet" }, "Its evidence is left out of this page, which would grow too large: ", h("code", {}, evidence ? evidence.path : ""))); return parts; }
    if (evidence.problem) { parts.push(h("p", { class: "quiet" }, `No evidence: ${evidence.path}: ${evidence.problem}`)); return parts; }
    if (evidence.hang) parts.push(h("p", {}, `No sign of life for longer than ${duration(evidence.hang.limit)}: ${evidence.hang.kind.replace(/_/g, " ")}`),
      h("ul", {}, evidence.hang.ranks.map((rank) => h("li", {}, `rank ${rank.rank}, step ${count(rank.step)}, ${rank.stage}, quiet for ${duration(rank.quiet)}${rank.where ? `, at ${rank.where}` : ""}${rank.suspect ? " (suspect)" : rank.waiting ? " (waits for others)" : ""}`))));
    for (const end of evidence.ends) {
      const how = end.signal !== null ? `signal ${end.signal}` : `exit code ${end.exit_code}`;
      parts.push(h("h3", {}, `Rank ${end.rank} (pid ${end.pid}): ${how}${end.step !== null ? `, after step ${count(end.step)}` : ""}`));
      if (end.raised) parts.push(h("pre", { tabindex: "0" }, end.raised));
      if (end.last_lines.length) parts.push(h("p", { class: "quiet" }, "Last lines of its output"), h("pre", { tabindex: "0" }, end.last_lines.join("\n")));
    }
    if (evidence.launcher_lines.length) parts.push(opened(`launcher-${each.attempt}`, "Last lines of torchrun", () => [h("pre", { tabindex: "0" }, evidence.launcher_lines.join("\n"))]));
    const stacks = Object.entries(evidence.stacks);
    if (stacks.length) parts.push(h("h3", {}, "Stacks"), ...stacks.map(([rank, text]) => opened(`stack-${each.attempt}-${rank}`, `rank ${rank}`, () => [h("pre", { tabindex: "0" }, text)])));
    parts.push(h("p", { class: "quiet" }, "From ", h("code", {}, evidence.path)));
    return parts;
  });
}

const STATE = { kept: "", verified: "good", damaged: "bad", pruned: "quiet", replaced: "quiet", gone: "warn" };
function checkpointsSection(host) {
  const list = story.checkpoints;
  if (story.snapshots.count) host.append(h("p", { class: "quiet" }, `${plural(story.snapshots.count, "snapshot")} in memory noted, for which the training stood still ${duration(story.snapshots.stall)} in all.`));
  if (!list.length) host.append(h("p", { class: "empty" }, "None was committed."));
  else {
    const names = [...new Set(list.flatMap((each) => Object.keys(each.metrics)))].sort().slice(0, 4), hold = h("div");
    const left = story.checkpoints_made - list.length;
    table(hold, "checkpoints", `${plural(story.checkpoints_made, "checkpoint")} committed${left ? `, the oldest ${count(left)} that are gone not shown` : ""}; kept: there, its bytes not compared since; verified: an attempt resumed from it`, [
      { name: "Step", number: true, of: (each) => count(each.step), by: (each) => each.step },
      { name: "Committed", of: (each) => moment(each.time), by: (each) => each.time, tight: true },
      { name: "State", of: (each) => h("span", { class: STATE[each.state] }, each.state), by: (each) => each.state },
      { name: "Size", number: true, of: (each) => size(each.bytes), by: (each) => each.bytes, tight: true },
      { name: "Took", number: true, of: (each) => duration(each.seconds), by: (each) => each.seconds, tight: true },
      { name: "Attempt", number: true, of: (each) => each.attempt, by: (each) => each.attempt },
      ...names.map((name) => ({ name, number: true, of: (each) => value(each.metrics[name]), by: (each) => each.metrics[name] })),
      { name: "Where", of: (each) => [each.path, each.emergency && " (emergency copy)", each.problem && h("span", { class: "bad" }, ` ${each.problem}`)], by: (each) => each.path, class: "path" },
    ], list, memory);
    host.append(hold);
  }
  const failed = story.checkpoint_failures;
  if (failed.length) host.append(opened("checkpoint-failures", `${plural(failed.length, "failed write")}${failed.length === 100 ? " (the last ones)" : ""}`, () => failed.slice().reverse().map((each) => h("p", { class: "quiet" }, `${moment(each.time)}, step ${count(each.step)}: ${each.reason}`))));
}

function settingsSection(host) {
  const { status, runs } = story, run = runs[runs.length - 1];
  const rows = [["Command", h("code", {}, status.command.join(" "))], ["Job directory", h("code", {}, status.dir)], ["Run id", h("code", {}, status.run_id || "–")], ["everstep", run ? run.version : story.version],
    ["Failures left", `${status.limits.failures_left} before it gives up without progress`], ["Preemptions left", `${status.limits.preemptions_left} without progress`]];
  if (status.memory) rows.push(["Memory of snapshots", `${size(status.memory.held)} held of ${size(status.memory.needed)} needed, ${size(status.memory.free)} free in ${status.memory.place}`]);
  for (const [name, text] of Object.entries((run && run.settings) || {})) rows.push([`--${name}`, text]);
  host.append(h("dl", { class: "facts" }, rows.map(([name, shown]) => [h("dt", {}, name), h("dd", {}, shown)])));
  if (!runs.length) return;
  const hold = h("div");
  table(hold, "runs", `${plural(runs.length, "run")} of the supervisor`, [
    { name: "Epoch", number: true, of: (each) => each.epoch, by: (each) => each.epoch },
    { name: "Began", of: (each) => moment(each.time), by: (each) => each.time, tight: true },
    { name: "Ended", of: (each) => (each.ended ? moment(each.ended) : each === run && status.supervisor.alive ? "at work" : "killed"), by: (each) => each.ended, tight: true },
    { name: "Exit code", number: true, of: (each) => (each.exit_code === null ? "" : each.exit_code), by: (each) => each.exit_code },
    { name: "Node", of: (each) => `${each.host}, pid ${each.pid}`, by: (each) => each.host, tight: true },
    { name: "Why", of: (each) => each.reason || "", by: (each) => each.reason || "", class: "long" },
  ], runs, memory);
  host.append(hold);
}

// ---------------------------------------------------------------- the whole, and what is live

function drawAll() {
  for (const chart of charts) chart.close();
  charts = [];
  keepingFocus(() => {
    summary(story.status);
    section("time", timeSection);
    section("metrics", metricsSection);
    section("attempts", attemptsSection);
    section("failures", failuresSection);
    section("checkpoints", checkpointsSection);
    section("settings", settingsSection);
  });
  at("foot").textContent = `${document.body.dataset.live ? "As of" : "Made"} ${moment(story.made)} by everstep ${story.version}. Times are this browser's.`;
}

function themes() {
  const pick = at("theme");
  let stored = "auto";
  try { stored = localStorage.getItem("everstep-theme") || "auto"; } catch { /* a browser without storage */ }
  const use = (theme) => { pick.value = theme; if (theme === "auto") delete document.documentElement.dataset.theme; else document.documentElement.dataset.theme = theme; };
  use(["light", "dark"].includes(stored) ? stored : "auto");
  pick.addEventListener("change", () => { use(pick.value); try { localStorage.setItem("everstep-theme", pick.value); } catch { /* likewise */ } });
}

function follow(live) {
  const jobs = at("jobs"), pick = at("job"), say = at("live");
  if (live.jobs.length > 1) {
    pick.replaceChildren(...live.jobs.map((name, index) => h("option", { value: index, selected: index === live.job }, name)));
    pick.addEventListener("change", () => { location.href = `/job/${pick.value}/`; });
    jobs.hidden = false;
  }
  let version = live.version, fetching = false;
  const events = new EventSource("events");
  events.onopen = () => { say.textContent = "live"; };
  events.onerror = () => { say.textContent = "connection lost; this is what was last known"; };
  events.addEventListener("status", (event) => { story.status = JSON.parse(event.data); summary(story.status); });
  events.addEventListener("trouble", (event) => { say.textContent = JSON.parse(event.data); });
  events.addEventListener("story", async (event) => {
    if (event.data === version || fetching) return;
    fetching = true;
    try {
      const answer = await fetch("data.json");
      if (answer.ok) { story = await answer.json(); version = event.data; drawAll(); }
    } finally { fetching = false; }
  });
}

themes();
story = JSON.parse(at("data").textContent);
const live = story.live;
if (live) document.body.dataset.live = "yes";
drawAll();
if (live) follow(live);
document.body.dataset.ready = "yes";
