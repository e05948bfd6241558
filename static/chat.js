// The chat page. Without this, it still shows the messages, and links to older ones.
"use strict";

const $ = (id) => document.getElementById(id);

// On the forms' pages there is no chat: only a word about why somebody is there.
if ($("ended") && sessionStorage.getItem("ended")) $("ended").hidden = false;
sessionStorage.removeItem("ended");
if ($("chat")) start();

function start() {
  const { user, limit, page } = $("chat").dataset;
  const log = $("log"), list = $("messages"), box = $("text"), title = document.title;
  let newest = Number(list.lastElementChild?.dataset.id ?? 0); // the highest number shown
  let socket, timer, pause = 500, leaving = false;
  let following = true, top = 0; // the reader is at the bottom, and wants to stay there
  let unseen = 0, unread = 0; // messages further down; messages while the tab was hidden
  const online = new Set(), leftTimers = new Map(); // user -> the timer that will say so

  // ---- One message: a copy of the page's own <template>, filled in

  const copy = (id) => $(id).content.firstElementChild.cloneNode(true);

  function fill(item, { id, key, user: who, text, time }) {
    Object.assign(item.dataset, { id, key });
    item.classList.toggle("mine", who === user);
    item.querySelector("b").textContent = who;
    const stamp = item.querySelector("time"), date = new Date(time);
    stamp.dateTime = time;
    stamp.textContent = date.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
    stamp.title = date.toLocaleString();
    item.querySelector(".text").replaceChildren(...withLinks(text));
    return item;
  }

  // Text nodes and links: what somebody wrote is never parsed as HTML. A link may end with
  // a pair of parentheses, but not with the full stop of the sentence around it.
  const LINK = /(https?:\/\/(?:\([^\s<>"()]*\)|[^\s<>"()])*(?:\([^\s<>"()]*\)|[^\s<>"'.,:;!?()[\]{}]))/i;

  function withLinks(text) {
    return text.split(LINK).map((part, index) => {
      if (index % 2 === 0 || !URL.canParse(part)) return document.createTextNode(part);
      const link = document.createElement("a");
      const rel = "noopener noreferrer nofollow ugc";
      return Object.assign(link, { href: part, textContent: part, target: "_blank", rel });
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
    following = true;
    log.scrollTop = top = log.scrollHeight;
    showUnseen((unseen = 0));
  }

  function showUnseen() {
    $("jump").hidden = !unseen;
    $("jump").textContent = unseen === 1 ? "1 new message ↓" : `${unseen} new messages ↓`;
  }

  function show(event) {
    settle(event);
    if (event.id <= newest) return; // it is there already
    newest = event.id;
    list.append(fill(copy("message"), event));
    arrange(list.lastElementChild);
    if (!following) showUnseen(++unseen);
    if (document.hidden && event.user !== user) document.title = `(${++unread}) ${title}`;
  }

  // It says whose page this is: another one may have logged in at this browser since.
  const messages = (before) => `/messages?${new URLSearchParams({ before, user })}`;

  let loading = false;
  async function loadOlder() {
    const first = list.firstElementChild, link = $("older");
    if (loading || !link) return;
    loading = true;
    delete link.dataset.failed;
    link.textContent = "Loading …";
    try {
      const answer = await fetch(messages(first.dataset.id));
      if (answer.redirected) return leave();
      if (!answer.ok) throw new Error(answer.status);
      const older = (await answer.json()).messages;
      const items = older.map((event) => fill(copy("message"), event));
      const height = log.scrollHeight, place = log.scrollTop;
      log.setAttribute("aria-live", "off"); // old ones are no news
      list.prepend(...items);
      [...items, first].forEach(arrange);
      link.textContent = "Older messages";
      if (older.length < page || older[0].id === 1) {
        if (document.activeElement === link) log.focus();
        link.remove();
      }
      log.scrollTop = place + log.scrollHeight - height;
      setTimeout(() => log.removeAttribute("aria-live"), 500);
    } catch {
      link.textContent = "Older messages could not be loaded. Try again";
      link.dataset.failed = "yes"; // from now on only when asked
    } finally {
      loading = false;
    }
  }

  // ---- Who is here

  function showOnline(news) {
    $("news").textContent = news;
    $("count").textContent = online.size;
    const names = [...online].sort().map((textContent) => Object.assign(document.createElement("li"), { textContent, dir: "auto" }));
    $("online").replaceChildren(...names);
  }

  // ---- Writing. What is not known to be stored waits in `unsent`, and in the browser's
  // storage under its writer's name. To send it twice does no harm: it keeps its key.

  const unsent = new Map(); // key -> { key, text, at, failed, item }
  const mine = `unsent ${user} `, draft = `draft ${user}`;

  function keep(storage, name, value) {
    try {
      storage.setItem(name, value);
    } catch {} // it is full, or forbidden: all goes on, but a reload would lose this
  }

  function remember({ key, text, at, failed }) {
    keep(localStorage, mine + key, JSON.stringify({ key, text, at, failed }));
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
    const attempt = (message.attempt = {}), { key, text } = message;
    socket.send(JSON.stringify({ text, key }));
    // No answer at all, not even an error: the line is dead, and nobody has told us.
    const waits = () => unsent.get(key)?.attempt === attempt && !message.failed;
    setTimeout(() => waits() && drop(), 15000);
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

  // A draft is kept for this tab, and for the next one, should this one be closed.
  function typed() {
    const before = sessionStorage.getItem(draft);
    keep(sessionStorage, draft, box.value);
    if (box.value || localStorage.getItem(draft) === before) keep(localStorage, draft, box.value);
    const left = limit - length(), some = `${Math.abs(left)} character${Math.abs(left) === 1 ? "" : "s"}`;
    $("counter").textContent = left < 0 ? `${some} too many` : left < 200 ? `${some} left` : "";
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

  const handlers = {
    message: show,
    error: refuse,
    online({ users }) {
      pause = 500;
      leftTimers.forEach(clearTimeout);
      online.clear();
      users.forEach((name) => online.add(name));
      showOnline("");
    },
    joined({ user: who }) {
      clearTimeout(leftTimers.get(who));
      if (online.has(who)) return;
      online.add(who);
      showOnline(`${who} has come`);
    },
    // Somebody who reloads the page leaves and comes back at once. Do not tell that.
    left({ user: who }) {
      const tell = () => {
        online.delete(who);
        showOnline(`${who} has left`);
      };
      leftTimers.set(who, setTimeout(tell, 2000));
    },
  };

  function connect() {
    clearTimeout(timer);
    const url = new URL("/ws", location.href.replace(/^http/, "ws"));
    url.search = new URLSearchParams({ after: newest, user });
    const own = (socket = new WebSocket(url));
    let opened = false;
    timer = setTimeout(drop, 4000); // no answer, not even a no
    socket.onopen = () => {
      opened = true;
      clearTimeout(timer);
      $("connection").textContent = "";
      unsent.forEach(transmit); // in the order in which they were typed
    };
    socket.onmessage = ({ data }) => {
      if (own !== socket) return;
      JSON.parse(data).forEach((event) => handlers[event.type]?.(event));
      if (following) toBottom();
    };
    socket.onclose = ({ code }) => {
      if (own !== socket) return;
      if (code === 1008) return leave();
      if (!opened) checkSession(); // a refused handshake does not tell why
      $("connection").textContent = "Not connected. Trying again …";
      clearTimeout(timer);
      timer = setTimeout(connect, Math.min(4000, pause) * (1 + Math.random() / 4));
      pause = Math.min(4000, pause * 1.6);
    };
  }

  // Give the line up now: the browser itself may take minutes to notice.
  function drop() {
    socket.onclose?.({ code: 1006 });
    socket.onclose = null;
    socket.close();
  }

  async function checkSession() {
    const answer = await fetch(messages(0)).catch(() => null);
    if (answer?.redirected) leave();
  }

  function leave() {
    if (leaving) return;
    leaving = true;
    clearTimeout(timer);
    keep(sessionStorage, "ended", "yes");
    location.replace("/login");
  }

  function connectNow() {
    if (!leaving && socket.readyState > WebSocket.OPEN) connect();
  }

  // ---- What the page starts with

  Object.keys(localStorage)
    .filter((name) => name.startsWith(mine))
    .map((name) => JSON.parse(localStorage.getItem(name)))
    .sort((a, b) => a.at - b.at)
    .forEach(add);
  for (const item of list.children) {
    const { id, key } = item.dataset, who = item.querySelector("b").textContent;
    const text = item.querySelector(".text").textContent, time = item.querySelector("time").dateTime;
    fill(item, { id, key, user: who, text, time });
    arrange(item);
    settle({ key, user: who });
  }
  const old = sessionStorage.getItem(draft) ?? localStorage.getItem(draft);
  if (old !== box.value) box.value = [old, box.value].filter(Boolean).join("\n"); // typed already
  typed();
  toBottom();
  connect();

  $("write").querySelector("button").disabled = false;
  $("write").onsubmit = (event) => {
    event.preventDefault();
    send();
    box.focus();
  };
  box.oninput = typed;
  box.onkeydown = (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
    event.preventDefault();
    send();
  };
  document.onkeydown = ({ key, ctrlKey, metaKey, altKey }) => {
    const idle = [document.body, log].includes(document.activeElement);
    if (idle && key.length === 1 && key !== " " && !ctrlKey && !metaKey && !altKey) box.focus();
  };
  $("jump").onclick = () => {
    toBottom();
    box.focus();
  };
  document.querySelector("header form").onsubmit = () => (leaving = true);
  if ($("older")) {
    $("older").onclick = (event) => {
      event.preventDefault();
      loadOlder();
    };
  }
  log.onscroll = () => {
    following = atBottom() || (following && log.scrollTop >= top); // it may just have shrunk
    top = log.scrollTop;
    if (following) showUnseen((unseen = 0));
    if (log.scrollTop < 200 && !$("older")?.dataset.failed) loadOlder();
  };
  new ResizeObserver(() => following && toBottom()).observe(log);
  window.onstorage = ({ key, newValue }) => {
    if (key?.startsWith(mine) && !newValue) settle({ key: key.slice(mine.length) }); // in another tab
  };
  window.ononline = connectNow;
  window.onoffline = drop;
  document.onvisibilitychange = () => {
    if (document.hidden) return;
    unread = 0;
    document.title = title;
    connectNow();
  };
}
