// The chat page. Follow a message through five functions: connect() opens the WebSocket,
// publish() shows a message that arrives, send() takes what was typed, transmit() puts it on the
// WebSocket, and confirm() takes it out of the outbox when the server has stored it.

const RETRY_MIN = 500; // milliseconds until the first attempt to connect again
const RETRY_MAX = 4_000; // milliseconds until a later attempt, plus up to a quarter
const CONNECT_TIMEOUT = 4_000; // milliseconds for the server to answer when we connect
const ANSWER_TIMEOUT = 12_000; // milliseconds for it to store a message, or to find older ones
const LEFT_DELAY = 2_000; // milliseconds that people must be away before we say that they left
const SHOWN_MAX = 300; // messages on the page, while the reader is at the bottom
const NEAR = 60; // pixels from the bottom that still count as the bottom

const $ = (id) => document.getElementById(id);
const { user, textMax, pageSize } = $("chat").dataset;
const [log, list, older, box] = ["log", "messages", "older", "text"].map($);
const copyOf = (id) => $(id).content.firstElementChild.cloneNode(true);
const authorOf = (item) => item.querySelector(".name").textContent;
const dateOf = (item) => new Date(item.querySelector("time").dateTime);

// One bad message must not stop the page, nor a storage that is forbidden or holds nonsense.
function attempt(action) {
  try {
    return action();
  } catch (error) {
    console.error(error);
  }
}

// ---- One message
// Fill in a copy of the page's <template>, or a message that the server has rendered.
function fillIn(item, { id, key, user: author, text, time }) {
  Object.assign(item.dataset, { id, key });
  item.classList.toggle("mine", author === user);
  item.querySelector(".text").replaceChildren(...withLinks(text));
  const stamp = item.querySelector("time");
  stamp.dateTime = time;
  stamp.textContent = dateOf(item).toLocaleTimeString([], { timeStyle: "short" });
  return setName(item, author);
}

// Text and links: what somebody wrote is never parsed as HTML.
function withLinks(text) {
  const parts = text.split(/(https?:\/\/[^\s<>"]*[^\s<>"'.,:;!?()[\]{}])/i);
  return parts.map((part, index) => {
    if (index % 2 === 0) return part; // what stands between the links
    const link = { href: part, textContent: part, target: "_blank", rel: "noopener nofollow ugc" };
    return Object.assign(document.createElement("a"), link);
  });
}

// A name has the same hue everywhere. chat.css makes the colours from it (but no yellow).
function setName(item, name) {
  let hue = 0;
  for (const character of name) hue = (hue * 53 + character.codePointAt(0)) % 270;
  item.style.setProperty("--hue", hue);
  item.querySelector(".avatar").textContent = [...name][0].toUpperCase();
  item.querySelector(".name").textContent = name;
  return item;
}

// Show the day if it is a new one, and the author unless the same person goes on.
function groupWithPrevious(item) {
  const previous = item.previousElementSibling;
  const date = dateOf(item);
  const sameDay = previous !== null && dateOf(previous).toDateString() === date.toDateString();
  item.querySelector(".day").textContent = date.toLocaleDateString([], { dateStyle: "full" });
  item.querySelector(".day").hidden = sameDay;
  item.classList.toggle("same", sameDay && authorOf(previous) === authorOf(item));
}

// ---- Reading. The log scrolls upwards: its scrollTop is 0 at the bottom, and negative above
// (column-reverse in chat.css). So it stays at the bottom by itself, whatever changes above.
let newest = 0; // the highest number of a message on the page

function publish(message) {
  confirm(message);
  if (message.id <= newest) return; // it is on the page already
  list.append(fillIn(copyOf("message"), message));
  groupWithPrevious(list.lastElementChild);
  newest = message.id;
  $("jump").hidden = false; // toBottom() hides it again
}

function toBottom() {
  log.scrollTop = 0;
  $("jump").hidden = true;
  while (list.children.length > SHOWN_MAX) {
    list.firstElementChild.remove(); // or the page would grow without limit
    groupWithPrevious(list.firstElementChild);
    older.hidden = false;
  }
}

function onScroll() {
  if (log.scrollTop > -NEAR) $("jump").hidden = true;
  if (log.scrollHeight + log.scrollTop < 2 * log.clientHeight && !older.className) loadOlder();
}

// `user` is for the server: somebody else may have logged in at this browser since.
async function fetchMessages(before, timeout) {
  const url = `/messages?${new URLSearchParams({ before, user })}`;
  const response = await fetch(url, { signal: AbortSignal.timeout(timeout) });
  if (response.redirected) goToLogin();
  return (await response.json()).messages; // the page of an error is no JSON: an exception
}

async function loadOlder(event) {
  event?.preventDefault(); // the link's URL is for readers without JavaScript
  if (older.hidden || older.className === "loading") return;
  older.className = "loading";
  const first = list.firstElementChild;
  const messages = await fetchMessages(first.dataset.id, ANSWER_TIMEOUT).catch(() => null);
  older.className = messages ? "" : "failed"; // after a failure, only when asked
  if (!messages || first !== list.firstElementChild) return; // or toBottom() has removed it
  log.setAttribute("aria-live", "off"); // a screen reader need not read these out
  setTimeout(() => log.removeAttribute("aria-live"), 500);
  list.prepend(...messages.map((each) => attempt(() => fillIn(copyOf("message"), each)) ?? ""));
  [...list.children].slice(0, messages.length + 1).forEach(groupWithPrevious);
  older.hidden = messages.length < pageSize || messages[0].id === 1;
}

// ---- Writing. A message waits in the outbox, and in the browser's storage, until the server
// has stored it. To send it twice does no harm: the server stores each key once.
const outbox = new Map(); // key -> { key, text, failed, item }
const outboxName = `unsent ${user} `; // and the key: the name of a message in the storage
const draftName = `draft ${user}`;
const load = (name) => attempt(() => JSON.parse(localStorage.getItem(name)));
const save = (name, value) => attempt(() => localStorage.setItem(name, JSON.stringify(value)));

function send(event) {
  event.preventDefault();
  const text = box.value.trim();
  if (text === "" || [...text].length > textMax) return;
  const key = `${Date.now()}-${crypto.getRandomValues(new Uint32Array(4)).join("-")}`; // sortable
  transmit(addToOutbox({ key, text, failed: "" }));
  box.value = "";
  onInput();
  toBottom();
}

function transmit(message) {
  if (message.failed || socket?.readyState !== WebSocket.OPEN) return;
  socket.send(JSON.stringify({ text: message.text, key: message.key }));
  // No answer at all, not even an error: the connection is dead, but the browser does not know.
  const usedSocket = socket;
  setTimeout(() => {
    if (outbox.has(message.key) && !message.failed && socket === usedSocket) dropConnection();
  }, ANSWER_TIMEOUT);
}

function confirm({ key, user: author }) {
  if (author !== user) return;
  outbox.get(key)?.item.remove();
  outbox.delete(key);
  attempt(() => localStorage.removeItem(outboxName + key));
}

function addToOutbox(message) {
  message.item = copyOf("unsent-message");
  message.item.querySelector(".text").textContent = message.text;
  outbox.set(message.key, message);
  $("unsent").append(message.item);
  const [again, edit] = message.item.querySelectorAll("button");
  again.addEventListener("click", () => transmit(mark(message, "")));
  edit.addEventListener("click", () => {
    confirm({ key: message.key, user });
    box.value = `${message.text}\n${box.value}`.trimEnd();
    onInput();
  });
  return mark(message, message.failed);
}

// Mark a message as failed, with the reason; or, with "", as being sent.
function mark(message, failed) {
  message.failed = failed;
  message.item.classList.toggle("failed", failed !== "");
  message.item.querySelector(".state").textContent = failed || "Sending…";
  save(outboxName + message.key, { text: message.text, failed });
  return message;
}

function onInput() {
  save(draftName, box.value);
  const left = textMax - [...box.value.trim()].length; // code points, as the server counts
  $("counter").textContent = left < 200 ? `Characters left: ${left}` : "";
  box.setAttribute("aria-invalid", left < 0);
  if (CSS.supports("field-sizing", "content")) return; // the box is as high as its text
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight + 2}px`; // and its border
}

// ---- The connection
let socket = null;
let timer; // gives up connecting, or tries again
let retryDelay = RETRY_MIN;
let leaving = false; // the session has ended, or is about to

function connect() {
  const query = new URLSearchParams({ after: newest, user }); // we are sent all that is newer
  const opening = new WebSocket(`${location.origin.replace("http", "ws")}/ws?${query}`);
  socket = opening;
  clearTimeout(timer);
  timer = setTimeout(dropConnection, CONNECT_TIMEOUT);
  socket.addEventListener("open", () => {
    clearTimeout(timer);
    $("connection").textContent = "";
    outbox.forEach(transmit); // in the order in which they were typed
  });
  socket.addEventListener("message", ({ data }) => {
    const height = log.scrollHeight;
    for (const event of JSON.parse(data)) attempt(() => handlers[event.type]?.(event));
    if (log.scrollTop > -NEAR) toBottom();
    else log.scrollTop -= log.scrollHeight - height; // do not move what somebody reads
  });
  socket.addEventListener("close", ({ code }) => {
    if (code === 1008) goToLogin();
    else if (socket === opening) dropConnection();
  });
}

// Give up the connection, and try again. The browser itself may take minutes to notice.
function dropConnection() {
  socket?.close();
  socket = null;
  $("connection").textContent = "Disconnected. Reconnecting…";
  clearTimeout(timer);
  timer = setTimeout(reconnect, retryDelay * (1 + Math.random() / 4));
  retryDelay = Math.min(RETRY_MAX, retryDelay * 1.6);
}

// Ask with fetch() first: it can tell that the session has ended, which a refused WebSocket
// cannot. And after some failures Firefox delays WebSockets, but not this.
async function reconnect() {
  if (socket || leaving) return;
  const answer = await fetchMessages(0, CONNECT_TIMEOUT).catch(() => null);
  if (socket || leaving) return;
  if (answer) connect();
  else dropConnection();
}

function goToLogin() {
  if (!leaving) location.replace("/login?ended");
  leaving = true;
}

// ---- People
let online = new Set(); // who is connected
let shown = new Set(); // whom the page shows: also those who left a moment ago

function showOnline(news) {
  $("online").replaceChildren(...[...shown].sort().map((name) => setName(copyOf("person"), name)));
  for (const count of document.querySelectorAll(".count")) count.textContent = shown.size;
  $("news").textContent = news;
}

const handlers = {
  message: publish,
  error: ({ key, text }) => outbox.has(key) && mark(outbox.get(key), text),
  online({ users }) {
    retryDelay = RETRY_MIN;
    online = new Set(users);
    shown = new Set(users);
    showOnline("");
  },
  joined({ user: name }) {
    online.add(name);
    if (shown.has(name)) return;
    shown.add(name);
    showOnline(`${name} joined`);
  },
  // Somebody who reloads the page leaves and joins at once. Nobody needs to know.
  left({ user: name }) {
    online.delete(name);
    setTimeout(() => {
      if (!online.has(name) && shown.delete(name)) showOnline(`${name} left`);
    }, LEFT_DELAY);
  },
};

// ---- Start, and take over the messages that the server has rendered
function adopt(item) {
  const time = item.querySelector("time").dateTime;
  const message = { ...item.dataset, user: authorOf(item), time };
  newest = Number(message.id);
  confirm(message);
  fillIn(item, { ...message, text: item.querySelector(".text").textContent });
  groupWithPrevious(item);
}

$("write").addEventListener("submit", send);
box.addEventListener("keydown", (event) => {
  const isComposing = event.isComposing || event.keyCode === 229; // an input method is in use
  if (event.key === "Enter" && !event.shiftKey && !isComposing) send(event);
});
box.addEventListener("input", onInput);
older.addEventListener("click", loadOlder);
log.addEventListener("scroll", onScroll);
$("jump").addEventListener("click", toBottom);
document.querySelector("main").addEventListener("click", ({ target }) => {
  if (target.matches("button")) box.focus();
});
document.querySelector("header form").addEventListener("submit", () => {
  leaving = true;
});
addEventListener("resize", onInput);
addEventListener("online", reconnect);
addEventListener("offline", dropConnection);
document.addEventListener("visibilitychange", reconnect);
// Ask before the page is closed if the storage could not keep what is not sent yet.
addEventListener("beforeunload", (event) => {
  const isKept = ({ key }) => Boolean(load(outboxName + key));
  const allKept = (load(draftName) ?? "") === box.value && [...outbox.values()].every(isKept);
  if (!allKept && !leaving) event.preventDefault();
});
// ?before= is for readers without JavaScript. With it, the page shows the newest messages.
if (location.search) {
  location.replace("/");
} else {
  const names = attempt(() => Object.keys(localStorage)) ?? [];
  for (const name of names.filter((name) => name.startsWith(outboxName)).sort()) {
    const { text, failed = "" } = load(name) ?? {};
    if (typeof text === "string") addToOutbox({ key: name.slice(outboxName.length), text, failed });
  }
  for (const item of list.children) attempt(() => adopt(item));
  const draft = load(draftName);
  if (typeof draft === "string") box.value = draft + box.value; // that was typed already
  onInput();
  connect();
  $("write").querySelector("button").disabled = false;
}
