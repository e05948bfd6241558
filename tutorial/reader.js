// The tutorial and the code, side by side. Without this, both can be read, one after the other.
"use strict";

const $ = (selector) => document.querySelector(selector);
const all = (selector) => [...document.querySelectorAll(selector)];
const targetOf = (link) => document.getElementById(decodeURIComponent(link.hash.slice(1)));

const main = $("main"), pane = $("#files"), divider = $("#divider");
const chapters = all("article");
const headings = all("article, article :is(h2, h3)[id]");
const linksToLines = all("main .to-code[id]");
const wide = matchMedia("(min-width: 64rem)");
const calm = matchMedia("(prefers-reduced-motion: reduce)");

let marked; // lines of the code
let opener; // the link that led to them: Escape goes back to it
// The code follows the text only while the reader scrolls, and not after a jump.
let following = true;

// The storage may be forbidden. Then the page forgets, and that is all.
function remember(key, value) {
  try {
    localStorage.setItem(`tutorial-${key}`, JSON.stringify(value));
  } catch {}
}

function recall(key, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(`tutorial-${key}`)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

// ---- Jumps

function mark(lines) {
  if (lines === marked) return;
  marked?.classList.remove("marked");
  lines?.classList.add("marked");
  marked = lines;
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
  const before = place();
  go(targetOf(link));
  if (pane.contains(link)) following = false; // the way back leaves the code as it is
  history.replaceState(before, "");
  if (link.hash !== location.hash) history.pushState(place(), "", link.hash);
});

// ---- The history. The browser remembers the hash, but not where text and code were.

history.scrollRestoration = "manual";

// On a narrow screen, the page itself scrolls the text.
const scroller = () => (wide.matches ? main : document.scrollingElement);
const place = () => ({ marked: marked?.id, text: scroller().scrollTop, code: pane.scrollTop });

function restore(state) {
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
  each.addEventListener("scrollend", () => history.replaceState(place(), ""));
}

// ---- Scrolling: where is the reader?

const isAbove = (element, y) =>
  element.checkVisibility() && element.getBoundingClientRect().top <= y;
const isBefore = (a, b) => a.compareDocumentPosition(b) & Node.DOCUMENT_POSITION_FOLLOWING;
const read = new Set(recall("read", []));

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

function onScroll() {
  const line = innerHeight * 0.4; // where the eyes are, more or less
  const heading = headings.findLast((each) => isAbove(each, line)) ?? chapters[0];
  const chapter = heading.closest("article");
  setCurrent($("#chapters"), heading);
  $("[popovertarget=chapters] b").textContent = chapter.querySelector("h1").textContent;
  remember("heading", heading.id);
  if (following) {
    const index = linksToLines.findLastIndex((each) => isAbove(each, line));
    let link = linksToLines[index];
    // Has a new section begun, and its first link is in view? Then the one before is no news.
    const next = linksToLines[index + 1];
    const isOver = !link || (isAbove(link, 0) && isBefore(link, heading));
    if (isOver && next && isAbove(next, innerHeight)) link = next;
    if (link) mark(targetOf(link));
    if (link && wide.matches) reveal(marked);
    const end = chapter.getBoundingClientRect().bottom;
    if (end > innerHeight / 2 && end < innerHeight + 50) tick(chapter);
  }
}

const sections = all("#contents a").map(targetOf);

function onCodeScroll() {
  const line = pane.getBoundingClientRect().top + pane.clientHeight * 0.4;
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
  const inCode = $("#code").contains(document.activeElement) && !$(":popover-open");
  if (event.key === "Escape" && inCode) leaveCode();
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
    await navigator.clipboard.writeText(block.querySelector("pre").textContent);
    button.textContent = "Copied";
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

if (recall("width")) divide(recall("width"));
for (const chapter of chapters) if (read.has(chapter.id)) tick(chapter);
if (history.state) {
  restore(history.state);
} else if (targetOf(location)) {
  const target = targetOf(location);
  // Lines of code: the text that explains them comes along.
  const back = target.querySelector?.(":scope > .back");
  if (back) targetOf(back).scrollIntoView();
  go(target);
} else {
  document.getElementById(recall("heading", chapters[0].id))?.scrollIntoView();
  focus(main);
}
onScroll();
onCodeScroll();
