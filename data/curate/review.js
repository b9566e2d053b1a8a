// The page of review.py: shows one region after the other, keeps the decisions, saves them as decisions.json.
// The functions of the first part know nothing of the page.
"use strict";

// Keys of the classes in order. a, b, c, i, s, u and the space bar mean something else.
const KEYS = "1234567890defghjklmnopqrtvwxyz";

// The class that a region has in A or in B.
function classOf(item, side) {
  return side === item.labelIs ? item.label : item.proposed;
}

// What an answer means: "a" or "b" (which of them is the label is drawn at random for each region),
// "skip", "ignore", or "class:NAME".
function verdict(item, answer) {
  if (answer === "skip") return { verdict: "skip", class: null };
  if (answer === "ignore") return { verdict: "other", class: null };
  const named = answer.startsWith("class:");
  const chosen = named ? answer.slice(6) : classOf(item, answer);
  if (chosen === item.label) return { verdict: "keep", class: chosen };
  if (chosen === item.proposed) return { verdict: "accept", class: chosen };
  return { verdict: "other", class: chosen };
}

// Of the controls, whose right class is known: how many were answered, how many wrongly, and the
// 95 % interval of the error rate (Wilson's).
function controlResult(items, answers) {
  let answered = 0;
  let wrong = 0;
  items.forEach((item, i) => {
    if (!item.control || !answers[i] || answers[i].answer === "skip") return;
    answered += 1;
    if (verdict(item, answers[i].answer).class !== item.proposed) wrong += 1;
  });
  if (!answered) return { answered, wrong, low: 0, high: 1 };
  const z = 1.96;
  const p = wrong / answered;
  const middle = p + z * z / (2 * answered);
  const half = z * Math.sqrt(p * (1 - p) / answered + z * z / (4 * answered * answered));
  const whole = 1 + z * z / answered;
  return { answered, wrong, low: Math.max(0, (middle - half) / whole), high: (middle + half) / whole };
}

// What decisions.json holds: all that is needed to carry the decisions out, and who decided when.
function exported(page, state) {
  const decisions = [];
  page.items.forEach((item, i) => {
    const answer = state.answers[i];
    if (!answer || item.control) return;
    const { id, image, box, runs, label, proposed } = item;
    decisions.push({ id, image, box, runs, label, proposed, ...verdict(item, answer.answer),
                     reviewer: answer.reviewer, time: answer.time });
  });
  const open = page.items.filter((item, i) => !item.control && !state.answers[i]).length;
  return { ...page.about, reviewer: state.reviewer, controls: controlResult(page.items, state.answers),
           open, decisions };
}

// The next region without an answer, in the order of the page; -1 where all have one.
function nextOpen(items, answers) {
  return items.findIndex((item, i) => !answers[i]);
}

// The edges of a region as lines [x0, y0, x1, y1] in pixels of the image.
function outline(runs, box) {
  const [top, left, h, w] = box;
  const inside = new Uint8Array(h * w);
  let at = 0;
  runs.forEach((length, i) => {
    if (i % 2) inside.fill(1, at, at + length);
    at += length;
  });
  const has = (y, x) => y >= 0 && x >= 0 && y < h && x < w && inside[y * w + x] === 1;
  const lines = [];
  for (let y = 0; y <= h; y++) {
    for (let x = 0; x <= w; x++) {
      if (has(y, x) !== has(y - 1, x) && x < w) lines.push([left + x, top + y, left + x + 1, top + y]);
      if (has(y, x) !== has(y, x - 1) && y < h) lines.push([left + x, top + y, left + x, top + y + 1]);
    }
  }
  return lines;
}

// The view after zooming by `factor` about the place (x, y) of the screen, which stays where it is.
function zoomed(view, factor, x, y) {
  const scale = Math.min(60, Math.max(0.2, view.scale * factor));
  const f = scale / view.scale;
  return { scale, x: x - (x - view.x) * f, y: y - (y - view.y) * f };
}

// ---- the page

function start(page) {
  const byId = (id) => document.getElementById(id);
  const canvas = byId("view");
  const context = canvas.getContext("2d");
  let state = { reviewer: "", answers: {}, order: [] };
  let shown = -1; // index of the region
  let layer = "a";
  let bare = false; // the image alone
  let view = null; // where the picture lies on the screen; null: fitted when it is drawn
  let lines = []; // the outline of the region
  let dragged = null;
  const pictures = new Map(); // of the region shown and the next one only

  function restore() {
    try {
      const kept = localStorage.getItem(page.key);
      if (kept) state = JSON.parse(kept);
    } catch (error) {
      byId("warning").textContent = "This browser keeps no progress for files: save before closing.";
    }
    byId("reviewer").value = state.reviewer;
  }

  function keep() {
    try {
      localStorage.setItem(page.key, JSON.stringify(state));
    } catch (error) {
      byId("warning").textContent = "Progress cannot be kept here: save before closing.";
    }
  }

  // Data URLs are decoded when they are needed, and forgotten afterwards.
  function load(i) {
    const item = page.items[i];
    if (!item || pictures.has(i)) return;
    const loaded = {};
    for (const part of ["image", "a", "b"]) {
      loaded[part] = new Image();
      loaded[part].onload = draw;
      loaded[part].src = part === "image" ? item.picture : item[part];
    }
    pictures.set(i, loaded);
  }

  function show(i) {
    shown = i;
    layer = "a";
    bare = false;
    view = null;
    // Once a region, not once a frame: a large one has a hundred thousand pixels.
    lines = page.items[i] ? outline(page.items[i].runs, page.items[i].box) : [];
    const following = page.items.findIndex((item, j) => j > i && !state.answers[j]);
    for (const j of [...pictures.keys()]) if (j !== i && j !== following) pictures.delete(j);
    load(i);
    load(following);
    refresh();
  }

  function refresh() {
    const done = Object.keys(state.answers).length;
    byId("progress").max = page.items.length;
    byId("progress").value = done;
    byId("count").textContent = `${done} of ${page.items.length}`;
    const item = page.items[shown];
    byId("place").textContent = item ? `${item.image}, row ${item.box[0]}, column ${item.box[1]}` : "";
    byId("result").textContent = item ? "" : ended();
    byId("shown").textContent = item ? described(item) : "";
    for (const button of byId("choices").children) {
      const answer = button.dataset.answer;
      button.disabled = answer === "undo" ? !state.order.length : !item;
      button.classList.toggle("shown", Boolean(item) && !bare && answer === layer);
      if (item && (answer === "a" || answer === "b")) {
        const name = classOf(item, answer);
        caption(button, answer, `${answer.toUpperCase()} is right: ${name}`, page.colors[name]);
      }
    }
    draw();
  }

  // What lies over the image, for eyes that stay there.
  function described(item) {
    return bare ? "image alone" : `${layer.toUpperCase()}: ${classOf(item, layer)}`;
  }

  function ended() {
    const { answered, wrong, low, high } = controlResult(page.items, state.answers);
    const percent = (share) => `${(100 * share).toFixed(1)} %`;
    if (!answered) return "All decided. No controls: your error rate is not known. Now save.";
    return `All decided. Of ${answered} controls, whose labels were known, ${wrong} were answered wrongly: ` +
      `error rate ${percent(wrong / answered)}, 95 % interval ${percent(low)} to ${percent(high)}. Now save.`;
  }

  function draw() {
    const scale = window.devicePixelRatio || 1;
    const [wide, high] = [canvas.clientWidth, canvas.clientHeight];
    canvas.width = wide * scale;
    canvas.height = high * scale;
    const item = page.items[shown];
    const loaded = pictures.get(shown);
    if (!item || !loaded) return;
    const [top, left, h, w] = item.around;
    if (!view) {
      const fit = 0.95 * Math.min(wide / w, high / h);
      view = { scale: fit, x: (wide - w * fit) / 2, y: (high - h * fit) / 2 };
    }
    context.setTransform(scale * view.scale, 0, 0, scale * view.scale, scale * view.x, scale * view.y);
    context.imageSmoothingEnabled = false;
    if (loaded.image.complete) context.drawImage(loaded.image, 0, 0, w, h);
    if (!bare && loaded[layer].complete) {
      context.globalAlpha = 0.5;
      context.drawImage(loaded[layer], 0, 0, w, h);
      context.globalAlpha = 1;
    }
    // Dark below bright: one of them differs from any ground.
    for (const [color, thick] of [["black", 4], ["#ffee00", 2]]) {
      context.strokeStyle = color;
      context.lineWidth = thick / view.scale;
      context.beginPath();
      for (const [x0, y0, x1, y1] of lines) {
        context.moveTo(x0 - left, y0 - top);
        context.lineTo(x1 - left, y1 - top);
      }
      context.stroke();
    }
  }

  function decide(answer) {
    if (answer === "undo") {
      if (!state.order.length) return;
      const last = state.order.pop();
      delete state.answers[last];
      keep();
      show(last);
      return;
    }
    if (shown < 0) return;
    if (!state.reviewer) {
      byId("warning").textContent = "Type your name first: decisions are signed.";
      byId("reviewer").focus();
      return;
    }
    byId("warning").textContent = "";
    state.answers[shown] = { answer, reviewer: state.reviewer, time: new Date().toISOString() };
    state.order.push(shown);
    keep();
    show(nextOpen(page.items, state.answers));
  }

  function save() {
    const text = JSON.stringify(exported(page, state), null, 1) + "\n";
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    link.download = "decisions.json";
    link.click();
  }

  // Text only: names of classes and images are never read as HTML.
  function caption(button, key, text, color) {
    button.replaceChildren();
    const hint = document.createElement("kbd");
    hint.textContent = key;
    button.append(hint);
    if (color) {
      const swatch = document.createElement("span");
      swatch.className = "swatch";
      swatch.style.background = color;
      button.append(swatch);
    }
    button.append(text);
  }

  const byKey = new Map();
  function choice(key, answer, text, color) {
    const button = document.createElement("button");
    button.dataset.answer = answer;
    button.className = answer === "a" || answer === "b" ? "wide" : "";
    caption(button, key, text, color);
    button.onclick = () => {
      button.blur(); // or the space bar would press it again
      decide(answer);
    };
    byId("choices").append(button);
    if (key) byKey.set(key, answer);
  }

  choice("a", "a", "A is right");
  choice("b", "b", "B is right");
  choice("s", "skip", "cannot tell");
  choice("u", "undo", "undo");
  page.classes.forEach((name, i) => choice(KEYS[i] || "", `class:${name}`, name, page.colors[name]));
  if (page.ignore) choice("i", "ignore", "no class: ignore");

  document.addEventListener("keydown", (event) => {
    if (event.target === byId("reviewer") || event.ctrlKey || event.metaKey || event.altKey) return;
    // With caps lock, too.
    const key = event.key.toLowerCase();
    // A key held down repeats itself: nobody has looked at the regions that it would decide.
    if (event.repeat && (key === " " || key === "c" || byKey.has(key))) {
      event.preventDefault();
      return;
    }
    if (key === " ") {
      layer = layer === "a" ? "b" : "a";
      bare = false;
      refresh();
    } else if (key === "c") {
      bare = !bare;
      refresh();
    } else if (byKey.has(key)) {
      decide(byKey.get(key));
    } else {
      return;
    }
    event.preventDefault();
  });
  byId("reviewer").oninput = (event) => {
    state.reviewer = event.target.value.trim();
    keep();
  };
  byId("reviewer").onkeydown = (event) => {
    if (event.key === "Enter") event.target.blur();
  };
  byId("save").onclick = () => {
    byId("save").blur(); // or the space bar would save again
    save();
  };
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    if (view) view = zoomed(view, Math.exp(-event.deltaY / 400), event.offsetX, event.offsetY);
    draw();
  }, { passive: false });
  canvas.onpointerdown = (event) => {
    dragged = [event.clientX, event.clientY];
    canvas.setPointerCapture(event.pointerId);
  };
  canvas.onpointermove = (event) => {
    if (!dragged || !view) return;
    view = { ...view, x: view.x + event.clientX - dragged[0], y: view.y + event.clientY - dragged[1] };
    dragged = [event.clientX, event.clientY];
    draw();
  };
  canvas.onpointerup = () => { dragged = null; };
  window.addEventListener("resize", () => { view = null; draw(); });

  restore();
  show(nextOpen(page.items, state.answers));
}

if (typeof document !== "undefined") start(JSON.parse(document.getElementById("data").textContent));
if (typeof module !== "undefined") module.exports = { controlResult, exported, nextOpen, outline, start, verdict, zoomed };
