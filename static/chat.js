// The chat page. The five functions that carry a message come first. The rest is for comfort.
const ANSWER_TIMEOUT = 4_000; // milliseconds for the server to say that it is there
const SILENCE_MAX = 35_000; // milliseconds without a word: it says something every 26 seconds
const SHOWN_MAX = 300; // messages on the page, unless somebody has scrolled up to older ones

const $ = (id) => document.getElementById(id);
const { user, textMax } = $("chat").dataset;
const [log, list, older, box] = [$("log"), $("messages"), $("older"), $("text")];
let socket = null; // the WebSocket, or null while there is none
let newest = 0; // the highest number of a message that the page has seen
const outbox = new Map(); // what is not stored yet: key -> { key, text, failed, item }

// Open the WebSocket. The server sends who is online, and all that is newer than `newest`.
function connect() {
  const query = new URLSearchParams({ after: newest, user });
  const opening = new WebSocket(`${location.origin.replace("http", "ws")}/ws?${query}`);
  socket = opening;
  deadline = Date.now() + ANSWER_TIMEOUT;
  opening.onopen = () => {
    deadline = Date.now() + SILENCE_MAX;
    $("connection").textContent = "";
    outbox.forEach(transmit); // in the order in which they were typed
  };
  opening.onmessage = (frame) => {
    deadline = Date.now() + SILENCE_MAX;
    retryDelay = 500;
    for (const event of JSON.parse(frame.data)) attempt(() => handle(event));
    if (waiting.length > 0) showNew();
  };
  opening.onclose = (event) => {
    if (event.code === 1008) goToLogin();
    else if (socket === opening) dropConnection();
  };
}

// Take what was typed, and put it into the outbox.
function send(event) {
  event.preventDefault();
  const text = box.value.trim();
  if (text === "" || [...text].length > textMax) return;
  const number = parseInt([...outbox.keys()].at(-1) ?? "100000") + 1; // rises: a reload sorts by it
  const random = crypto.getRandomValues(new Uint32Array(4)).join("-");
  transmit(addToOutbox({ key: `${number}-${random}`, text, failed: "" }));
  deadline = Math.min(deadline, Date.now() + 12_000); // time enough for a slow database
  box.value = "";
  onInput();
  log.scrollTop = 0; // 0 is the bottom
}

// Send a message, if we are connected. Twice does no harm: the server stores each key once.
function transmit(message) {
  if (message.failed || socket?.readyState !== WebSocket.OPEN) return;
  socket.send(JSON.stringify({ text: message.text, key: message.key }));
}

// Take a stored message for showNew(), unless the page has it already.
function publish(message) {
  confirm(message);
  if (message.id <= newest) return;
  newest = message.id;
  waiting = [...waiting, message].slice(-SHOWN_MAX);
  if (message.user !== user && (isReading() || document.hidden)) unseen += 1;
}

// Take a stored message out of the outbox, and out of the browser's storage.
function confirm(message) {
  outbox.get(message.key)?.item.remove();
  outbox.delete(message.key);
  attempt(() => localStorage.removeItem(outboxName + message.key));
}

// ---- The connection
let deadline = Infinity; // something must arrive until then, or the connection is given up
let retryDelay = 500; // milliseconds until we connect again: it grows to 4 s, plus up to a quarter
let retryTimer;
let loggingOut = false; // the button was pressed, which may come to nothing
let leaving = false; // the session has ended, and another page comes
// The network has changed, or somebody looks at the page again: is the connection still alive?
function check() {
  showNew();
  if (socket === null) reconnect();
  if (socket?.readyState !== WebSocket.OPEN) return;
  socket.send("{}"); // this is no message, so the server answers with an error
  deadline = Math.min(deadline, Date.now() + ANSWER_TIMEOUT);
}

// Give up the connection, and try again. The browser itself may take minutes to notice.
function dropConnection() {
  socket?.close();
  socket = null;
  deadline = Infinity;
  $("connection").textContent = "Disconnected. Reconnecting…";
  clearTimeout(retryTimer);
  retryTimer = setTimeout(reconnect, retryDelay * (1 + Math.random() / 4));
  retryDelay = Math.min(4_000, retryDelay * 1.6);
}

// Ask with fetch() first: it can tell that the session has ended, which a refused WebSocket
// cannot. And after some failures Firefox delays WebSockets, but not this.
async function reconnect() {
  if (socket !== null || leaving) return;
  const answer = await fetchMessages(0, ANSWER_TIMEOUT).catch(() => null);
  if (socket !== null || leaving) return;
  if (answer === null) dropConnection();
  else connect();
}

// The messages before a number. `user` is for the server: the cookie may be another one's by now.
async function fetchMessages(before, timeout) {
  const url = `/messages?${new URLSearchParams({ before, user })}`;
  const response = await fetch(url, { signal: AbortSignal.timeout(timeout) });
  if (response.redirected) goToLogin();
  return (await response.json()).messages; // the page of an error is no JSON: an exception
}

// The session has ended. Those who have logged out here need not be told.
function goToLogin() {
  if (!leaving) location.replace(loggingOut ? "/login" : "/login?ended");
  leaving = true;
}

// Do what an event from the server says. Events of unknown types are ignored.
function handle(event) {
  if (event.type === "message") return publish(event);
  if (event.type === "error" && outbox.has(event.key)) mark(outbox.get(event.key), event.text);
  if (event.type === "online") online = new Set(event.users);
  if (event.type === "online") shown = new Set(); // who was here before is no news
  if (event.type === "joined") online.add(event.user);
  if (event.type === "left") online.delete(event.user);
  drawTimer ??= setTimeout(drawPeople, event.type === "left" ? 2_000 : 200);
}

// One bad message must not stop the page, nor a storage that is forbidden or holds nonsense.
function attempt(action) {
  try {
    return action();
  } catch (error) {
    console.error(error);
  }
}

// ---- The look of a message
const copyOf = (id) => $(id).content.firstElementChild.cloneNode(true); // of a <template>
const makeItem = (message) => attempt(() => fillIn(copyOf("message"), message)) ?? "";
const textIn = (item, selector) => item.querySelector(selector).textContent;

// Fill in a copy of the page's <template>, or a message that the server has rendered.
function fillIn(item, message) {
  const date = new Date(message.time);
  const stamp = item.querySelector("time");
  stamp.dateTime = message.time;
  stamp.textContent = date.toLocaleTimeString([], { timeStyle: "short" });
  stamp.title = date.toLocaleString([], { dateStyle: "full", timeStyle: "medium" });
  item.querySelector(".day").textContent = date.toLocaleDateString([], { dateStyle: "full" });
  item.querySelector(".text").replaceChildren(...withLinks(message.text));
  item.classList.toggle("mine", message.user === user);
  item.dataset.id = message.id;
  return setName(item, message.user);
}

// Letters of all scripts and some signs; punctuation if more follows; brackets that are closed.
const LINK = /(https?:\/\/(?:[.,:;!?'*]*(?:[\p{L}\p{M}\p{N}/#%&=+~@$|_-]|\(\S*?\)|\[\S*?\]))+)/iu;

// Text and links, in turn. What somebody wrote is never parsed as HTML.
function withLinks(text) {
  return text.split(LINK).map((part, index) => {
    if (index % 2 === 0) return part; // what stands between the links
    const link = copyOf("link");
    link.href = link.textContent = part;
    return link;
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

// Show the day where it is a new one, and the author unless the same person goes on.
function group() {
  for (const item of list.children) {
    const previous = item.previousElementSibling;
    const isSame = (part) => previous !== null && textIn(previous, part) === textIn(item, part);
    item.querySelector(".day").hidden = isSame(".day");
    item.classList.toggle("same", isSame(".day") && isSame(".name"));
  }
}

// ---- Reading. At the bottom, log.scrollTop is 0, and above it is negative (see chat.css).
let waiting = []; // messages that are to follow those on the page
let unseen = 0; // how many came while somebody read further up, or looked at another tab
const isReading = () => log.scrollTop < -60; // further up than at the bottom, more or less

// Put new messages on the page, and do not move what is read. If the page is full, they wait.
function showNew() {
  const reading = isReading();
  const height = log.scrollHeight;
  if (!reading || list.children.length < SHOWN_MAX) list.append(...waiting.splice(0).map(makeItem));
  while (!reading && list.children.length > SHOWN_MAX) {
    list.firstElementChild.remove(); // or the page would grow without limit
    older.hidden = false;
  }
  group();
  log.scrollTop = reading ? log.scrollTop - (log.scrollHeight - height) : 0;
  if (!reading && !document.hidden) unseen = 0;
  $("jump").hidden = !reading || unseen === 0;
  $("jump").textContent = `New messages (${unseen}) ↓`;
  document.title = document.title.replace(/^(\(\d+\) )?/, unseen > 0 ? `(${unseen}) ` : "");
}

// Put older messages above the others. They may take a minute: 300 KB, over a slow line.
async function loadOlder(event) {
  event.preventDefault(); // the link's URL is for readers without JavaScript
  if (older.hidden || older.className === "loading") return;
  older.className = "loading";
  const first = list.firstElementChild;
  const messages = await fetchMessages(first.dataset.id, 60_000).catch(() => null);
  older.className = messages === null ? "failed" : ""; // after a failure, only when asked
  if (messages === null || first !== list.firstElementChild) return; // or showNew() removed it
  log.setAttribute("aria-live", "off"); // a screen reader need not read these out
  setTimeout(() => log.removeAttribute("aria-live"), 500);
  list.prepend(...messages.map(makeItem));
  group();
  older.hidden = messages.length === 0 || messages[0].id === 1;
}

// ---- Writing. A message waits in the outbox, and in the browser's storage, until it is stored.
const outboxName = `unsent ${user} `; // and the key: the name of a message in the storage
const draftName = `draft ${user}`;
const load = (name) => attempt(() => JSON.parse(localStorage.getItem(name)));
const save = (name, value) => attempt(() => localStorage.setItem(name, JSON.stringify(value)));

// Show an unsent message below the others, and keep it in the browser's storage.
function addToOutbox(message) {
  message.item = copyOf("unsent-message");
  message.item.querySelector(".text").textContent = message.text;
  outbox.set(message.key, message);
  $("unsent").append(message.item);
  const [again, edit] = message.item.querySelectorAll("button");
  again.onclick = () => transmit(mark(message, ""));
  edit.onclick = () => {
    confirm(message);
    box.value = `${message.text}\n${box.value}`.trimEnd();
    onInput();
  };
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

// Keep the draft, say how much room is left, and make the box as high as its text.
function onInput() {
  if (box.value.length > box.maxLength) box.value = box.value.slice(0, box.maxLength);
  save(draftName, box.value);
  const left = textMax - [...box.value.trim()].length; // code points, as the server counts
  $("counter").textContent = left < 200 ? `Characters left: ${left}` : "";
  box.setAttribute("aria-invalid", left < 0);
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight + 2}px`; // and its border
}

// ---- People
let online = new Set(); // who is connected
let shown = new Set(); // whom the page shows
let drawTimer = null; // so a thousand who come at once are drawn at once
// Draw the list. (Who reloads the page leaves and joins within two seconds: that is no news.)
function drawPeople() {
  drawTimer = null;
  const joined = [...online].find((name) => !shown.has(name));
  const left = [...shown].find((name) => !online.has(name));
  if (joined === undefined && left === undefined) return;
  if (shown.size > 0) $("news").textContent = joined ? `${joined} joined` : `${left} left`;
  shown = new Set(online);
  $("online").replaceChildren(...[...shown].sort().map((name) => setName(copyOf("person"), name)));
  for (const count of document.querySelectorAll(".count")) count.textContent = shown.size;
}

if (location.search) location.replace("/"); // ?before= is for readers without JavaScript
for (const name of (attempt(() => Object.keys(localStorage)) ?? []).sort()) {
  const message = { failed: "", ...load(name), key: name.slice(outboxName.length) };
  if (name.startsWith(outboxName) && typeof message.text === "string") addToOutbox(message);
}
for (const item of list.children) { // the server has rendered these
  const message = { ...item.dataset, user: textIn(item, ".name"), text: textIn(item, ".text") };
  message.time = item.querySelector("time").dateTime;
  newest = Number(message.id);
  confirm(message);
  attempt(() => fillIn(item, message));
}
const draft = load(draftName);
if (typeof draft === "string") box.value = draft + box.value; // that was typed already
onInput();
group();
connect();
$("write").onsubmit = send;
$("write").querySelector("button").disabled = false;
box.oninput = window.onresize = onInput;
box.onkeydown = (event) => {
  const isComposing = event.isComposing || event.keyCode === 229; // an input method is in use
  if (event.key === "Enter" && !event.shiftKey && !isComposing) send(event);
};
older.onclick = loadOlder;
log.onscroll = (event) => {
  if (log.scrollTop > -1) showNew();
  const isNearTop = log.scrollHeight + log.scrollTop < 2 * log.clientHeight;
  if (isNearTop && older.className === "") loadOlder(event);
};
$("jump").onclick = () => (log.scrollTop = 0);
$("main").onclick = (event) => { if (event.target.matches("button")) box.focus(); };
document.querySelector("header form").onsubmit = () => (loggingOut = true);
document.onvisibilitychange = window.ononline = window.onoffline = check;
// Ask before the page is closed if the storage could not keep what is not sent yet.
window.onbeforeunload = (event) => {
  const isKept = (message) => load(outboxName + message.key);
  const allKept = (load(draftName) ?? "") === box.value && [...outbox.values()].every(isKept);
  if (!allKept && !leaving) event.preventDefault();
};
setInterval(() => Date.now() > deadline && dropConnection(), 500);
