"use strict";
// One conversation. Its turns are kept by the service, so a reload of this page, or of the service, goes on with it.

const $ = (id) => document.getElementById(id);
const turns = $("turns");
const message = $("message");
let session = localStorage.getItem("segue-session") || begin();
let busy = false;

function begin() {
  const name = "page-" + Math.random().toString(36).slice(2, 12);
  localStorage.setItem("segue-session", name);
  return name;
}

function show(who) {
  for (const key of ["generation", "model", "personality"]) {
    const place = $(key);
    const value = who[key] === undefined ? place.textContent : String(who[key]);
    if (value !== place.textContent) {
      if (place.textContent !== "–") {
        place.classList.add("changed");
        setTimeout(() => place.classList.remove("changed"), 2500);
      }
      place.textContent = value;
    }
  }
}

function turn(role, text) {
  $("hello").hidden = true;
  const article = document.createElement("article");
  article.className = role;
  const p = document.createElement("p");
  p.textContent = text;
  article.append(p);
  turns.append(article);
  article.scrollIntoView({ block: "end" });
  return article;
}

function note(article, text) {
  const footer = article.querySelector("footer") || article.appendChild(document.createElement("footer"));
  footer.textContent = text;
}

// Who has answered, below the answer
function credit(article, who, tools) {
  const parts = ["generation " + who.generation, who.model, who.personality].filter(Boolean);
  const used = (tools || []).map((each) => each.name + (each.ok ? "" : " (failed)"));
  if (used.length) parts.push("used " + used.join(", "));
  note(article, parts.join(" · "));
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    let end;
    while ((end = rest.indexOf("\n\n")) >= 0) {
      const lines = rest.slice(0, end).split("\n");
      rest = rest.slice(end + 2);
      const field = (name) => lines.filter((l) => l.startsWith(name + ": ")).map((l) => l.slice(name.length + 2)).join("\n");
      yield { name: field("event"), data: JSON.parse(field("data")) };
    }
  }
}

async function ask(text) {
  busy = true;
  $("send").disabled = true;
  turn("user", text);
  const article = turn("assistant", "");
  article.classList.add("open");
  const p = article.querySelector("p");
  const tools = [];
  let ended = false;
  try {
    const response = await fetch("api/v1/chat", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ message: text, session, stream: true }),
    });
    if (!response.ok) {
      const problem = await response.json();
      throw new Error(problem.detail || response.statusText);
    }
    for await (const { name, data } of events(response)) {
      if (name === "start") show(data);
      if (name === "token") p.textContent += data.text;
      if (name === "tool") tools.push(data);
      if (name === "error") throw new Error(data.detail);
      if (name === "done") {
        ended = true;
        show(data);
        credit(article, data, tools);
      }
      turns.scrollTop = turns.scrollHeight;
    }
    if (!ended) throw new Error("the answer was cut off");
  } catch (error) {
    article.classList.add("wrong");
    if (!p.textContent) p.textContent = error.message;
    else note(article, error.message);
  }
  article.classList.remove("open");
  busy = false;
  $("send").disabled = false;
  message.focus();
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = message.value.trim();
  if (!text || busy) return;
  message.value = "";
  grow();
  ask(text);
});

message.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});

function grow() {
  message.style.height = "auto";
  message.style.height = message.scrollHeight + 2 + "px";
}
message.addEventListener("input", grow);

for (const button of document.querySelectorAll(".try")) {
  button.addEventListener("click", () => { if (!busy) ask(button.textContent); });
}

$("fresh").addEventListener("click", () => {
  if (busy) return;
  session = begin();
  for (const article of turns.querySelectorAll("article")) article.remove();
  $("hello").hidden = false;
  message.focus();
});

async function about() {
  try {
    const who = await (await fetch("api/v1/about")).json();
    show({ generation: who.generation, model: who.models[0], personality: who.personality });
  } catch { /* the next one will tell */ }
  setTimeout(about, 2000);
}

async function past() {
  const response = await fetch("api/v1/sessions/" + session);
  if (!response.ok) return;
  const said = await response.json();
  if (turns.querySelector("article")) return; // somebody was faster than the answer, and has begun to talk
  for (const each of said) {
    if (each.role !== "user" && each.role !== "assistant") continue;
    const article = turn(each.role, each.content);
    const meta = each.meta || {};
    if (meta.model) credit(article, meta, meta.tools);
  }
}

past().then(about);
