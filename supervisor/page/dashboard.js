// The dashboard: what the master tells of itself, live, and what can be asked of it. Text from outside is only ever text.

const HOT = "api/v1/hot";
const FROM_HERE = { "X-Segue-Page": "1" }; // no page of another origin can send it
const OUTCOMES_KEPT = 8;
const EVENTS_KEPT = 300;
const RATE_OVER_MS = 10_000;
const RETRY_MS = 1_000;
const PATIENCE_MS = 60_000; // so long may a master be gone that follows on another
const DEPLOYS = new Set(["reload", "stage", "promote", "discard", "rollback"]); // what is about a generation
const TIMELINE = { row: 22, left: 54, code: 82, right: 8, top: 6, axis: 20, wide: 600 };
const DRAWN = { booting: "booting", staged: "staged", activating: "staged", active: "active", draining: "draining", parked: "parked", failed: "failed" };

const $ = (id) => document.getElementById(id);
let may = { act: false, token: false };
let last = null;
const samples = new Map(); // pid → [[ms, requests, latency]…], the last ten seconds of them
const rates = new Map(); // pid → what the samples come to

// ------------------------------------------------------------------------------------------------ making elements

function make(name, properties = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return element;
}

// Rows are kept by key and cells only touched when they change: focus, selection and open details stay.
function fill(table, rows) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  const known = new Map([...body.rows].map((row) => [row.dataset.key, row]));
  rows.forEach(({ key, cells }, index) => {
    let row = known.get(key);
    known.delete(key);
    if (!row) {
      row = make("tr", { "data-key": key });
      cells.forEach((_, i) => row.append(make(i ? "td" : "th", { scope: i ? null : "row", class: heads[i].className || null, "data-label": heads[i].textContent })));
    }
    if (body.rows[index] !== row) body.insertBefore(row, body.rows[index] ?? null);
    cells.forEach((cell, i) => {
      const place = row.cells[i];
      const content = typeof cell === "object" && cell !== null ? cell : { text: cell ?? "" };
      const sign = JSON.stringify(content.sign ?? String(content.text));
      if (place.dataset.sign === sign) return;
      place.dataset.sign = sign;
      place.replaceChildren(...(content.nodes ? content.nodes() : [String(content.text)]));
    });
  });
  for (const row of known.values()) row.remove();
}

// ------------------------------------------------------------------------------------------------ words for numbers

const bytes = (n) => (n == null ? "" : n >= 2 ** 30 ? `${(n / 2 ** 30).toFixed(1)} GiB` : `${Math.round(n / 2 ** 20)} MiB`);
const seconds = (s) => (s == null ? "" : s < 1 ? `${Math.round(s * 1000)} ms` : `${s.toFixed(s < 10 ? 1 : 0)} s`);

function ago(unix) {
  const s = Math.max(0, Math.floor(Date.now() / 1000 - unix));
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}

const clock = (unix) => new Date(unix * 1000).toLocaleTimeString([], { hour12: false });

// ---------------------------------------------------------------------------------------------------- a worker's rates

function sampleAll(status) {
  const workers = status.generations.flatMap((generation) => generation.workers);
  const living = new Set(workers.map((worker) => worker.pid));
  for (const pid of samples.keys()) if (!living.has(pid)) samples.delete(pid), rates.delete(pid);
  for (const worker of workers) rates.set(worker.pid, sample(worker));
}

function sample(worker) {
  if (worker.pid == null || worker.requests_total == null) return {};
  const kept = samples.get(worker.pid) ?? [];
  const now = performance.now();
  kept.push([now, worker.requests_total, worker.latency ?? []]);
  while (kept.length > 2 && now - kept[0][0] > RATE_OVER_MS) kept.shift();
  samples.set(worker.pid, kept);
  const [then, requests, before] = kept[0];
  if (kept.length < 2 || now - then < 500) return {};
  const latency = (worker.latency ?? []).map((count, i) => count - (before[i] ?? 0));
  return {
    rate: ((worker.requests_total - requests) * 1000) / (now - then),
    p50: quantile(latency, 0.5),
    p99: quantile(latency, 0.99),
  };
}

// The upper bound of the bucket in which it lies: what is known for certain.
function quantile(counts, q) {
  const bounds = last?.latency_bounds_s ?? [];
  const total = counts.reduce((sum, count) => sum + count, 0);
  let seen = 0;
  for (let i = 0; total > 0 && i < counts.length; i += 1) {
    seen += counts[i];
    if (seen >= total * q) return i < bounds.length ? `≤ ${seconds(bounds[i])}` : `> ${seconds(bounds.at(-1))}`;
  }
  return "";
}

// ---------------------------------------------------------------------------------------------------------- the status

function show(status) {
  last = status;
  document.title = `${status.ready ? "" : "✖ "}segue ${status.instance}`;
  $("instance").textContent = status.instance;
  const readiness = status.stopping ? ["stopping", "bad"] : status.draining ? [`draining (${status.drain_mode})`, "warn"] : status.ready ? ["ready", "good"] : ["not ready", "bad"];
  tone($("readiness"), ...readiness);
  const where = status.listeners.map((listener) => listener.address).join(", ") || "nowhere yet";
  $("summary").textContent = `${where} · master pid ${status.master.pid}, segue ${status.master.version}, up ${ago(status.master.started)}, ${bytes(status.master.rss_bytes)}`;
  showGenerations(status);
  showWorkers(status);
  showServices(status);
  showReloads(status);
  showTimeline(status);
  showActions(status);
}

// What can't be done is greyed and does nothing. It keeps the focus, which whoever types would lose to nowhere otherwise.
function allow(button, possible) {
  if (possible) button.removeAttribute("aria-disabled");
  else button.setAttribute("aria-disabled", "true");
}

const allowed = (button) => button.getAttribute("aria-disabled") !== "true";

function tone(element, text, kind) {
  if (element.textContent !== text) element.textContent = text;
  element.dataset.tone = kind;
}

const stateOf = (state, text = state) => ({ sign: [state, text], nodes: () => [make("span", { "data-state": DRAWN[state] }, text)] });

function showGenerations(status) {
  const rows = [...status.generations].reverse().map((generation) => {
    const running = generation.workers.filter((worker) => worker.pid != null).length;
    const watch = status.probation?.generation === generation.id ? status.probation : null;
    const what = generation.state === "mixed" ? "a canary" : "on probation";
    const note = [
      generation.current ? "current" : "",
      watch ? `${what} for ${seconds(Math.max(0, watch.until - Date.now() / 1000))} more` : "",
      generation.workers_missing ? `${generation.workers_missing} held back: the code on disk has changed` : "",
      generation.changes ? `changed: ${generation.changes.summary}` : "",
      generation.reason,
    ].filter(Boolean);
    return {
      key: String(generation.id),
      cells: [
        generation.id,
        stateOf(generation.state),
        ago(generation.since),
        `${running} of ${generation.workers_wanted}`,
        { sign: codeOf(generation), nodes: () => [make("code", { title: codeOf(generation).join("\n") }, codeOf(generation)[0])] },
        bytes(generation.workers.reduce((sum, worker) => sum + (worker.rss_bytes ?? 0), 0)),
        note.join("; "),
      ],
    };
  });
  fill($("generations"), rows);
}

function codeOf(generation) {
  const { code, changes } = generation;
  const fingerprint = generation.fingerprint ? `fingerprint ${generation.fingerprint}` : "";
  const words = [code?.title ?? fingerprint, code ? fingerprint : "", generation.app_dir ?? "", code?.python ? `Python ${code.python}` : ""];
  return [...words, changes ? `changed: ${changes.summary}` : ""].filter(Boolean);
}

function showWorkers(status) {
  const rows = status.generations.flatMap((generation) =>
    generation.workers.map((worker) => {
      const { rate, p50, p99 } = rates.get(worker.pid) ?? {};
      return {
        key: `${generation.id}/${worker.id}`,
        cells: [
          `${generation.id}/${worker.id}`,
          worker.pid,
          stateOf(generation.state, worker.state),
          worker.connections,
          worker.in_flight,
          rate === undefined ? "" : rate.toFixed(rate < 10 ? 1 : 0),
          p50,
          p99,
          worker.cpu_percent == null ? "" : `${Math.round(worker.cpu_percent)} %`,
          bytes(worker.rss_bytes),
          worker.loop_lag_s == null ? "" : seconds(worker.loop_lag_s),
        ],
      };
    }),
  );
  fill($("workers"), rows);
}

function showServices(status) {
  const services = Object.entries(status.services ?? {});
  $("services-section").hidden = services.length === 0;
  const rows = services.map(([name, service]) => {
    const health = service.degraded ? [`degraded: ${service.degraded}`, "warn"] : service.healthy === false ? ["unhealthy", "bad"] : service.healthy ? ["healthy", "good"] : ["", ""];
    return {
      key: name,
      cells: [
        name,
        service.versions.join(", "),
        { sign: health, nodes: () => [make("span", { "data-tone": health[1] }, health[0])] },
        service.leases,
        service.retiring,
        { sign: name, nodes: () => [swapForm(name)] },
      ],
    };
  });
  fill($("services"), rows);
}

function swapForm(name) {
  const input = make("input", { placeholder: "key=value key=value", "aria-label": `Settings for the swap of ${name}`, autocomplete: "off" });
  const button = make("button", { "data-needs": "", "aria-label": `Swap ${name}`, "aria-disabled": may.act ? null : "true" }, "Swap");
  const submit = (event) => {
    event.preventDefault();
    if (!allowed(button)) return;
    const query = new URLSearchParams(input.value.split(/\s+/).filter(Boolean).map((pair) => [pair.split("=", 1)[0], pair.slice(pair.indexOf("=") + 1)]));
    ask(`Swap ${name}`, `reload/${encodeURIComponent(name)}`, query);
  };
  return make("form", { onsubmit: submit }, input, button);
}

function showReloads(status) {
  const rows = [...status.reloads].reverse().map((reload) => {
    const outcome = reload.outcome ?? `running: ${reload.phase}`;
    const kind = reload.outcome === "ok" ? "good" : reload.outcome ? "bad" : "warn";
    return {
      key: String(reload.number),
      cells: [
        `${reload.kind} ${reload.number}`,
        clock(reload.started),
        reload.asked_by,
        { sign: outcome, nodes: () => [make("span", { "data-tone": kind }, outcome === "ok" && reload.generation ? `generation ${reload.generation}` : outcome)] },
        { sign: [reload.phases, outcome], nodes: () => phasesOf(reload.phases) },
        { sign: [reload.reason, reload.output?.length], nodes: () => reasonOf(reload) },
      ],
    };
  });
  fill($("reloads"), rows);
}

function phasesOf(phases) {
  const entries = Object.entries(phases).filter(([, value]) => value > 0);
  const total = entries.reduce((sum, [, value]) => sum + value, 0);
  const untilServing = total - (phases.drain ?? 0);
  const words = entries.map(([name, value]) => `${name} ${seconds(value)}`).join(", ");
  const bar = make("div", { class: "bar", title: words, "aria-hidden": "true" });
  for (const [, value] of entries) {
    const part = make("i");
    part.style.width = `${(100 * value) / (total || 1)}%`;
    bar.append(part);
  }
  return [make("div", {}, make("div", { title: words }, seconds(untilServing)), bar, make("div", { class: "soft" }, words))];
}

function reasonOf(reload) {
  if (!reload.output) return [reload.reason ?? ""];
  return [make("details", {}, make("summary", {}, reload.reason || "what it printed"), make("pre", {}, reload.output))];
}

// ---------------------------------------------------------------------------------------------------------- the time line

function showTimeline(status) {
  const svg = $("timeline");
  const history = status.timeline ?? [];
  const now = Date.now() / 1000;
  const shown = history.slice(-10);
  const width = Math.max(280, svg.clientWidth || 800);
  const left = TIMELINE.left + (width < TIMELINE.wide ? 0 : TIMELINE.code);
  const begin = Math.min(now - 30, ...shown.map((generation) => generation.states[0]?.since ?? now));
  const scale = (width - left - TIMELINE.right) / (now - begin);
  const height = TIMELINE.top + shown.length * TIMELINE.row + TIMELINE.axis;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const parts = [];
  const x = (time) => left + Math.max(0, time - begin) * scale;
  const step = niceStep((now - begin) / Math.max(2, Math.floor(width / 140)));
  for (let back = 0; back <= now - begin; back += step) {
    const at = x(now - back);
    parts.push(shape("line", { class: "axis", x1: at, x2: at, y1: TIMELINE.top, y2: height - TIMELINE.axis + 4 }));
    const anchor = back === 0 ? "end" : "middle";
    parts.push(shape("text", { class: "tick", x: at, y: height - 7, "text-anchor": anchor }, back === 0 ? "now" : `−${shortly(back)}`));
  }
  [...shown].reverse().forEach((generation, index) => {
    const y = TIMELINE.top + index * TIMELINE.row;
    parts.push(shape("text", { x: 0, y: y + TIMELINE.row / 2 }, `gen ${generation.id}`));
    const code = generation.fingerprint ?? "";
    if (left > TIMELINE.left) parts.push(shape("text", { class: "code", x: TIMELINE.left, y: y + TIMELINE.row / 2 }, code));
    generation.states.forEach((state, i) => {
      const drawn = DRAWN[state.state];
      if (!drawn) return;
      const from = x(state.since);
      const to = x(generation.states[i + 1]?.since ?? now);
      const words = `generation ${generation.id}${code && `, code ${code}`}: ${state.state} at ${clock(state.since)} for ${seconds((generation.states[i + 1]?.since ?? now) - state.since)}`;
      const rect = shape("rect", { "data-state": drawn, x: from, y: y + 4, width: Math.max(2, to - from), height: TIMELINE.row - 8 });
      rect.append(shape("title", {}, words));
      parts.push(rect);
    });
  });
  svg.replaceChildren(...parts);
}

function shape(name, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

const niceStep = (wanted) => [5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 43200, 86400].find((step) => step >= wanted) ?? Math.ceil(wanted / 86400) * 86400;
const shortly = (s) => (s < 60 ? `${s} s` : s < 3600 ? `${s / 60} min` : s < 86400 ? `${s / 3600} h` : `${s / 86400} d`);

// -------------------------------------------------------------------------------------------------------------- actions

function showActions(status) {
  const having = (state) => status.generations.some((generation) => generation.state === state);
  const current = status.generations.find((generation) => generation.current);
  $("workers-wanted").textContent = current ? current.workers_wanted : "?";
  $("steer-note").textContent = may.act ? "" : may.token ? "Sign in with the token to steer, and to see events and what failed workers printed." : "Read only: segue serves without --token-file.";
  const possible = {
    promote: having("staged"),
    discard: having("staged") || having("booting"),
    rollback: status.can_roll_back ?? (having("parked") || having("draining")),
    drain: !status.draining,
    undrain: status.draining,
  };
  for (const button of document.querySelectorAll("[data-action]")) {
    const least = Number(button.dataset.delta) < 0 && current?.workers_wanted === 1;
    allow(button, may.act && possible[button.dataset.action] !== false && !least);
  }
  for (const button of document.querySelectorAll("[data-needs]")) allow(button, may.act);
}

document.querySelector(".actions").addEventListener("click", (event) => {
  const button = event.target.closest("[data-action]");
  if (!button || !allowed(button)) return;
  const { action, mode, delta } = button.dataset;
  const current = last?.generations.find((generation) => generation.current);
  switch (action) {
    case "drain": return ask(`Drain (${mode})`, "drain/start", new URLSearchParams({ mode }));
    case "undrain": return ask("End drain", "drain/stop");
    case "scale": return ask(`Scale to ${current.workers_wanted + Number(delta)}`, "scale", new URLSearchParams({ workers: current.workers_wanted + Number(delta) }));
    default: return ask(button.textContent, action);
  }
});

async function ask(title, path, query = new URLSearchParams()) {
  const line = make("li", { "data-tone": "warn" }, `${title}: asked`);
  $("outcomes").prepend(line);
  while ($("outcomes").children.length > OUTCOMES_KEPT) $("outcomes").lastChild.remove();
  const say = (kind, text, output) => {
    line.dataset.tone = kind;
    line.replaceChildren(`${title}: ${text}`, ...(output ? [make("pre", {}, output)] : []));
  };
  query.set("wait", "0");
  try {
    let answer = await fetch(`${HOT}/${path}?${query}`, { method: "POST", headers: FROM_HERE });
    let document = await answer.json();
    const where = answer.headers.get("Location")?.replace(/^\//, "");
    let until = performance.now() + PATIENCE_MS;
    while (answer.ok && where && document.outcome === null) {
      say("warn", document.phase);
      try {
        answer = await fetch(`${where}?wait=20&phase=${encodeURIComponent(document.phase)}`);
        document = await answer.json();
        until = performance.now() + PATIENCE_MS;
      } catch (error) {
        if (performance.now() > until) throw error;
        await new Promise((done) => setTimeout(done, RETRY_MS));
      }
    }
    if (!answer.ok) say("bad", `refused: ${document.detail}`, document.operation?.output);
    else if (document.outcome === "ok") say("good", DEPLOYS.has(document.kind) ? `done, generation ${document.generation}` : "done");
    else say("bad", `${document.outcome}: ${document.reason}`, document.output);
    if (answer.status === 401) await whoAmI();
  } catch (error) {
    say("bad", `no answer (${error.message}); what was asked for may go on`);
  }
}

// -------------------------------------------------------------------------------------------------------------- signing in

async function whoAmI() {
  const answer = await fetch("session");
  may = await answer.json();
  $("signin").hidden = may.act || !may.token;
  $("signout").hidden = !may.session;
  if (last) showActions(last);
  followEvents();
}

$("signin").addEventListener("submit", async (event) => {
  event.preventDefault();
  const note = $("signin-note");
  note.textContent = "";
  try {
    const answer = await fetch("session", { method: "POST", headers: { ...FROM_HERE, Authorization: `Bearer ${$("token").value}` } });
    $("token").value = "";
    if (!answer.ok) {
      note.textContent = (await answer.json()).detail;
      return $("token").focus();
    }
    await whoAmI();
    followStatus(); // who may act sees more
    document.querySelector("[data-action=reload]").focus();
  } catch (error) {
    note.textContent = `no answer (${error.message})`;
  }
});

$("signout").addEventListener("click", async () => {
  await fetch("session", { method: "DELETE", headers: FROM_HERE });
  await whoAmI();
  followStatus();
  $("token").focus();
});

// ------------------------------------------------------------------------------------------------------------------- live

let statusStream = null;
let eventStream = null;

function followStatus() {
  statusStream?.close();
  statusStream = new EventSource(`${HOT}/watch`);
  statusStream.addEventListener("status", (event) => {
    tone($("link"), "live", "good");
    const status = JSON.parse(event.data);
    sampleAll(status);
    show(status);
  });
  statusStream.addEventListener("error", () => {
    tone($("link"), "reconnecting", "warn");
    if (statusStream.readyState === EventSource.CLOSED) setTimeout(followStatus, RETRY_MS);
  });
  statusStream.addEventListener("open", () => whoAmI().catch(() => {}));
}

function followEvents() {
  $("events-note").textContent = may.act ? "" : "Shown to those who may steer: what happened may name what is private.";
  if (!may.act) {
    eventStream?.close();
    eventStream = null;
    return $("events").replaceChildren();
  }
  if (eventStream && eventStream.readyState !== EventSource.CLOSED) return;
  const after = $("events").lastElementChild?.dataset.id;
  eventStream = new EventSource(`${HOT}/events?last=100${after ? `&after=${after}` : ""}`);
  eventStream.addEventListener("message", (event) => addEvent(JSON.parse(event.data)));
}

function addEvent(event) {
  const list = $("events");
  const atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 30;
  const fields = Object.entries(event.fields ?? {}).map(([key, value]) => `${key}=${value}`).join(" ");
  const kind = event.level === "error" ? "bad" : event.level === "warning" ? "warn" : null;
  list.append(make("li", { "data-id": event.id, "data-tone": kind }, make("time", {}, clock(event.time)), " ", make("b", {}, event.event), ` ${fields}`, event.output ? make("pre", {}, event.output) : ""));
  while (list.children.length > EVENTS_KEPT) list.firstChild.remove();
  if (atEnd) list.scrollTop = list.scrollHeight;
}

setInterval(() => last && document.visibilityState === "visible" && show(last), 5_000);
addEventListener("resize", () => last && showTimeline(last));
document.addEventListener("visibilitychange", () => {
  if (document.visibilityState === "hidden") {
    statusStream?.close();
    statusStream = null;
  } else if (!statusStream) followStatus();
});
followStatus();
