// The tutorial and the code, side by side. Without this, both can be read, one after the other.
"use strict";

const $ = (selector) => document.querySelector(selector);
const all = (selector) => [...document.querySelectorAll(selector)];

// The element that a link, or the address, leads to; null if there is none.
function targetOf(link) {
  try {
    return document.getElementById(decodeURIComponent(link.hash.slice(1)));
  } catch {
    return null; // "#100%" is no valid fragment
  }
}

const main = $("main"), pane = $("#files"), divider = $("#divider");
const chapters = all("article");
const headings = all("article, article :is(h2, h3)[id]");
// Scrolling shows functions and classes. Constants stand far away, at the top of the file.
const isConstant = (lines) => /^\w+(: .+)? = /.test(lines.textContent);
const followed = all("main .to-code").filter((link) => !isConstant(targetOf(link)));
const wide = matchMedia("(min-width: 64rem)");
const calm = matchMedia("(prefers-reduced-motion: reduce)");

let marked; // lines of the code
let opener; // the link that led to them: Escape goes back to it
// The code follows the text only while the reader scrolls, and not after a jump.
let following = true;
let held, heldAbove; // the link of the last jump, and whether it was above the eyes
let paragraph, paragraphTop; // where the eyes were, and where that was in the window

// The storage may be forbidden. Then the page forgets, and that is all.
function remember(key, value) {
  try {
    localStorage.setItem(`tutorial-${key}`, JSON.stringify(value));
  } catch {}
}

// Another page of this site may have put anything under our names.
function recall(key) {
  try {
    return JSON.parse(localStorage.getItem(`tutorial-${key}`));
  } catch {
    return null;
  }
}

// ---- Jumps

function mark(lines) {
  if (lines === marked) return;
  marked?.classList.remove("marked");
  lines?.classList.add("marked");
  marked = lines;
  // Of a class, only the head has a colour. Otherwise, it would fill the window.
  const head = lines?.textContent.match(/^(@.*\n)*class .*\n +"""[^]*?"""\n/);
  if (head) lines.style.setProperty("--head", `${head[0].split("\n").length - 1}lh`);
  if (lines) onCodeScroll();
  for (const link of all("main .to-code")) {
    if (lines && targetOf(link) === lines) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
  }
}

// Bring lines into view if they are not, with some of what stands above them.
function reveal(lines) {
  const box = lines.getBoundingClientRect(), view = pane.getBoundingClientRect();
  const covered = 40; // by the name of the file
  if (box.top >= view.top + covered && box.bottom <= view.bottom) return;
  const above = Math.max(covered, Math.min(view.height / 5, view.height - box.height));
  const distance = box.top - view.top - above;
  const smooth = following && !calm.matches && Math.abs(distance) < view.height;
  const behavior = smooth ? "smooth" : "instant";
  pane.scrollTo({ top: pane.scrollTop + distance, left: 0, behavior });
}

function focus(element) {
  if (element.tabIndex < 0) element.tabIndex = -1; // otherwise it could not have the focus
  element.focus({ preventScroll: true });
}

// On a narrow screen, the code is a sheet that opens over the text.
const openSheet = (open) => document.body.classList.toggle("open", open);

// Go to a place in the text or in the code. The focus goes along.
function go(target) {
  const isCode = pane.contains(target);
  following = false;
  openSheet(isCode);
  if (isCode) {
    mark(target);
    reveal(target);
  } else {
    target.scrollIntoView();
    following = true; // the code that is explained there comes along
  }
  focus(target);
}

// Lines that were chosen stay marked until their link has crossed the line of the eyes, or left.
function hold(link) {
  held = link;
  heldAbove = link && isAbove(link, eyes());
}

function isHeld() {
  if (!held) return false;
  const box = held.getBoundingClientRect();
  if (box.bottom < 0 || box.top > innerHeight || isAbove(held, eyes()) !== heldAbove) held = null;
  return held !== null;
}

function leaveCode() {
  openSheet(false);
  (opener ?? main).focus();
}

addEventListener("click", (event) => {
  const link = event.target.closest("a[href^='#']");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  link.closest("[popover]")?.hidePopover();
  if (main.contains(link)) opener = link;
  const before = place(), target = targetOf(link);
  go(target);
  hold([link, target].find((each) => main.contains(each) && each.matches(".to-code")));
  if (pane.contains(link)) {
    following = false; // the way back leaves the code as it is
    mark(targetOf(target));
  } else if (held && !wide.matches) {
    // The sheet must not cover the line.
    const distance = link.getBoundingClientRect().bottom + 16 - $("#code").offsetTop;
    if (distance > 0) scrollBy({ top: distance, behavior: "instant" });
  }
  history.replaceState(before, "");
  if (link.hash !== location.hash) history.pushState(place(), "", link.hash);
});

// ---- The history. The browser remembers the hash, but not where text and code were.

history.scrollRestoration = "manual";

// On a narrow screen, the page itself scrolls the text.
const scroller = () => (wide.matches ? main : document.scrollingElement);
const place = () => ({ marked: marked?.id, text: scroller().scrollTop, code: pane.scrollTop });

function restore(state) {
  hold(null);
  const target = targetOf(location);
  following = false;
  openSheet(pane.contains(target));
  mark(document.getElementById(state.marked));
  scroller().scrollTop = state.text;
  pane.scrollTop = state.code;
  focus(pane.contains(target) ? target : (opener ?? main));
}

addEventListener("popstate", ({ state }) => {
  if (state) restore(state);
  else if (targetOf(location)) go(targetOf(location));
});
for (const each of [main, pane, window]) {
  each.addEventListener("scrollend", () => {
    if (isSettled()) history.replaceState(place(), "");
  });
}

// ---- Scrolling: where is the reader?

const isAbove = (element, y) =>
  element.checkVisibility() && element.getBoundingClientRect().top <= y;
const eyes = () => innerHeight * 0.4; // more or less
const isBefore = (a, b) => a.compareDocumentPosition(b) & Node.DOCUMENT_POSITION_FOLLOWING;
const stored = recall("read");
const read = new Set(Array.isArray(stored) ? stored : []);

function setCurrent(menu, target) {
  const link = menu.querySelector(`a[href="#${target.id}"]`);
  menu.querySelector("[aria-current]")?.removeAttribute("aria-current");
  link.setAttribute("aria-current", "location");
  return link;
}

function tick(chapter) {
  read.add(chapter.id);
  remember("read", [...read]);
  $(`#chapters a[href="#${chapter.id}"]`).classList.add("read");
}

// The link that the reader has come to. Links that stand close to each other come one by one: a
// notch of the mouse wheel is 120 pixels, and should skip none.
function linkAt(heading, line) {
  const next = headings[headings.indexOf(heading) + 1];
  const links = followed.filter(
    (each) => isBefore(heading, each) && !(next && isBefore(next, each)) && each.checkVisibility(),
  );
  let found, turn = -Infinity, above = -Infinity;
  for (const link of links) {
    const { top } = link.getBoundingClientRect();
    if (top - above < 10) continue; // in the same line, the first one wins
    turn = Math.max(top, Math.min(turn + 121, top + innerHeight * 0.25));
    if (turn <= line) found = link;
    above = top;
  }
  // The first one is shown as soon as it is in view: those before belong to another section.
  return found ?? links.find((each) => isAbove(each, innerHeight));
}

function onScroll() {
  if (!isSettled()) return;
  const line = eyes();
  const heading = headings.findLast((each) => isAbove(each, line)) ?? chapters[0];
  const chapter = heading.closest("article");
  setCurrent($("#chapters"), heading);
  $("[popovertarget=chapters] b").textContent = chapter.querySelector("h1").textContent;
  remember("heading", heading.id);
  paragraph = [...chapter.children].findLast((each) => isAbove(each, line)) ?? chapter;
  paragraphTop = paragraph.getBoundingClientRect().top;
  if (following) {
    if (!isHeld()) {
      const start = chapter.querySelector("h1 + p > .to-code"); // to the section of chat.py
      const isStart = start && isAbove(start, innerHeight) && !isAbove(start, 0);
      const link = linkAt(heading, line) ?? (isStart ? start : null);
      const isOver = marked && !link; // a section may have none
      mark(link && targetOf(link));
      const title = chapter.querySelector("h1").textContent;
      const isElsewhere = start && $("[popovertarget=contents] b").textContent !== title;
      if (wide.matches && link) reveal(marked);
      else if (wide.matches && isOver && isElsewhere) reveal(targetOf(start));
    }
    const end = chapter.getBoundingClientRect().bottom;
    if (end > innerHeight / 2 && end < innerHeight + 50) tick(chapter);
  }
}

const sections = all("#contents a").map(targetOf);

function onCodeScroll() {
  const view = pane.getBoundingClientRect(), top = marked?.getBoundingClientRect().top;
  const isInView = top >= view.top && top < view.bottom;
  const line = isInView ? top : view.top + view.height * 0.4;
  const section = sections.findLast((each) => isAbove(each, line)) ?? sections[0];
  $("[popovertarget=contents] b").textContent = setCurrent($("#contents"), section).textContent;
}

// Look once for each frame, however many events there are.
function onceAFrame(action) {
  let due = false;
  return () => {
    if (!due) requestAnimationFrame(() => ((due = false), action()));
    due = true;
  };
}

for (const target of [main, window]) target.addEventListener("scroll", onceAFrame(onScroll));
pane.addEventListener("scroll", onceAFrame(onCodeScroll));
function onInput(event) {
  following = !$("#code").contains(event.target);
}
for (const type of ["wheel", "touchmove", "pointerdown", "keydown"]) {
  addEventListener(type, onInput, { passive: true });
}

// When the window becomes wide or narrow, something else scrolls the text, from its start. Nothing
// is stored until the paragraph is in view again.
let wasWide = wide.matches;
const isSettled = () => wasWide === wide.matches;
wide.addEventListener("change", () => {
  openSheet(false);
  const move = paragraph.getBoundingClientRect().top - Math.max(paragraphTop, 60);
  scroller().scrollBy({ top: move, behavior: "instant" });
  if (marked) reveal(marked);
  wasWide = wide.matches;
  history.replaceState(place(), "");
  onScroll();
});

// ---- The divider, the keyboard, and the buttons

function divide(percent) {
  const width = Math.round(Math.min(75, Math.max(25, percent)));
  document.documentElement.style.setProperty("--text-width", `${width}%`);
  divider.setAttribute("aria-valuenow", width);
  remember("width", width);
}

divider.addEventListener("pointerdown", (event) => divider.setPointerCapture(event.pointerId));
divider.addEventListener("pointermove", (event) => {
  if (divider.hasPointerCapture(event.pointerId)) divide((event.clientX / innerWidth) * 100);
});
divider.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -2, ArrowRight: 2 }[event.key];
  if (step) divide(Number(divider.getAttribute("aria-valuenow")) + step);
});

addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  const menu = $(":popover-open");
  if (menu) {
    menu.hidePopover();
    focus($("#code").contains(menu) ? pane : main); // the keys that scroll go on working
  } else if ($("#code").contains(document.activeElement)) {
    leaveCode();
  }
});
// A tap on the text closes the sheet.
main.addEventListener("click", (event) => {
  const isOpen = !wide.matches && document.body.classList.contains("open");
  if (!isOpen || event.target.closest("a, button, summary")) return;
  openSheet(false);
  focus(main);
});
$("#close").addEventListener("click", leaveCode);
$("#open").addEventListener("click", (event) => {
  opener = event.target;
  go(marked ?? sections[0]);
});

for (const block of navigator.clipboard ? all(".sh") : []) {
  const button = document.createElement("button");
  const reset = () => (button.textContent = "Copy");
  button.className = "copy";
  button.addEventListener("click", async () => {
    const pre = block.querySelector("pre");
    try {
      await navigator.clipboard.writeText(pre.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(pre); // the browser refuses, but the reader can
      button.textContent = "Press Ctrl+C";
    }
    setTimeout(reset, 2000);
  });
  reset();
  block.append(button);
}

// The keyboard can scroll what is too wide, but only if it can have the focus.
function letScroll() {
  const blocks = all(".block pre");
  const tooWide = blocks.filter((each) => each.scrollWidth > each.clientWidth);
  for (const each of blocks) each.removeAttribute("tabindex");
  for (const each of tooWide) each.tabIndex = 0;
}
new ResizeObserver(letScroll).observe(main); // it looks once at the start, too

// ---- The start: where the address says, or where the reader was

if (Number.isFinite(recall("width"))) divide(recall("width"));
for (const chapter of chapters) if (read.has(chapter.id)) tick(chapter);
if (history.state) {
  restore(history.state);
} else if (targetOf(location)) {
  const target = targetOf(location);
  // Lines of code: the text that explains them comes along.
  const back = target.querySelector(".back");
  if (back) targetOf(back).scrollIntoView();
  go(target);
} else {
  document.getElementById(recall("heading") ?? chapters[0].id)?.scrollIntoView();
  focus(main);
}
onScroll();
onCodeScroll();
