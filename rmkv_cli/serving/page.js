"use strict";
const PART = 20000;  // characters of a text per request, so that the memory can be watched as it grows
const NUMBERS = ["temperature", "top_p", "frequency_penalty", "presence_penalty", "max_tokens"];
const SETTINGS = [...NUMBERS, "system", "memory"];
const STORED = "rmkv-chat";
const $ = (id) => document.getElementById(id);
const number = new Intl.NumberFormat("en");
let conversation = [], answering = null;

async function call(method, path, body, signal) {
  const headers = {};
  if (body) headers["Content-Type"] = "application/json";
  if ($("key").value) headers["Authorization"] = "Bearer " + $("key").value;
  const answer = await fetch(path, {method, headers, signal, body: body && JSON.stringify(body)});
  if (answer.status === 401) $("key").hidden = false;
  if (!answer.ok) throw new Error((await answer.json()).error.message);
  return answer;
}

function report(id, text, wrong) {
  $(id).textContent = text;
  $(id).classList.toggle("wrong", Boolean(wrong));
}

function element(tag, className, ...children) {
  return Object.assign(make(tag, ...children), {className});
}

function button(text, label, action) {
  const made = Object.assign(make("button", text), {type: "button", onclick: action});
  made.setAttribute("aria-label", label);
  return made;
}

function size(bytes) {
  return bytes < 1e5 ? (bytes / 1e3).toFixed(1) + " kB" : (bytes / 1e6).toFixed(1) + " MB";
}

// The chat outlives a reload, and ends with its tab.
function save() {
  const settings = Object.fromEntries(SETTINGS.map((id) => [id, $(id).value]));
  try {
    sessionStorage.setItem(STORED, JSON.stringify({conversation, settings, keep: $("keep").checked}));
  } catch {}  // no room, or no permission: the chat works, and a reload forgets it
}

function restore() {
  try {
    const {conversation: turns, settings, keep} = JSON.parse(sessionStorage.getItem(STORED));
    for (const id of SETTINGS) $(id).value = settings[id];
    addMemory(settings.memory);
    $("keep").checked = keep;
    conversation = turns;
    for (const turn of turns) show(turn)();
  } catch {}  // nothing is stored, or another version stored it
}

// Return the text of an answer in two parts: the model's thoughts, if it has any, and what it says.
function withoutThoughts(text) {
  const [, thoughts, said] = text.match(/^\s*<think>([^]*?)(?:<\/think>([^]*)|$)/) ?? [];
  return thoughts === undefined ? ["", text] : [thoughts.trim(), said?.trimStart() ?? ""];
}

// Add a turn to the page; return the function that shows its present text.
function show(turn) {
  const user = turn.role === "user", said = element("div", "said"), article = element("article", `turn ${turn.role}`);
  article.setAttribute("aria-label", user ? "You" : "Answer");
  Object.defineProperty(turn, "article", {value: article});  // which JSON leaves out
  $("talk").append(article);
  if (user) {
    said.textContent = turn.content;
    article.append(said);
    return () => {};
  }
  const thoughts = element("div", "said"), fold = make("details", make("summary", "Thoughts"), thoughts);
  const copy = button("Copy", "Copy answer", () => copyText(withoutThoughts(turn.content)[1], said));
  copy.className = "copy";
  article.append(fold, said, copy);
  return () => {
    const [thought, text] = withoutThoughts(turn.content);
    fold.hidden = !thought;
    copy.hidden = !text;
    thoughts.replaceChildren(...markdown(thought));
    said.replaceChildren(...markdown(text));
  };
}

async function copyText(text, shown) {
  try {
    await navigator.clipboard.writeText(text);
    report("status", "copied");
  } catch {  // browsers have no clipboard for pages that come over plain HTTP from another machine
    getSelection().selectAllChildren(shown);
    report("status", "selected; copy it with Ctrl-C");
  }
}

function addMemory(name) {
  const options = [...$("memory").options];
  if (name && !options.some((option) => option.value === name)) $("memory").append(new Option(name, name));
  $("memory").value = name;
  chooseMemory();
}

async function showMemories() {
  const {data, room} = await (await call("GET", "/v1/memories")).json();
  const chosen = $("memory").value;
  $("memory").replaceChildren(new Option("none", ""), ...data.map((memory) => new Option(memory.name, memory.name)));
  $("memory").value = data.some((memory) => memory.name === chosen) ? chosen : "";
  chooseMemory();
  $("memories").replaceChildren(...data.map((memory) => {
    const figures = `${number.format(memory.tokens)} tokens read in ${size(memory.bytes)}`;
    const remove = () => call("DELETE", "/v1/memories/" + memory.name).then(showMemories).catch((e) => report("room", e.message, true));
    return make("li", make("div", make("strong", memory.name), element("div", "faint", figures)), button("Delete", "Delete " + memory.name, remove));
  }));
  const most = data.length ? `, each at most ${size(data[0].bytes_at_most)}, however long its text` : "";
  report("room", `${data.length} of ${number.format(room)}${most}`);
}

function chooseMemory() {
  $("keeping").hidden = !$("memory").value;
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const {value, done} = await reader.read();
    if (done) return;
    const parts = (pending + value).split("\n\n");
    pending = parts.pop();
    for (const part of parts) {
      if (part === "data: [DONE]") return;
      const event = JSON.parse(part.slice("data: ".length));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

function requested(talk, message, memory, keep) {
  const system = $("system").value.trim() && !(keep && talk.length) ? [{role: "system", content: $("system").value}] : [];
  const body = {
    // A memory that keeps the chat knows what was said before.
    messages: [...system, ...(keep ? [] : talk), message], stream: true, stream_options: {include_usage: true},
  };
  for (const id of NUMBERS) if ($(id).value) body[id] = Number($(id).value);
  return memory ? {...body, memory, keep} : body;
}

async function ask(event) {
  event.preventDefault();
  if (answering) return;
  const talk = conversation;  // a new chat may begin while this one is answered
  const memory = $("memory").value, keep = Boolean(memory) && $("keep").checked;
  const message = {role: "user", content: $("message").value}, answer = {role: "assistant", content: ""};
  const body = requested(talk, message, memory, keep), start = performance.now(), box = $("talk");
  let frame = 0;
  talk.push(message, answer);
  show(message);
  const update = show(answer), draw = () => {
    const follow = box.scrollHeight - box.scrollTop - box.clientHeight < 80;  // unless the reader has scrolled back
    frame = 0;
    update();
    if (follow) box.scrollTop = box.scrollHeight;
  };
  draw();
  box.scrollTop = box.scrollHeight;
  box.setAttribute("aria-busy", "true");  // so that the answer is read out once, when it is complete
  answer.article.classList.add("writing");
  $("message").value = "";
  answering = new AbortController();
  $("send").disabled = true;
  $("stop").disabled = false;
  if ([document.body, $("send")].includes(document.activeElement)) $("stop").focus();
  report("status", "reading …");
  try {
    let usage = null;
    for await (const part of events(await call("POST", "/v1/chat/completions", body, answering.signal))) {
      usage = part.usage || usage;
      for (const choice of part.choices) answer.content += choice.delta.content;
      frame ||= requestAnimationFrame(draw);
      report("status", "writing …");
    }
    const seconds = (performance.now() - start) / 1000;
    report("status", `read ${number.format(usage.prompt_tokens)} tokens, generated ${number.format(usage.completion_tokens)} in ${seconds.toFixed(1)} s`);
  } catch (error) {
    const stopped = error.name === "AbortError";
    report("status", stopped ? (keep ? "stopped; nothing of it is kept" : "stopped") : error.message, !stopped);
  } finally {
    cancelAnimationFrame(frame);
    draw();
    if (!answer.content) {  // the message goes back to where it can be sent again
      talk.splice(-2);
      message.article.remove();
      answer.article.remove();
      if (talk === conversation) $("message").value = message.content;
    }
    answer.article.classList.remove("writing");
    box.removeAttribute("aria-busy");
    if ($("stop") === document.activeElement) $("message").focus();
    answering = null;
    $("send").disabled = false;
    $("stop").disabled = true;
    save();
    if (keep) showMemories().catch(() => {});
  }
}

// Return a text's parts, cut before the space after a word, where its tokens are cut as well.
function cut(text) {
  const parts = [];
  while (text.length > PART) {
    const end = text.slice(0, PART).match(/^[^]*\S(?= )/)?.[0].length || PART;
    parts.push(text.slice(0, end));
    text = text.slice(end);
  }
  return [...parts, text];
}

async function feed(event) {
  event.preventDefault();
  const name = $("name").value, file = $("file").files[0];
  const parts = cut(file ? await file.text() : $("text").value);
  let known = [...$("memory").options].some((option) => option.value === name), done = 0, memory;
  $("read").disabled = true;
  $("progress").hidden = false;
  $("progress").value = 0;
  report("read_status", "reading …");
  try {
    for (const text of parts) {
      const answer = known ? call("POST", "/v1/memories/" + name, {text}) : call("POST", "/v1/memories", {name, text});
      memory = await (await answer).json();
      known = true;
      $("progress").value = ++done / parts.length;
      await showMemories();
      report("read_status", `${number.format(memory.tokens)} tokens read`);
    }
    $("memory").value = name;
    chooseMemory();
    $("text").value = $("file").value = "";
  } catch (error) {
    report("read_status", error.message, true);
  } finally {
    $("read").disabled = false;
    $("progress").hidden = true;
  }
}

async function open() {
  try {
    const {data: [model]} = await (await call("GET", "/v1/models")).json();
    $("model").textContent = model.id;
    await showMemories();
    if ($("status").classList.contains("wrong")) report("status", "");
  } catch (error) {
    report("status", error.message, true);
  }
}

function clear() {
  answering?.abort();
  conversation = [];
  $("talk").replaceChildren();
  report("status", "");
  save();
  $("message").focus();
}

function typed(event) {
  if (event.isComposing) return;  // Enter ends the composition of a character
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
}

$("ask").onsubmit = ask;
$("ask").addEventListener("invalid", () => { $("settings").open = true; }, true);  // a field must be visible to be corrected
$("feed").onsubmit = feed;
$("memory").onchange = chooseMemory;
$("key").onchange = open;
$("stop").onclick = () => answering?.abort();
$("clear").onclick = clear;
$("message").onkeydown = typed;
document.onkeydown = (event) => { if (event.key === "Escape") answering?.abort(); };
window.onpagehide = save;
restore();
open();
