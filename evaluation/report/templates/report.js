"use strict";
// Show data with textContent only: completions and questions are hostile text.

const $ = (id) => document.getElementById(id);
const [colours, images, cases] = ["colours", "images", "cases"].map((name) => JSON.parse($(`${name}-data`).textContent));
const colour = new Map(colours), models = [...colour.keys()];
const CHUNK = 60;  // rows drawn at a time
const form = $("filters"), box = $("box"), list = $("list"), article = $("case");
const controls = [...form.elements].filter((control) => control.name);
let visible = [];  // indices in `cases` that match the filters, in order
let current = -1;  // index in `cases` of the selected one
let drawn = 0;  // rows of the list that exist: it grows as it is scrolled

/** An element; `props` are properties, or attributes if their names have a dash; string children become text. */
function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name.includes("-") || name === "role") node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children.flat().filter((child) => child !== null));
  return node;
}

for (const one of cases) {
  one.byModel = new Map(one.answers.map((answer) => [answer.model, answer]));
  one.flags = new Set(one.answers.flatMap((a) => (a.flags ?? []).flatMap((flag) => [flag, `${a.model}: ${flag}`])));
  one.text = [one.id, one.question, ...(one.options ?? []), ...one.answers.map((answer) => answer.completion)]
    .join("\n").toLowerCase();
}
const isRight = (one, answer) => answer.letter !== null && answer.letter === one.ground_truth;

// --- the state: the form and the selected case, stored in the address ---

function address(place) {
  const named = controls.filter((control) => control.value).map((control) => [control.name, control.value]);
  if (place >= 0) named.push(["case", cases[place].id]);
  return `#${new URLSearchParams(named)}`;
}

function readAddress() {
  const text = location.hash.slice(1);
  if (text && !text.includes("=")) return;  // a link to a section
  const parameters = new URLSearchParams(text), before = address(-1), named = parameters.get("case");
  for (const control of controls) {
    control.value = parameters.get(control.name) ?? "";
    if (control.selectedIndex < 0) control.selectedIndex = 0;
  }
  const place = cases.findIndex((one) => one.id === named);
  if (address(-1) !== before) filter(place);
  else if (place >= 0) choose(place);
  if (named === null) return;
  if (place < 0) article.replaceChildren(el("p", {className: "empty"}, `There is no question “${named}”.`));
  scrollToCase();
}

function scrollToCase() {
  const {top, bottom} = article.getBoundingClientRect();
  if (top > 0.5 * innerHeight || bottom < 0.2 * innerHeight) article.scrollIntoView();
}

function matches(one) {
  return controls.every(({name, value}) => {
    if (!value) return true;
    if (name === "q") return one.text.includes(value.trim().toLowerCase());
    if (name === "modality") return one.modality === value;
    if (name === "type") return one.question_type === value;
    if (name === "flag") return one.flags.has(value);
    const answer = one.byModel.get(name.slice(3));  // "is.MODEL"
    return answer !== undefined && isRight(one, answer) === (value === "right");
  });
}

/** List the cases that match the filters. Show the linked case, else the selected one if it matches, else the first. */
function filter(linked = -1) {
  visible = [...cases.keys()].filter((place) => matches(cases[place]));
  list.replaceChildren();
  drawn = box.scrollTop = 0;
  draw(CHUNK);
  const right = models.map((name) => {
    const answers = visible.map((i) => [cases[i], cases[i].byModel.get(name)]).filter(([, answer]) => answer);
    const count = answers.filter(([one, answer]) => isRight(one, answer)).length;
    return el("span", {className: `model ${colour.get(name)}`}, `${name} ${count} right`);
  });
  const total = el("b", {}, `${visible.length} of ${cases.length}`);
  $("count").replaceChildren(total, " shown", ...(visible.length ? right : []));
  choose(linked >= 0 ? linked : visible.includes(current) ? current : visible[0] ?? -1);
}

// --- the list ---

function draw(until) {
  const rows = visible.slice(drawn, until).map((place) => {
    const one = cases[place];
    const link = el("a", {href: address(place)}, thumbnail(one, 44),
      el("span", {className: "entry"}, el("span", {className: "question-text", dir: "auto"}, one.question),
        el("small", {}, [one.id, one.modality, one.question_type].filter(Boolean).join(" · "))),
      el("span", {className: "marks"}, models.map((name) => mark(one, name))));
    return el("li", {}, link);
  });
  list.append(...rows);
  drawn += rows.length;
}

function mark(one, name) {
  const answer = one.byModel.get(name);
  if (!answer) return null;
  const right = isRight(one, answer), label = `${name}: ${answer.letter ?? "no letter"}, ${right ? "right" : "wrong"}`;
  return el("span", {className: `mark ${colour.get(name)} ${right ? "right" : "wrong"}`, title: label, role: "img",
    "aria-label": label}, answer.letter ?? "–");
}

function thumbnail(one, side) {
  const image = images[one.images[0]];
  if (!image?.src) return el("span", {className: "gone", title: image?.name ?? "no image"}, image ? "unreadable" : "no image");
  return el("img", {src: image.src, alt: "", width: side, height: side});
}

function choose(place) {
  current = place;
  list.querySelector("[aria-current]")?.removeAttribute("aria-current");
  const at = visible.indexOf(place);
  if (at >= drawn) draw(at + CHUNK);
  const row = list.children[at];
  if (row) {
    row.firstChild.setAttribute("aria-current", "true");
    const above = row.offsetTop - box.scrollTop, below = above + row.offsetHeight - box.clientHeight;
    box.scrollTop += above < 0 ? above : below > 0 ? below : 0;  // scrollIntoView would move the page too
  }
  article.replaceChildren(...(place < 0 ? [el("p", {className: "empty"}, "No question matches these filters.")] : detail(cases[place], at)));
}

function step(by) {
  const at = visible.indexOf(current), next = visible[at < 0 ? 0 : at + by];
  if (next === undefined) return;
  const inList = list.contains(document.activeElement);
  choose(next);
  history.replaceState(null, "", address(next));
  if (inList) list.querySelector("[aria-current]").focus({preventScroll: true});
  scrollToCase();
}

// --- one case ---

function detail(one, at) {
  const button = (label, by, text) => el("button", {type: "button", disabled: visible[at + by] === undefined,
    onclick: () => step(by), "aria-label": label}, text);
  const where = at < 0 ? "not in the list" : `${at + 1} of ${visible.length}`;
  return [
    el("div", {className: "top"}, el("span", {className: "id"}, one.id),
      el("span", {}, [one.modality, one.question_type].filter(Boolean).join(" · ")),
      el("span", {className: "walk"}, button("Previous case", -1, "←"), el("span", {}, where), button("Next case", 1, "→"))),
    el("div", {className: "question"},
      el("div", {className: "pictures"}, one.images.map((place) => figure(images[place]))),
      el("div", {}, el("h3", {dir: "auto"}, one.question), options(one))),
    el("div", {className: "answers"}, one.answers.map((answer) => card(one, answer))),
  ];
}

function figure(image) {
  if (!image.src) return el("p", {className: "gone"}, el("b", {}, "Unreadable image"), ` ${image.name}: ${image.why}`);
  const label = `Enlarge ${image.name}`;
  return el("button", {type: "button", className: "enlarge", title: label, onclick: () => enlarge(image)},
    el("img", {src: image.src, alt: label}));
}

function enlarge(image) {
  const [picture, caption] = $("large").querySelectorAll("img, p");
  picture.src = image.src;
  picture.alt = image.name;
  caption.textContent = `${image.name}, ${image.width} × ${image.height} pixels; enlarged from a thumbnail`;
  $("large").showModal();
}

function options(one) {
  return el("ol", {className: "options"}, (one.options ?? []).map((option, i) => {
    const letter = String.fromCharCode(65 + i), right = letter === one.ground_truth;
    const by = one.answers.filter((answer) => answer.letter === letter);
    return el("li", {className: right ? "right" : ""}, el("b", {}, letter), el("span", {dir: "auto"}, option),
      el("span", {className: "by"}, right ? el("span", {className: "truth"}, "✓ right") : null,
        by.map(({model}) => el("span", {className: `model ${colour.get(model)}`}, model))));
  }));
}

function card(one, answer) {
  const right = isRight(one, answer);
  const rules = Object.entries(answer.rewards ?? {}).map(([rule, {score, why}]) =>
    el("tr", {}, el("th", {scope: "row"}, rule), el("td", {}, String(score ?? "–")), el("td", {}, why)));
  const probes = Object.entries(answer.probes ?? {}).map(([probe, letter]) =>
    el("div", {className: letter === answer.letter ? "same" : "other"}, el("dt", {}, probe), el("dd", {}, letter ?? "–")));
  return el("section", {className: `card ${colour.get(answer.model)}`, "aria-label": answer.model},
    el("header", {}, el("h4", {className: `model ${colour.get(answer.model)}`}, answer.model),
      el("span", {className: `outcome ${right ? "right" : "wrong"}`}, `${answer.letter ?? "no letter"} ${right ? "✓ right" : "✗ wrong"}`),
      el("small", {}, `${answer.tokens ?? "?"} tokens${answer.ended === false ? ", truncated" : ""}`)),
    (answer.flags ?? []).length ? el("ul", {className: "flags"}, answer.flags.map((flag) => el("li", {}, flag))) : null,
    blocks(answer.completion),
    rules.length ? el("table", {className: "rules"}, el("tbody", {}, rules)) : null,
    probes.length ? el("details", {}, el("summary", {}, "Answers under the probes"), el("dl", {className: "probes"}, probes)) : null);
}

/** The whole completion: the think and answer blocks, and any text outside them. */
function blocks(completion) {
  const nodes = [];
  let kind = "text", text = "";
  const flush = (closed) => {
    if (text.trim() || kind !== "text") {
      const label = {think: "Reasoning", answer: "Answer", text: "Outside the tags"}[kind];
      nodes.push(el("div", {className: `block ${kind}`}, el("small", {}, closed ? label : `${label} (no closing tag)`),
        el("div", {className: "content", dir: "auto", tabIndex: text.length > 1500 ? 0 : -1}, text)));
    }
    kind = "text";
    text = "";
  };
  for (const part of completion.split(/(<\/?(?:think|answer)>)/i)) {
    const [, slash, name] = /^<(\/?)(think|answer)>$/i.exec(part) ?? [];
    if (name && !slash && kind === "text") { flush(true); kind = name.toLowerCase(); }
    else if (name && slash && kind === name.toLowerCase()) flush(true);
    else text += part;
  }
  flush(kind === "text");
  return nodes.length ? nodes : [el("p", {className: "empty"}, "The completion is empty.")];
}

// --- input ---

form.addEventListener("input", () => { filter(); history.replaceState(null, "", address(-1)); });
form.addEventListener("reset", () => setTimeout(() => { filter(); history.replaceState(null, "", "#browser"); }));
form.addEventListener("submit", (event) => event.preventDefault());
box.addEventListener("scroll", () => { if (box.scrollTop + 3 * box.clientHeight > box.scrollHeight) draw(drawn + CHUNK); });
$("open-help").addEventListener("click", () => $("help").showModal());
addEventListener("hashchange", readAddress);
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => { one.open = true; }));

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  const search = form.elements.q;
  if (event.key === "Escape" && event.target === search) return search.blur();
  if (event.target.matches("input, select, textarea")) return;
  const inList = box.contains(event.target), inScroll = event.target.closest(".scroll, .content");
  const by = {j: 1, k: -1, ArrowRight: inScroll ? 0 : 1, ArrowLeft: inScroll ? 0 : -1,
    ArrowDown: inList ? 1 : 0, ArrowUp: inList ? -1 : 0}[event.key];
  if (by) step(by);
  else if (event.key === "/") { search.focus(); search.select(); }
  else if (event.key === "?") $("help").showModal();
  else return;
  event.preventDefault();
});

filter();
readAddress();
