"""What the tests are made with: a chat, its databases, people, and pages in a browser."""

import asyncio
import contextlib
import functools
import importlib.resources
import json
import os
import random
import re
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import pymongo
import pytest
from browsers import NO_BROWSER, Driven, browser, need
from faults import PATIENCE, Mongo, free_port
from playwright.async_api import Error as PageError
from playwright.async_api import expect

HERE = Path(__file__).resolve().parent.parent
SETTINGS = {"MONGODB_URI", "SECRET_KEY", "HOST", "PORT", "HTTPS"}
KEY = "a secret key for tests only"
PASSWORD = "correct horse battery"
TEXT = "a text that no log may hold"
LONGEST = "\x01" * 2000  # the longest message in JSON, where each character takes six bytes
expect.set_options(timeout=PATIENCE * 1000)


def asynchronous(test, run_in=asyncio):
    """Run a test that is a coroutine, in an event loop of its own, for 150 seconds at most."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        run_in.run(asyncio.wait_for(test(*args, **kwargs), 150))

    return run


async def together(**scenarios):
    """Run what mostly waits at the same time. One that fails leaves the others alone."""
    results = await asyncio.gather(*scenarios.values(), return_exceptions=True)
    failed = {n: e for n, e in zip(scenarios, results, strict=True) if isinstance(e, Exception)}
    if failed:
        raise ExceptionGroup(", ".join(failed), list(failed.values()))


class Chat:
    """A process of the chat, on any free port. Its log is checked when the `with` block ends.

    The settings become environment variables. `limits` are constants of the module with the
    source of another value, and `prelude` is source that runs after `import chat`. So a test
    can lower a limit, or make a mistake on purpose, and still run the real program.
    """

    def __init__(self, folder=HERE, command=None, limits=None, prelude="", **settings):
        self.folder, self.command = folder, command or [sys.executable, "chat.py"]
        if limits or prelude:
            source = ["import chat", "from datetime import timedelta", prelude]
            for name, value in (limits or {}).items():
                source += [f"assert hasattr(chat, {name!r})", f"chat.{name} = {value}"]
            self.command = [sys.executable, "-c", "\n".join([*source, "chat.main()"])]
        env = {name: value for name, value in os.environ.items() if name not in SETTINGS}
        self.env = env | {"SECRET_KEY": KEY, "PORT": "0"} | settings
        self.printed = []  # all lines, of all runs
        self.process = self.url = self.database = None

    def __exit__(self, kind, *_):
        self.kill()
        if kind is None:
            self.check_log()
        else:
            print("The chat's log:", self.log(), sep="\n")

    async def __aenter__(self):
        return await asyncio.to_thread(self.start)  # a proxy in this event loop goes on

    async def __aexit__(self, *raised):
        await asyncio.to_thread(self.__exit__, *raised)

    def spawn(self):
        """Start the process, without waiting for it to listen."""
        self.started, self.listening = threading.Event(), False
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        options |= {"text": True, "errors": "replace", "cwd": self.folder, "env": self.env}
        self.process = subprocess.Popen(self.command, **options)
        self.reader = threading.Thread(target=self.read_log, daemon=True)
        self.reader.start()
        return self

    def read_log(self):
        """Collect what the process prints, until it ends: a full pipe would block it."""
        for line in self.process.stdout:
            self.printed.append(line)
            if "mongodb://" in line:
                self.database = re.search(r"mongodb://\S+", line)[0]
            if found := re.search(r"http://[^ ]*:(\d+)", line):
                self.url, self.env["PORT"] = f"http://127.0.0.1:{found[1]}", found[1]
                self.listening = True
                self.started.set()
        self.started.set()

    def start(self):
        """Start the chat and wait for the line with its address. Later it keeps its port."""
        self.spawn().started.wait(PATIENCE)
        if not self.listening:
            self.kill()
            raise AssertionError("the chat did not start: " + self.log())
        return self

    __enter__ = start

    def wait(self, seconds):
        """Wait so many seconds at most for the process to end: its exit status."""
        status = self.process.wait(seconds)
        self.reader.join(PATIENCE)
        return status

    async def end(self, number, seconds):
        """Send a signal; the process must end within so many seconds: its exit status."""
        self.process.send_signal(number)
        return await asyncio.to_thread(self.wait, seconds)

    def kill(self):
        if self.process:
            self.process.kill()
            self.wait(PATIENCE)
            self.process.stdout.close()

    def log(self):
        return "".join(self.printed)

    def check_log(self):
        """Nothing that a client or a database does leaves a traceback, or a secret, in the log."""
        for words in ("Traceback", "never retrieved", "never awaited", TEXT, PASSWORD, KEY):
            assert words not in self.log(), self.log()


@pytest.fixture(scope="session")
def mongo(tmp_path_factory):
    """A function that makes connection strings, each of a database of its own."""
    made = []

    def name():
        made.append("test_" + secrets.token_hex(4))
        return made[-1]

    if given := os.environ.get("MONGODB_URI"):
        parts = urlsplit(given)
        yield lambda: parts._replace(path="/" + name()).geturl()
        with pymongo.MongoClient(given) as client:
            for each in made:
                client.drop_database(each)
    else:
        with Mongo(tmp_path_factory.mktemp("mongo")) as server:
            yield lambda: server.uri(name())


@pytest.fixture(scope="session")
def replica_set(mongo, tmp_path_factory):
    """Like `mongo`, for several processes. A standalone MongoDB cannot connect those."""
    with pymongo.MongoClient(mongo()) as client:
        connects = {"setName", "msg"} & client.admin.command("hello").keys()
    if connects:
        yield mongo
    else:
        with Mongo(tmp_path_factory.mktemp("replica-set")) as server:
            yield lambda: server.uri("test_" + secrets.token_hex(4))


@pytest.fixture(scope="module")
def chat(mongo):
    """One chat for all tests that do not break it."""
    with Chat(MONGODB_URI=mongo()) as it:
        yield it


@pytest.fixture(scope="module")
def busy_chat(mongo):
    """One for tests that write very much, which others would have to read."""
    uri = mongo()
    history_of(uri, 200)
    with Chat(MONGODB_URI=uri) as it:
        yield it


@pytest.fixture(scope="module")
def three_chats(replica_set):
    """Three processes on one database, each in a time zone of its own."""
    uri, zones = replica_set(), ("UTC", "Asia/Tokyo", "America/New_York")
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(Chat(MONGODB_URI=uri, TZ=zone)) for zone in zones]


def copy_house(folder):
    """Copy what the chat needs into a folder of its own, for its local database."""
    for name in ("chat.py", "templates", "static"):
        copy = shutil.copytree if (HERE / name).is_dir() else shutil.copy
        copy(HERE / name, folder / name)
    return folder


@pytest.fixture
def house(tmp_path):
    """A copy of the chat."""
    return copy_house(tmp_path)


class Person:
    """Somebody with a cookie jar, and a WebSocket whose events are kept in lists."""

    def __init__(self, chat, login=None, address="127.0.0.1"):
        self.chat, self.login = chat, login or "u" + secrets.token_hex(5)
        self.address = address, 0  # where this person's requests come from
        self.seen, self.errors, self.others = [], [], []
        self.own = {}  # the person's own messages among the seen ones, by their keys
        self.ws = self.reading = None

    async def __aenter__(self):
        connector = aiohttp.TCPConnector(limit=0, local_addr=self.address)
        jar = aiohttp.CookieJar(unsafe=True)
        self.http = aiohttp.ClientSession(connector=connector, cookie_jar=jar)
        return self

    async def __aexit__(self, *_):
        async with self.http:
            await self.stop_reading()

    def cookie(self):
        """The Cookie header that this person's browser would send."""
        return "; ".join(f"{each.key}={each.value}" for each in self.http.cookie_jar)

    async def ask(self, path, method="GET", **options):
        """Send a request. Whatever is asked, the answer must look like this site's own."""
        options = {"allow_redirects": False} | options
        async with self.http.request(method, self.chat.url + path, **options) as answer:
            text = await answer.text()
        check_headers(answer.headers)
        if not path.startswith("/static/"):
            assert answer.headers["Cache-Control"] == "no-store", path
            if answer.status >= 400 and method != "HEAD":
                assert '<link rel="stylesheet"' in text, path
        assert "Traceback" not in text
        return answer

    async def form(self, path, login=None, password=PASSWORD, **options):
        fields = {"login": self.login if login is None else login, "password": password}
        return await self.ask(path, "POST", data=fields, **options)

    async def sign_up(self):
        answer = await self.form("/signup")
        assert answer.status == 303, await answer.text()
        return self

    def open(self, after="new", **options):
        """The WebSocket, for what comes after a message; or for new messages only."""
        query = "" if after == "new" else f"?after={after}"
        return self.http.ws_connect(f"{self.chat.url}/ws{query}", max_msg_size=0, **options)

    async def connect(self, after=None):
        """Open the WebSocket after what was seen, and read it in the background."""
        await self.stop_reading()
        if after is None:
            after = self.seen[-1]["id"] if self.seen else 0
        self.ws = await self.open(after)
        self.others = []
        self.reading = asyncio.create_task(self.read())
        return self

    async def read(self):
        lists = {"message": self.seen, "error": self.errors}
        async for frame in self.ws:
            if frame.type is aiohttp.WSMsgType.ERROR:
                return  # the connection was cut
            for event in json.loads(frame.data):
                lists.get(event["type"], self.others).append(event)
                if event["type"] == "message" and event["user"] == self.login:
                    self.own[event["key"]] = event

    async def stop_reading(self):
        """End the background task. What went wrong in it fails the test."""
        if self.reading:
            self.reading.cancel()
            [result] = await asyncio.gather(self.reading, return_exceptions=True)
            if isinstance(result, Exception):
                raise result

    async def closed(self):
        """Wait until the connection is closed: the close code."""
        async with asyncio.timeout(PATIENCE):
            await self.reading
        return self.ws.close_code

    async def say(self, text, key=None):
        await self.ws.send_json({"text": text, "key": key or secrets.token_hex(8)})

    async def post(self, text=TEXT, key=None):
        """Say something, and wait until it is shown: how many seconds that took."""
        key, start = key or secrets.token_hex(8), time.monotonic()
        await self.say(text, key)
        await self.until(lambda: key in self.own)
        return time.monotonic() - start

    async def until(self, condition, seconds=PATIENCE):
        """Wait until something is so."""
        end = time.monotonic() + seconds
        while not condition():
            told = f"{self.login}: {len(self.seen)} seen, {self.errors[-2:]}, {self.others[-4:]}"
            assert time.monotonic() < end, told
            await asyncio.sleep(0.02)

    def online(self):
        """Who is online, from the events; nobody joins twice, or leaves without having joined."""
        first, *changes = self.others
        assert first["type"] == "online" and first["users"] == sorted(set(first["users"]))
        users = set(first["users"])
        for each in changes:
            assert each["type"] == ("left" if each["user"] in users else "joined"), self.others
            users ^= {each["user"]}
        return users

    def cut_off(self):
        """Lose the connection without a word."""
        if self.ws and not self.ws.closed:
            self.ws.get_extra_info("socket").shutdown(socket.SHUT_RDWR)

    async def keep_talking(self, sent, pause):
        """Send at random moments; come back when cut off; send again what got no answer."""
        waiting = {}
        while True:
            try:
                await self.connect()
                for key, text in waiting.items():
                    await self.say(text, key)
                while not self.ws.closed:
                    key, text = secrets.token_hex(8), f"text {len(sent)}"
                    waiting[key] = sent[self.login, key] = text
                    await self.say(text, key)
                    await asyncio.sleep(random.uniform(0, pause))
                    waiting = {key: waiting[key] for key in waiting if key not in self.own}
            except (aiohttp.ClientError, OSError):
                await asyncio.sleep(random.uniform(0, 0.3))


@contextlib.asynccontextmanager
async def people(chat, *logins):
    """Several people who have signed up."""
    async with contextlib.AsyncExitStack() as stack:
        all_of_them = [await stack.enter_async_context(Person(chat, each)) for each in logins]
        for each in all_of_them:
            await each.sign_up()
        yield all_of_them


@contextlib.asynccontextmanager
async def chat_behind(proxy, logins=2, limits=None, uri=None):
    """A chat whose database is behind a proxy, and people who are connected."""
    async with (
        Chat(MONGODB_URI=uri or proxy.uri, limits=limits) as chat,
        people(chat, *[None] * logins) as them,
    ):
        for each in them:
            await each.connect()
        yield chat, them


def check_headers(headers):
    """What every response has: a page, a redirect, an error, a WebSocket's 101."""
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy and "*" not in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    for name in ("Referrer-Policy", "Cross-Origin-Opener-Policy", "Cross-Origin-Resource-Policy"):
        assert headers[name] == "same-origin"


def stored(uri):
    """What the database holds: (number, user, key, text) of each message, in order."""
    with pymongo.MongoClient(uri) as client:
        found = client.get_default_database().messages.find()
        return sorted((each["_id"], each["user"], each["key"], each["text"]) for each in found)


def ids(events):
    """The numbers of the messages among some events."""
    return [each["id"] for each in events if each["type"] == "message"]


async def history(person):
    """All messages that the pages of /messages hold, from the first."""
    messages, before = [], 10**9
    while page := (await (await person.ask(f"/messages?before={before}")).json())["messages"]:
        messages, before = page + messages, page[0]["id"]
    return messages


async def send_again(person, texts):
    """Send messages again, as a page does, until all of them are shown."""
    end, missing = time.monotonic() + PATIENCE, texts.keys()
    while missing:
        assert time.monotonic() < end, (missing, person.errors[-2:])
        for key in sorted(missing):
            await person.say(texts[key], key)
        with contextlib.suppress(AssertionError):
            await person.until(lambda: texts.keys() <= person.own.keys(), 1)
        missing = texts.keys() - person.own.keys()


async def everything_once(reader, keys):
    """The reader has seen all these messages, each once, as the history has them."""
    await reader.until(lambda: reader.seen and reader.seen[-1]["key"] == keys[-1])
    assert reader.seen == await history(reader)
    assert ids(reader.seen) == [*range(1, len(keys) + 1)]
    assert sorted(each["key"] for each in reader.seen) == sorted(keys)


@contextlib.asynccontextmanager
async def talking(them, sent, pause):
    """People who write all the time, and come back when they are cut off."""
    talks = [asyncio.create_task(each.keep_talking(sent, pause)) for each in them]
    yield
    for each in talks:
        each.cancel()
    for result in await asyncio.gather(*talks, return_exceptions=True):
        assert isinstance(result, asyncio.CancelledError), result


async def sends_all_again(person, sent):
    """Somebody sends all messages once more, with their keys, and waits until they are shown."""
    await person.connect()
    own, person.own = (
        {key: text for (login, key), text in sent.items() if login == person.login},
        {},
    )
    for key, text in own.items():
        await person.say(text, key)
    await person.until(lambda: person.own.keys() == own.keys())


def memory_of(chat):
    """The megabytes of memory that a chat uses; 0 where the system does not tell."""
    status = Path(f"/proc/{chat.process.pid}/status")
    found = re.search(r"VmRSS:\s*(\d+) kB", status.read_text() if status.exists() else "")
    return int(found[1]) / 1000 if found else 0


async def reads_to_the_end(clients, firsts, code):
    """Each of these clients gets the messages from its first one to number 32, and this code."""
    results = await asyncio.gather(*(asyncio.to_thread(list, each.events()) for each in clients))
    for first, client, events in zip(firsts, clients, results, strict=True):
        with client:
            assert client.close_code == code and ids(events) == list(range(first, 33))


async def write_without_pause(person):
    """Write until the connection ends: how many messages were sent."""
    await person.connect()
    with contextlib.suppress(OSError, aiohttp.ClientError):
        for number in range(1_000_000):
            await person.say(TEXT, f"{number}")
            await asyncio.sleep(0)
    return number + 1


def each_once(messages):
    """The same without the repeated ones, each at its first place."""
    return list({each["id"]: each for each in messages}.values())


async def is_not_held_up(person, seconds=2):
    """Somebody's messages are shown in time, whatever happens meanwhile."""
    await asyncio.sleep(0.5)
    assert statistics.median([await person.post() for _ in range(5)]) < seconds
    assert not person.errors


# ---------------------------------------------------------------------------
# Pages in a browser
# ---------------------------------------------------------------------------

AXE = importlib.resources.files("axe_playwright_python").joinpath("axe.min.js").read_text()
# What a browser says by itself when an answer is an error or the server is gone, and what the
# tests break on purpose.
EXPECTED = ("Failed to load", "WebSocket connection to", "Error: broken on purpose", "SyntaxError")
MESSAGES = "#messages .text"
LOG, BOX = "document.getElementById('log')", "document.getElementById('text')"
JUMP, MARK_TOP = "document.getElementById('jump')", "mark.getBoundingClientRect().top"
PEOPLE = "Number(document.querySelector('.count')?.textContent)"

# The tests of the page share an event loop, and so one Chromium: to start it takes a second.
PAGES = asyncio.Runner()


def on_pages(test):
    """Run a test of a page, where there is a browser: see .ci/browsers.py."""

    @functools.wraps(test)
    def run(*args, chromium, **kwargs):
        need(chromium, NO_BROWSER)
        asynchronous(test, run_in=PAGES)(*args, chromium=chromium, **kwargs)

    return run


@pytest.fixture(scope="module")
def chromium(request):
    stack = contextlib.AsyncExitStack()
    yield PAGES.run(stack.enter_async_context(browser(request)))
    PAGES.run(stack.aclose())


@contextlib.asynccontextmanager
async def tab(it, chat, login=None, sign_up=True, script="", **options):
    """A page in a profile of its own, signed up; it must not complain about anything."""
    context = await it.new_context(**{"locale": "en-GB", "timezone_id": "Asia/Tokyo"} | options)
    await context.add_init_script(script)
    page = await context.new_page()
    complaints = []
    context.on("weberror", lambda error: complaints.append(str(error.error)))
    context.on(
        "console", lambda line: line.type in ("error", "warning") and complaints.append(line.text)
    )
    context.on("request", lambda each: each.url.startswith(chat.url) or complaints.append(each.url))
    page.login = login or "u" + secrets.token_hex(5)
    if sign_up:
        await page.goto(chat.url + "/signup")
        await fill_form(page, page.login)
        await page.wait_for_url(chat.url + "/")
        if options.get("java_script_enabled", True):
            await becomes_true(page, f"{PEOPLE} > 0")
    yield page
    assert [each for each in complaints if not each.startswith(EXPECTED)] == []
    await context.close()


@contextlib.asynccontextmanager
async def page_of(it, uri, count=0, **options):
    """A chat of its own with so many messages, a page that shows it, and the texts."""
    wanted = history_of(uri, count) if count else []
    async with Chat(MONGODB_URI=uri) as chat, tab(it, chat, **options) as page:
        yield chat, page, wanted


async def fill_form(page, login, password=PASSWORD):
    await page.get_by_label("Username").fill(login)
    await page.get_by_label("Password").fill(password)
    await page.keyboard.press("Enter")


async def type_in(page, *texts):
    for text in texts:
        await page.locator("#text").fill(text)
        await page.keyboard.press("Enter")


async def texts(page):
    return await page.locator(MESSAGES).all_text_contents()


async def shows_last(page, text):
    await expect(page.locator(MESSAGES).last).to_have_text(text)


async def becomes_true(page, expression, seconds=PATIENCE):
    """Wait until JavaScript says so; not wait_for_function(), which the page's CSP forbids."""
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(PageError):  # there may be another page now
            if await page.evaluate(expression):
                return
        assert time.monotonic() < end, expression
        await asyncio.sleep(0.05)


async def has_no_barriers(page, schemes=("light", "dark"), part="document"):
    """axe-core finds nothing, in light and in dark."""
    for scheme in schemes:
        await page.emulate_media(color_scheme=scheme)
        await page.evaluate(AXE)
        found = await page.evaluate(f"axe.run({part}).then(result => result.violations)")
        assert [(each["id"], each["nodes"][0]["html"]) for each in found] == [], scheme


def history_of(uri, count):
    """Put messages into a database before its chat starts: their texts."""
    now = datetime.now(UTC)
    texts = [f"message {number} of usual length" for number in range(1, count + 1)]
    with pymongo.MongoClient(uri) as client:
        messages = client.get_default_database("chat").messages
        # The local database takes seconds to make this index for messages that are there.
        messages.create_index(["user", "key"], unique=True)
        messages.insert_many(
            {"_id": number, "user": "anna", "key": f"{number}", "text": text, "time": now}
            for number, text in enumerate(texts, 1)
        )
    return texts


class Wires:
    """The WebSockets of a page, which a test can cut without a word, or speak through."""

    async def through(self, page):
        self.pairs, self.dead = [], False
        await page.route_web_socket(re.compile("/ws"), self.open)
        await page.reload()
        await becomes_true(page, f"{PEOPLE} > 0")
        return self

    def open(self, wire):
        self.pairs.append([wire] if self.dead else [wire, wire.connect_to_server()])

    def cut(self):
        for end in self.pairs[-1]:
            end.on_message(lambda _: None)

    def send(self, *events):
        self.pairs[-1][0].send(json.dumps(events))


def message(number, text):
    event = {"type": "message", "id": number, "key": f"k{number}", "user": "somebody"}
    return event | {"text": text, "time": "2030-01-01T00:00:00.000+00:00"}


@contextlib.asynccontextmanager
async def page_in(engine, chromium, folder, chat):
    """A page in one of the engines, in dark."""
    if engine == "chromium":
        async with tab(chromium, chat, sign_up=False, color_scheme="dark") as page:
            yield page
        return
    async with Driven(engine, folder, free_port()) as page:
        yield page


async def press(page, *keys):
    for key in keys:
        await (page.keyboard.press if key[0].isupper() else page.keyboard.type)(key)


async def fill_in(page):
    await becomes_true(page, "document.activeElement.name === 'login'")
    await press(page, "अनु", "Tab", PASSWORD, "Enter")


async def has(page, count, expression="true"):
    await becomes_true(page, f"document.querySelectorAll('{MESSAGES}').length === {count}")
    await becomes_true(page, expression)
