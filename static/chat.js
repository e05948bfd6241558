// The chat page. Without it, the page still shows the newest messages, and links to older ones.
"use strict";

const $ = (id) => document.getElementById(id);

// On the forms' pages there is no chat: only a word about why somebody is there.
if ($("ended") && sessionStorage.getItem("ended")) $("ended").hidden = false;
sessionStorage.removeItem("ended");
if ($("chat")) start();

function start() {
  const { user, limit, page } = $("chat").dataset;
  const log = $("log"), list = $("messages"), box = $("text");
  const numbers = [...list.children].map((item) => Number(item.dataset.id));
  let newest = numbers.at(-1) ?? 0; // the highest number that is shown
  let socket, timer, pause = 500, leaving = false;
  let unseen = 0, unread = 0; // below the visible part; while the tab was hidden
  const online = new Set();
  const title = document.title;

  // ---- One message: a copy of the page's own <template>, filled in

  function fill(item, { id, user: who, text, time }) {
    item.dataset.id = id;
    item.classList.toggle("mine", who === user);
    item.querySelector("b").textContent = who;
    const stamp = item.querySelector("time"), date = new Date(time);
    stamp.dateTime = time;
    stamp.textContent = date.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
    stamp.title = date.toLocaleString();
    item.querySelector(".text").replaceChildren(...withLinks(text));
    return item;
  }

  const copy = (id) => $(id).content.firstElementChild.cloneNode(true);
  const make = (event) => fill(copy("message"), event);

  // Text nodes and links: what somebody wrote is never parsed as HTML.
  function withLinks(text) {
    return text.split(/(https?:\/\/[^\s<>"]*[^\s<>"'.,:;!?)\]}])/i).map((part, index) => {
      if (index % 2 === 0 || !URL.canParse(part)) return document.createTextNode(part);
      const link = document.createElement("a");
      Object.assign(link, { href: part, textContent: part, target: "_blank" });
      link.rel = "noopener noreferrer nofollow ugc";
      return link;
    });
  }

  // What depends on the message before: a new day, and whether the same person goes on.
  function arrange(item) {
    const before = item.previousElementSibling, day = item.querySelector(".day");
    const date = (each) => new Date(each.querySelector("time").dateTime);
    const name = (each) => each.querySelector("b").textContent;
    day.textContent = date(item).toLocaleDateString([], { dateStyle: "full" });
    day.hidden = !!before && date(before).toDateString() === date(item).toDateString();
    const same = before && day.hidden && name(before) === name(item) && date(item) - date(before) < 300e3;
    item.classList.toggle("same", !!same);
  }

  // ---- Reading

  const atBottom = () => log.scrollHeight - log.scrollTop - log.clientHeight < 60;

  function toBottom() {
    log.scrollTop = log.scrollHeight;
    unseen = 0;
    $("jump").hidden = true;
  }

  function show(event) {
    settle(event);
    if (event.id <= newest) return; // it is there already
    newest = event.id;
    const follow = atBottom() || event.user === user, item = make(event);
    list.append(item);
    arrange(item);
    if (document.hidden) document.title = `(${++unread}) ${title}`;
    if (follow) return toBottom();
    $("jump").hidden = false;
    $("jump").textContent = ++unseen === 1 ? "1 new message ↓" : `${unseen} new messages ↓`;
  }

  let loading = false;
  async function loadOlder() {
    const first = list.firstElementChild, link = $("older");
    if (loading || !link) return;
    loading = true;
    delete link.dataset.failed;
    link.textContent = "Loading …";
    try {
      const answer = await fetch(`/messages?before=${first.dataset.id}`);
      if (answer.redirected) return leave();
      if (!answer.ok) throw new Error(answer.status);
      const { messages } = await answer.json();
      const items = messages.map(make), height = log.scrollHeight, top = log.scrollTop;
      log.setAttribute("aria-live", "off"); // old ones are no news
      list.prepend(...items);
      [...items, first].forEach(arrange);
      if (messages.length < page || messages[0].id === 1) link.remove();
      else link.textContent = "Older messages";
      log.scrollTop = top + log.scrollHeight - height;
      setTimeout(() => log.removeAttribute("aria-live"), 500);
    } catch {
      link.textContent = "Older messages could not be loaded. Try again";
      link.dataset.failed = "yes"; // from now on only when asked
    } finally {
      loading = false;
    }
  }

  // ---- Who is here

  function showOnline(news = "") {
    $("news").textContent = news;
    $("count").textContent = online.size;
    const items = [...online].sort().map((name) => {
      const item = document.createElement("li");
      Object.assign(item, { textContent: name, dir: "auto" });
      return item;
    });
    $("online").replaceChildren(...items);
  }

  // ---- Writing. What is not known to be stored waits in `unsent`, and in the browser's
  // storage, under its writer's name. To send it twice does no harm: it keeps its key.

  const unsent = new Map(); // key -> { key, text, failed, item }
  const mine = `unsent ${user} `;

  function remember({ key, text, at, failed }) {
    localStorage.setItem(mine + key, JSON.stringify({ key, text, at, failed }));
  }

  function add(message) {
    const item = (message.item = copy("unsent-message"));
    const [again, edit] = item.querySelectorAll("button");
    item.querySelector(".text").textContent = message.text;
    again.onclick = () => {
      message.failed = undefined;
      remember(message);
      showState(message);
      transmit(message);
      box.focus();
    };
    edit.onclick = () => {
      settle(message);
      box.value = [message.text, box.value].filter(Boolean).join("\n");
      typed();
      box.focus();
    };
    unsent.set(message.key, message);
    $("unsent").append(item);
    showState(message);
  }

  function showState({ item, failed }) {
    const state = item.querySelector(".state");
    state.textContent = failed ?? "Sending …";
    state.classList.toggle("failed", !!failed);
    item.querySelector(".again").hidden = !failed;
  }

  function transmit(message) {
    if (message.failed || socket.readyState !== WebSocket.OPEN) return;
    const { key, text } = message, via = socket;
    via.send(JSON.stringify({ text, key }));
    // No answer at all, not even an error: the line is dead, and nobody has told us.
    setTimeout(() => unsent.has(key) && !message.failed && via === socket && drop(), 15000);
  }

  function settle({ key, user: who = user }) {
    if (who !== user || !unsent.has(key)) return;
    unsent.get(key).item.remove();
    unsent.delete(key);
    localStorage.removeItem(mine + key);
  }

  function refuse({ key, text }) {
    const message = unsent.get(key);
    if (!message) return;
    message.failed = text;
    remember(message);
    showState(message);
  }

  const length = () => [...box.value.trim()].length; // code points, as the server counts

  function typed() {
    localStorage.setItem("draft " + user, box.value);
    const left = limit - length();
    $("counter").textContent = left < 0 ? `${-left} characters too many` : left < 200 ? `${left} characters left` : "";
    $("counter").classList.toggle("fault", left < 0);
    box.setAttribute("aria-invalid", left < 0);
  }

  function send() {
    if (!length() || length() > limit) return;
    const bytes = crypto.getRandomValues(new Uint8Array(16));
    const key = [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
    const message = { key, text: box.value.trim(), at: performance.timeOrigin + performance.now() };
    remember(message);
    add(message);
    transmit(message);
    box.value = "";
    typed();
    toBottom();
  }

  // ---- The connection

  function connect() {
    clearTimeout(timer);
    const url = new URL("/ws", location.href.replace(/^http/, "ws"));
    url.search = new URLSearchParams({ after: newest, user });
    const mySocket = (socket = new WebSocket(url));
    let opened = false;
    socket.onopen = () => {
      opened = true;
      pause = 500;
      $("connection").textContent = "";
      unsent.forEach(transmit); // in the order in which they were typed
    };
    socket.onmessage = ({ data }) => JSON.parse(data).forEach((event) => handlers[event.type]?.(event));
    socket.onclose = ({ code }) => {
      if (mySocket !== socket) return;
      if (code === 1008) return leave();
      if (!opened) checkSession(); // a refused handshake does not tell why
      $("connection").textContent = "Not connected. Trying again …";
      timer = setTimeout(connect, Math.min(5000, pause * (1 + Math.random() / 4)));
      pause = Math.min(5000, pause * 1.6);
    };
  }

  function drop() {
    socket.onclose({ code: 1006 }); // not when the browser notices, but now
    socket.onclose = null;
    socket.close();
  }

  const handlers = {
    message: show,
    error: refuse,
    online({ users }) {
      online.clear();
      users.forEach((name) => online.add(name));
      showOnline();
    },
    joined({ user: who }) {
      online.add(who);
      showOnline(`${who} has come`);
    },
    left({ user: who }) {
      online.delete(who);
      showOnline(`${who} has left`);
    },
  };

  async function checkSession() {
    const answer = await fetch("/messages?before=0").catch(() => null);
    if (answer?.redirected) leave();
  }

  function leave() {
    if (leaving) return;
    leaving = true;
    clearTimeout(timer);
    sessionStorage.setItem("ended", "yes");
    location.replace("/login");
  }

  function connectNow() {
    if (!leaving && socket.readyState > WebSocket.OPEN) connect();
  }

  // ---- What the page starts with

  [...list.children].forEach((item) => {
    const text = item.querySelector(".text").textContent, time = item.querySelector("time").dateTime;
    fill(item, { id: item.dataset.id, user: item.querySelector("b").textContent, text, time });
    arrange(item);
  });
  Object.keys(localStorage)
    .filter((name) => name.startsWith(mine))
    .map((name) => JSON.parse(localStorage.getItem(name)))
    .sort((a, b) => a.at - b.at)
    .forEach(add);
  box.value = localStorage.getItem("draft " + user) ?? "";
  typed();
  toBottom();
  connect();

  box.oninput = typed;
  box.onkeydown = (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
    event.preventDefault();
    send();
  };
  $("write").onsubmit = (event) => {
    event.preventDefault();
    send();
    box.focus();
  };
  $("jump").onclick = () => {
    toBottom();
    box.focus();
  };
  if ($("older")) $("older").onclick = (event) => {
    event.preventDefault();
    loadOlder();
  };
  log.onscroll = () => {
    if (log.scrollTop < 200 && !$("older")?.dataset.failed) loadOlder();
    if (atBottom()) toBottom();
  };
  window.addEventListener("online", connectNow);
  window.addEventListener("offline", drop);
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) return;
    unread = 0;
    document.title = title;
    connectNow();
  });
}
