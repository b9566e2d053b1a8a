// Plays a page of data.curate review without a browser: node play_page.js review.html '["name:Eva", "a", "close"]'
// Prints what the page shows and saves. "close" starts the page anew with what it had kept.
"use strict";
const fs = require("fs");
const vm = require("vm");

const html = fs.readFileSync(process.argv[2], "utf8");
const [data, script] = [...html.matchAll(/<script[^>]*>([\s\S]*?)<\/script>/g)].map((found) => found[1]);
const kept = new Map();
const outside = []; // whatever would be loaded from elsewhere
let elements, listeners, blob, downloads;

class Element {
  constructor(tag) {
    Object.assign(this, { tag, children: [], dataset: {}, style: {}, value: "", textContent: "", listeners: {},
                          clientWidth: 800, clientHeight: 600 });
    this.classList = { toggle() {} };
  }
  append(...parts) { this.children.push(...parts); }
  replaceChildren() { this.children = []; }
  addEventListener(kind, call) { this.listeners[kind] = call; }
  focus() {}
  blur() {}
  click() { if (this.download) downloads.push([this.download, blob.text]); }
  getContext() { return new Proxy({}, { get: () => () => {}, set: () => true }); }
}

class Picture extends Element {
  set src(url) {
    if (!url.startsWith("data:image/")) outside.push(url);
    this.complete = true;
  }
}

function open() {
  elements = new Map();
  listeners = {};
  downloads = [];
  const byId = (id) => {
    if (!html.includes(`id="${id}"`)) return null;
    if (!elements.has(id)) elements.set(id, new Element(id));
    return elements.get(id);
  };
  byId("data").textContent = data;
  const document = {
    getElementById: byId,
    createElement: (tag) => new Element(tag),
    addEventListener: (kind, call) => { listeners[kind] = call; },
  };
  const localStorage = {
    getItem: (key) => (kept.has(key) ? kept.get(key) : null),
    setItem: (key, value) => kept.set(key, String(value)),
  };
  class Blob { constructor(parts) { this.text = parts.join(""); } }
  const URL = { createObjectURL: (made) => { blob = made; return "blob:1"; } };
  const window = { devicePixelRatio: 1, addEventListener() {} };
  vm.runInNewContext(script, { document, localStorage, Blob, URL, window, Image: Picture, console });
}

open();
for (const press of JSON.parse(process.argv[3])) {
  const name = elements.get("reviewer");
  if (press === "close") {
    open();
  } else if (press.startsWith("name:")) {
    name.value = press.slice(5);
    name.oninput({ target: name });
  } else {
    listeners.keydown({ key: press, target: null, preventDefault() {} });
  }
}
elements.get("save").onclick();
const text = (id) => elements.get(id)?.textContent ?? "";
const [[name, saved]] = downloads;
console.log(JSON.stringify({ count: text("count"), result: text("result"), warning: text("warning"), outside, name,
                             saved: JSON.parse(saved) }));
