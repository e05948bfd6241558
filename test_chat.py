"""Every promise of the chat, checked from outside, and the tutorial against the code.

``pytest -n 2`` runs it all, two tests at a time: against real processes of the chat, a database
that speaks MongoDB's protocol (SecantusDB, or the one that MONGODB_URI names), and real browsers.
``python test_chat.py`` puts the tutorial's line numbers right, and builds its page.
"""

import ast
import asyncio
import contextlib
import functools
import http.client
import http.server
import importlib.resources
import json
import os
import random
import re
import secrets
import select
import shutil
import signal
import socket
import stat
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from importlib import metadata
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import aiohttp
import bson
import pymongo
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from playwright.async_api import Error as PageError
from playwright.async_api import async_playwright, expect

HERE = Path(__file__).resolve().parent
SETTINGS = {"MONGODB_URI", "SECRET_KEY", "HOST", "PORT", "HTTPS"}
KEY = "a secret key for tests only"
PASSWORD = "correct horse battery"
TEXT = "a text that no log may hold"
LONGEST = "\x01" * 2000  # the longest message in JSON, where each character takes six bytes

# Seconds. Every wait has a limit, and this one is far longer than any wait should take.
PATIENCE = 30
expect.set_options(timeout=PATIENCE * 1000)


def asynchronous(test, run_in=asyncio):
    """Run a test that is a coroutine, in an event loop of its own, for 150 seconds at most."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        async def limited():
            async with asyncio.timeout(150):
                await test(*args, **kwargs)

        run_in.run(limited())

    return run


# ---------------------------------------------------------------------------
# The parts: a chat, a database, a proxy, people
# ---------------------------------------------------------------------------


def free_port():
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        return it.getsockname()[1]


class Chat:
    """A process of the chat, on any free port. Its log is checked when the `with` block ends.

    The settings become environment variables. `limits` are constants of the module with the
    source of another value, and `prelude` is source that runs after `import chat`. So a test
    can lower a limit, or make a mistake on purpose, and still run the real program.
    """

    def __init__(self, folder=HERE, command=None, limits=None, prelude="", **settings):
        self.folder = folder
        self.command = command or [sys.executable, "chat.py"]
        if limits or prelude:
            source = ["import chat", "from datetime import timedelta", prelude]
            for name, value in (limits or {}).items():
                source += [f"assert hasattr(chat, {name!r})", f"chat.{name} = {value}"]
            self.command = [sys.executable, "-c", "\n".join([*source, "chat.main()"])]
        env = {name: value for name, value in os.environ.items() if name not in SETTINGS}
        self.env = env | {"SECRET_KEY": KEY, "PORT": "0"} | settings
        self.printed = []  # all lines, of all runs
        self.process = self.url = self.database = None

    def __enter__(self):
        return self.start()

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
        self.process = subprocess.Popen(
            self.command,
            cwd=self.folder,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
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
            self.process.wait()
            self.reader.join(PATIENCE)
            self.process.stdout.close()

    def log(self):
        return "".join(self.printed)

    def check_log(self):
        """Nothing that a client or a database does leaves a traceback, or a secret, in the log."""
        for words in ("Traceback", "never retrieved", "never awaited", TEXT, PASSWORD, KEY):
            assert words not in self.log(), self.log()


class Mongo:
    """A SecantusDB in a process of its own, to be killed and started again."""

    def __init__(self, folder, *options):
        self.port, self.folder, self.options = free_port(), folder, options

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.kill()

    def start(self):
        command = [sys.executable, "-m", "secantus", "--port", str(self.port), "--sync-on-commit"]
        self.process = subprocess.Popen(
            [*command, "--storage-path", self.folder, *self.options], stderr=subprocess.DEVNULL
        )
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return self
            time.sleep(0.05)
        raise AssertionError("the database did not start")

    def kill(self):
        self.process.kill()
        self.process.wait()

    def uri(self, name, port=None):
        return f"mongodb://127.0.0.1:{port or self.port}/{name}?directConnection=true"


@pytest.fixture(scope="session", autouse=True)
def names_on_a_terminal(request):
    """A run takes minutes: somebody who watches it sees the names of the tests, not dots."""
    if request.config.pluginmanager.get_plugin("terminalreporter").isatty:
        request.config.option.verbose = max(request.config.option.verbose, 1)


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
def three_chats(replica_set):
    """Three processes on one database, one of them in another time zone."""
    uri = replica_set()
    with (
        Chat(MONGODB_URI=uri) as first,
        Chat(MONGODB_URI=uri) as second,
        Chat(MONGODB_URI=uri, TZ="Asia/Tokyo") as third,
    ):
        yield first, second, third


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


class Command(NamedTuple):
    """What the chat asks the database: `insert`, `messages`, and all of it."""

    name: str
    collection: str
    document: dict


class Proxy:
    """A TCP proxy before a real MongoDB. It can be cut, opened again, silent and slow.

    It understands MongoDB's wire protocol: `commands` has all that was asked, and a function
    `answer(command, reply)` may return another reply; or None: the reply is lost, and with it
    the connection. https://www.mongodb.com/docs/manual/reference/mongodb-wire-protocol/
    """

    HEADER = struct.Struct("<iiii")  # length, number, the number that it answers, kind
    REPLY, QUERY, MESSAGE = 1, 2004, 2013
    CHECKSUM, MORE_TO_COME = 1, 2

    def __init__(self, uri):
        self.parts, self.port = urlsplit(uri), 0
        self.delay, self.silent, self.answer = 0, False, None  # seconds for each message
        self.commands, self.pumps = [], set()

    async def __aenter__(self):
        await self.open()
        user, at, _ = self.parts.netloc.rpartition("@")
        self.uri = self.parts._replace(netloc=f"{user}{at}127.0.0.1:{self.port}").geturl()
        return self

    async def __aexit__(self, *_):
        await self.cut()

    def discovered_uri(self):
        """The same for a driver that asks who the members of the replica set are."""
        return self.uri.replace("directConnection=true", "directConnection=false")

    async def open(self):
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", self.port)
        self.port = self.server.sockets[0].getsockname()[1]

    async def cut(self):
        self.server.close()
        for each in self.pumps:
            each.cancel()
        await asyncio.sleep(0.05)

    async def serve(self, reader, writer):
        try:
            target = self.parts.hostname, self.parts.port or 27017
            there, here = await asyncio.open_connection(*target)
        except OSError:
            return writer.close()
        asked = {}  # the commands without an answer, by their numbers
        pumps = [self.ask(reader, here, asked), self.reply(there, writer, asked)]
        pumps = {asyncio.create_task(each) for each in pumps}
        self.pumps |= pumps
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        for each in pumps:
            each.cancel()
        self.pumps -= pumps
        for each in (writer, here):
            each.close()

    async def ask(self, reader, writer, asked):
        with contextlib.suppress(OSError, EOFError):
            while head := await reader.readexactly(16):
                length, number, _, kind = self.HEADER.unpack(head)
                body = await reader.readexactly(length - 16)
                asked[number] = self.parse(kind, body)
                self.commands.append(asked[number])
                await self.wait()
                writer.write(head + body)

    async def reply(self, reader, writer, asked):
        with contextlib.suppress(OSError, EOFError):
            while head := await reader.readexactly(16):
                length, number, answered, kind = self.HEADER.unpack(head)
                body = await reader.readexactly(length - 16)
                command = asked.pop(answered)
                if kind == self.MESSAGE and body[0] & self.MORE_TO_COME:
                    asked[number] = command  # what comes next will answer this one
                start = 20 if kind == self.REPLY else 5  # there the document begins
                if (reply := self.change(command, bson.decode(body[start:]))) is None:
                    return
                body = body[:start] + bson.encode(reply)
                await self.wait()
                writer.write(self.HEADER.pack(16 + len(body), number, answered, kind) + body)

    def parse(self, kind, body):
        """The command in a message: a document, and lists of documents that belong into it."""
        if kind == self.QUERY:  # the very first question: flags, a name, two numbers, a document
            document = bson.decode(body[body.index(0, 4) + 9 :])
        else:
            document, at = {}, 4
            end = len(body) - (4 if body[0] & self.CHECKSUM else 0)
            while at < end:
                section, size = body[at], int.from_bytes(body[at + 1 : at + 5], "little")
                content = body[at + 1 : at + 1 + size]
                if section == 0:
                    document |= bson.decode(content)
                else:
                    name, _, documents = content[4:].partition(b"\0")
                    document[name.decode()] = bson.decode_all(documents)
                at += 1 + size
        name = next(iter(document))
        return Command(name, document.get("collection", document[name]), document)

    def change(self, command, reply):
        if "hosts" in reply:  # the drivers go where a replica set says that its members are
            here = f"127.0.0.1:{self.port}"
            reply |= {"hosts": [here], "passives": [], "me": here, "primary": here}
        return self.answer(command, reply) if self.answer else reply

    async def wait(self):
        await asyncio.sleep(self.delay)
        while self.silent:  # what waits meanwhile goes on later, as in a real network
            await asyncio.sleep(0.05)


class Person:
    """Somebody with a cookie jar, and a WebSocket whose events are kept in lists."""

    def __init__(self, chat, login=None):
        self.chat, self.login = chat, login or "u" + secrets.token_hex(5)
        self.seen, self.errors, self.others = [], [], []
        self.own = {}  # the person's own messages among the seen ones, by their keys
        self.ws = self.reading = None

    async def __aenter__(self):
        self.http = aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True))
        return self

    async def __aexit__(self, *_):
        try:
            await self.stop_reading()
        finally:
            await self.http.close()

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

    async def keep_talking(self, rng, sent, prefix, pause=0.05):
        """Send at random moments; come back when cut off; send again what got no answer."""
        waiting, number = {}, 0
        while True:
            try:
                await self.connect()
                for key, text in waiting.items():
                    await self.say(text, key)
                while not self.ws.closed:
                    number += 1
                    key, text = f"{prefix} {self.login} {number}", f"text {number}"
                    waiting[key] = sent[self.login, key] = text
                    await self.say(text, key)
                    await asyncio.sleep(rng.uniform(0, pause))
                    waiting = {key: waiting[key] for key in waiting if key not in self.own}
            except (aiohttp.ClientError, OSError):
                await asyncio.sleep(rng.uniform(0, 0.3))


@contextlib.asynccontextmanager
async def people(chat, *logins):
    """Several people who have signed up."""
    async with contextlib.AsyncExitStack() as stack:
        all_of_them = [await stack.enter_async_context(Person(chat, each)) for each in logins]
        for each in all_of_them:
            await each.sign_up()
        yield all_of_them


def check_headers(headers):
    """What every response has: a page, a redirect, an error, a WebSocket's 101."""
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy and "*" not in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "same-origin"
    assert headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"


def stored(uri):
    """What the database holds: (number, user, key, text) of each message, in order."""
    with pymongo.MongoClient(uri) as client:
        found = client.get_default_database().messages.find()
        return sorted((each["_id"], each["user"], each["key"], each["text"]) for each in found)


def shown(person):
    """What a person has seen, in the form of stored()."""
    return [(each["id"], each["user"], each["key"], each["text"]) for each in person.seen]


def ids(events):
    """The numbers of the messages among some events."""
    return [each["id"] for each in events if each["type"] == "message"]


async def history(person):
    """All messages that the pages of /messages hold, from the first."""
    messages, before = [], 10**9
    while page := (await (await person.ask(f"/messages?before={before}")).json())["messages"]:
        messages, before = page + messages, page[0]["id"]
    return messages


TEXT_FRAME, CLOSE_FRAME, PING_FRAME, PONG_FRAME = 1, 8, 9, 10


class RawClient:
    """A WebSocket made of a plain socket: it reads when a test tells it to, and at no other time.

    With `small` the kernel keeps little for it, so that what it leaves unread waits in the chat.
    """

    def __init__(self, person, after="new", small=False):
        self.socket, self.received, self.rate = socket.socket(), bytearray(), None
        self.socket.settimeout(PATIENCE)
        if small:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            with contextlib.suppress(OSError):  # macOS accepts it only later
                self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
        self.socket.connect(("127.0.0.1", urlsplit(person.chat.url).port))
        query = "" if after == "new" else f"?after={after}"
        self.socket.sendall(handshake(person, query))
        while b"\r\n\r\n" not in self.received:
            self.receive()
        head, _, self.received = self.received.partition(b"\r\n\r\n")
        status, *lines = head.decode().split("\r\n")
        assert status.startswith("HTTP/1.1 101 "), status
        check_headers(dict(line.split(": ", 1) for line in lines))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def receive(self):
        """Take what has come, at `rate` bytes a second if one is set."""
        data = self.socket.recv(4096 if self.rate else 65536)
        if not data:
            raise EOFError
        if self.rate:
            time.sleep(len(data) / self.rate)
        self.received += data

    def take(self, size):
        while len(self.received) < size:
            self.receive()
        taken, self.received = bytes(self.received[:size]), self.received[size:]
        return taken

    def frames(self):
        """The frames that come: (kind, content). The last one is the close frame."""
        kind = None
        while kind != CLOSE_FRAME:
            first, size = self.take(2)
            if size > 125:
                size = int.from_bytes(self.take(2 if size == 126 else 8), "big")
            kind, content = first & 15, self.take(size)
            yield kind, content
            if kind == PING_FRAME:
                self.socket.sendall(client_frame(content, PONG_FRAME))

    def events(self):
        """The events that come until the close frame."""
        for kind, content in self.frames():
            if kind == TEXT_FRAME:
                yield from json.loads(content)
            elif kind == CLOSE_FRAME:
                self.close_code = int.from_bytes(content[:2], "big")

    def events_to_the_end(self):
        with self:
            return list(self.events())

    def numbers(self, count, found=None):
        """The numbers of the messages that come next. Other threads may watch the list `found`."""
        found = [] if found is None else found
        for event in self.events():
            found += ids([event])
            if len(found) == count:
                return found
        raise EOFError


def handshake(person, query=""):
    """The request that opens a WebSocket."""
    lines = [
        f"GET /ws{query} HTTP/1.1",
        "Host: 127.0.0.1",
        f"Cookie: {person.cookie()}",
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    ]
    return "\r\n".join([*lines, "", ""]).encode()


def client_frame(content, kind=TEXT_FRAME):
    """A short frame. Clients have to mask theirs; a mask of zeros leaves the content as it is."""
    assert len(content) < 126
    return bytes([0x80 | kind, 0x80 | len(content)]) + bytes(4) + content


@contextlib.contextmanager
def flooding(person, frame, reads=True, connections=1):
    """Send one frame again and again, as fast as the chat takes it, from other threads."""
    ended, sent = threading.Event(), Counter()

    def flood():
        while not ended.is_set():  # one that does not read is cut off: it comes back
            with contextlib.suppress(OSError, EOFError), RawClient(person) as client:
                client.socket.setblocking(False)
                rest = frames = memoryview(frame * (65536 // len(frame)))
                while not ended.is_set():
                    watched = [client.socket]
                    can_read, can_write, _ = select.select(watched * reads, watched, [], 0.1)
                    if can_read and not client.socket.recv(2**20):
                        break
                    if can_write:
                        size = client.socket.send(rest)
                        rest = rest[size:] or frames
                        sent["bytes"] += size

    with ThreadPoolExecutor(connections) as pool:
        floods = [pool.submit(flood) for _ in range(connections)]
        try:
            yield
        finally:
            ended.set()
    for each in floods:
        each.result()
    assert sent.total() > 10_000  # otherwise it was no flood


class Twin(Person):
    """One more connection of somebody, with lists of its own."""

    def __init__(self, person):
        super().__init__(person.chat, person.login)
        self.http = person.http


@contextlib.asynccontextmanager
async def twins(person, count):
    them = [Twin(person) for _ in range(count)]
    await asyncio.gather(*(each.connect("") for each in them))
    yield them
    await asyncio.gather(*(each.stop_reading() for each in them))


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


# ---------------------------------------------------------------------------
# Pages
# ---------------------------------------------------------------------------


@asynchronous
async def test_pages(chat):
    """Each page, for strangers and for somebody who is signed in; HEAD is answered as GET."""
    async with Person(chat) as person:
        for stranger in (True, False):
            if not stranger:
                await person.sign_up()
            for path, anonymous, signed_in in (
                ("/", 303, 200),
                ("/?before=1", 303, 200),
                ("/?before=x", 303, 400),
                ("/messages?before=1", 303, 200),
                ("/messages?before=-5", 303, 200),
                ("/messages?before=" + "9" * 99, 303, 200),
                ("/messages", 303, 400),
                ("/messages?before=", 303, 400),
                ("/messages?before=x", 303, 400),
                ("/messages?before=1_0", 303, 400),
                ("/ws", 401, 400),
                ("/ws?after=x", 401, 400),
                ("/login", 200, 303),
                ("/signup", 200, 303),
                ("/static/chat.css", 200, 200),
                ("/static/none", 404, 404),
                ("/static/%00", 404, 404),
            ):
                for method in ("GET", "HEAD"):
                    answer = await person.ask(path, method)
                    assert answer.status == (anonymous if stranger else signed_in), (method, path)
                    if answer.status == 303:
                        home = "/" if path in ("/login", "/signup") else "/login"
                        assert answer.headers["Location"] == home
            missing = (await person.ask("/nothing")).status
            assert missing in (303, 404) if stranger else missing == 404
        answer = await person.ask("/messages?before=1")
        assert await answer.json() == {"messages": []}
        for after in ("x", "1_0"):
            with pytest.raises(aiohttp.WSServerHandshakeError, match="400"):
                await person.open(after)


@asynchronous
async def test_wrong_methods(chat):
    """They are answered with 405, and with what is allowed."""
    async with people(chat, None) as [person]:
        for path, method, allowed in (
            ("/", "POST", {"GET", "HEAD"}),
            ("/messages", "DELETE", {"GET", "HEAD"}),
            ("/login", "PUT", {"GET", "HEAD", "POST"}),
            ("/logout", "GET", {"POST"}),
        ):
            answer = await person.ask(path, method)
            assert answer.status == 405
            assert {each.strip() for each in answer.headers["Allow"].split(",")} == allowed


def bad_field(page):
    """The name of the one field of a form that is marked as bad."""
    inputs = re.findall("<input[^>]*>", page)
    [bad] = [each for each in inputs if 'aria-invalid="true"' in each]
    return re.search('name="([^"]*)"', bad)[1]


@asynchronous
async def test_sign_up(chat):
    """What a login and a password may be; which logins are the same one."""
    name = secrets.token_hex(3)
    async with Person(chat) as person:
        for login, password, status, field in (
            ("ab", PASSWORD, 400, "login"),
            ("a" * 21, PASSWORD, 400, "login"),
            ("a" * 150, PASSWORD, 400, "login"),
            ("no spaces", PASSWORD, 400, "login"),
            ("a<b>" + name, PASSWORD, 400, "login"),
            ("good_" + name, "7 chars", 400, "password"),
            ("good_" + name, "x" * 201, 400, "password"),
            ("Straße_" + name, "ж" * 200, 303, None),
            ("STRASSE_" + name, PASSWORD, 409, "login"),
            ("ｓｔｒａｓｓｅ_" + name, PASSWORD, 409, "login"),
            ("e\u0301va_" + name, "8 chars!", 303, None),
            ("Éva_" + name, PASSWORD, 409, "login"),
            ("ß" + name[:2], PASSWORD, 303, None),
            ("x" * 14 + name, PASSWORD, 303, None),
        ):
            person.http.cookie_jar.clear()
            answer = await person.form("/signup", login, password)
            assert answer.status == status, login
            if status != 303:
                page = await answer.text()
                assert 'role="alert"' in page and password not in page
                assert bad_field(page) == field
                kept = login[:100].replace("<", "&lt;").replace(">", "&gt;")
                assert f'value="{kept}"' in page
        # Any spelling logs in. The one that was signed up is shown.
        assert (await person.form("/login", "strasse_" + name, "ж" * 200)).status == 303
        assert f"Straße_{name}" in await (await person.ask("/")).text()


@asynchronous
async def test_forms_that_cannot_be_read(chat):
    """Broken forms are their sender's fault; a body may have 64 KiB and no more."""
    form = "application/x-www-form-urlencoded"
    async with people(chat, None) as [person]:
        for data, headers, status in (
            (b"login=\xff&password=\xff", {"Content-Type": form}, 400),
            (b"login=a&password=b", {"Content-Type": f"{form}; charset=nonsense"}, 400),
            (b"login=%2B2AA-&password=b", {"Content-Type": f"{form}; charset=utf-7"}, 400),
            (b"--x\r\nbroken", {"Content-Type": "multipart/form-data; boundary=x"}, 400),
            (b"login=a", {"Content-Type": "multipart/form-data"}, 400),
            (b"login=a&login=b", {"Content-Type": form}, 401),
            (b"password=".ljust(65536, b"x"), {"Content-Type": form}, 401),
            (b"password=".ljust(65537, b"x"), {"Content-Type": form}, 413),
        ):
            answer = await person.ask("/login", "POST", data=data, headers=headers)
            assert answer.status == status, data[:30]
        assert (await person.form("/signup", "x" * 65537)).status == 413
        assert (await person.ask("/logout", "POST", data=b"x" * 65537)).status == 413


@asynchronous
async def test_wrong_passwords_are_counted(three_chats):
    """Ten of them for one login, on all processes together, from one address."""
    async with people(three_chats[0], "A" + secrets.token_hex(4)) as [person]:
        for login in (person.login, "nobody_" + secrets.token_hex(4)):
            for number in range(10):
                person.chat = three_chats[number % 3]
                spelling = login.upper() if number % 2 else login
                answer = await person.form("/login", spelling, "a wrong one")
                page = await answer.text()
                assert answer.status == 401 and bad_field(page) == "password"
                assert 'role="alert"' in page and "a wrong one" not in page
            for person.chat in three_chats:
                # The right password does not help, and nor does an address that is made up.
                forged = {"X-Forwarded-For": "192.0.2.1"}
                answer = await person.form("/login", login, headers=forged)
                assert answer.status == 429 and 200 < int(answer.headers["Retry-After"]) <= 300
                page = await answer.text()
                assert f'value="{login}"' in page and 'role="alert"' in page
                assert PASSWORD not in page and 'name="password"' in page


@asynchronous
async def test_wrong_passwords_sent_at_once(mongo):
    """They are counted one by one, until their time has passed; right ones are not counted."""
    limits = {
        "HASH_QUEUE_MAX": "100",
        "FAILED_LOGINS_MAX": "3",
        "FAILED_LOGINS_WINDOW": "timedelta(seconds=4)",
    }
    async with Chat(MONGODB_URI=mongo(), limits=limits) as chat, people(chat, None) as [person]:
        answers = await asyncio.gather(*(person.form("/login") for _ in range(6)))
        assert [answer.status for answer in answers] == [303] * 6
        wrong = [person.form("/login", password="a wrong one") for _ in range(7)]
        answers = await asyncio.gather(*wrong)
        assert Counter(answer.status for answer in answers) == {401: 3, 429: 4}
        seconds = max(int(each.headers["Retry-After"]) for each in answers if each.status == 429)
        assert 0 < seconds <= 5
        await asyncio.sleep(seconds)
        assert (await person.form("/login")).status == 303


@asynchronous
async def test_passwords_are_hashed_in_a_short_queue(chat):
    """While more than a few wait, the next one is sent away, and is let in soon afterwards."""
    async with people(chat, None) as [person]:
        nobody = [person.form("/login", secrets.token_hex(5)) for _ in range(40)]
        answers = await asyncio.gather(*nobody)
        statuses = Counter(answer.status for answer in answers)
        assert statuses.keys() == {401, 503} and statuses[503] > 10
        for answer in answers:
            if answer.status == 503:
                assert 0 < int(answer.headers["Retry-After"]) < PATIENCE
        await asyncio.sleep(int(answers[-1].headers.get("Retry-After", 0)))
        assert (await person.form("/login")).status == 303


@asynchronous
async def test_unknown_login_takes_the_same_time(chat):
    """Neither the time nor the page tells whether there is such a login."""
    async with people(chat, None) as [person]:
        known, unknown, pages = [], [], set()
        for _ in range(6):
            for login, taken in ((person.login, known), (person.login + "x", unknown)):
                start = time.perf_counter()
                answer = await person.form("/login", login, "a wrong one")
                taken.append(time.perf_counter() - start)
                assert answer.status == 401
                pages.add(re.sub(r'value="\w+"', "", await answer.text()))
        assert len(pages) == 1
        assert 1 / 3 < min(known) / min(unknown) < 3


@asynchronous
async def test_passwords_are_hashed(mongo):
    """Argon2id with 19 MiB and two passes or more, and the password is stored nowhere."""
    uri = mongo()
    async with Chat(MONGODB_URI=uri) as chat, people(chat, None):
        with pymongo.MongoClient(uri) as client:
            db = client.get_default_database()
            everything = str([list(db[name].find()) for name in db.list_collection_names()])
    [(memory, passes)] = re.findall(r"\$argon2id\$v=19\$m=(\d+),t=(\d+),p=1\$", everything)
    assert int(memory) >= 19 * 1024 and int(passes) >= 2
    assert PASSWORD not in everything


@asynchronous
async def test_other_sites_cannot_post(chat):
    """Forms and WebSockets of other origins are refused, and made-up headers ignored."""
    async with people(chat, None) as [person]:
        for origin, status in (
            ("http://evil.example", 403),
            ("null", 403),
            (chat.url.replace("http", "https"), 403),
            (chat.url, 303),
        ):
            answer = await person.form("/login", headers={"Origin": origin})
            assert answer.status == status, origin
        assert (await person.ask("/", headers={"Origin": "http://evil.example"})).status == 200
        with pytest.raises(aiohttp.WSServerHandshakeError, match="403"):
            await person.open(headers={"Origin": "http://evil.example"})
        # Without HTTPS=1, nothing that claims to come from a router is believed.
        answer = await person.ask("/", headers={"X-Forwarded-Proto": "http"})
        assert answer.status == 200 and "Strict-Transport-Security" not in answer.headers


@asynchronous
async def test_log_out(three_chats):
    """A session ends on every process, and no other session of the same user does."""
    async with people(three_chats[0], None) as [person], Person(three_chats[0]) as other:
        other.login = person.login
        await other.form("/login")
        cookie = (await person.form("/login")).headers["Set-Cookie"]
        for word in ("HttpOnly", "SameSite=Lax", "Max-Age=604800", "Path=/"):
            assert word in cookie
        assert person.login not in cookie and "Secure" not in cookie
        copy = {"Cookie": cookie.split(";")[0]}
        async with Person(three_chats[1]) as thief, Person(three_chats[2]) as second_thief:
            for each in (thief, second_thief):
                each.http.headers.update(copy)
                assert (await each.ask("/")).status == 200  # a session holds on every process
            for each in (person, other, thief, second_thief):
                await each.connect("new")
            answer = await person.ask("/logout", "POST")
            assert (answer.status, answer.headers["Location"]) == (303, "/login")
            for each in (person, thief, second_thief):
                assert await each.closed() == 1008
            for thief.chat in three_chats:
                assert (await thief.ask("/")).status == 303
                with pytest.raises(aiohttp.WSServerHandshakeError, match="401"):
                    await thief.open()
        await other.post()
        assert (await other.ask("/")).status == 200
        assert (await person.ask("/logout", "POST")).headers["Location"] == "/login"


async def sessions_expire(mongo):
    """A session lasts so long from the login, used or not; then its WebSockets are closed."""
    limits = {"SESSION_LIFETIME": "timedelta(seconds=3)", "SYNC_INTERVAL": "0.5"}
    async with Chat(MONGODB_URI=mongo(), limits=limits) as chat, people(chat, None) as [person]:
        await person.connect()
        copy = {"Cookie": person.cookie()}
        assert (await person.ask("/", headers=copy)).status == 200
        assert await person.closed() == 1008
        async with asyncio.timeout(PATIENCE):
            while (await person.ask("/", headers=copy)).status == 200:
                await asyncio.sleep(0.5)
        assert (await person.ask("/", headers=copy)).headers["Location"] == "/login"


@asynchronous
async def test_unreadable_cookie_is_no_cookie(chat):
    """Whoever sends one is a stranger, and no error."""
    async with Person(chat) as person:
        for value in ("x", "\xff", "gAAAA", '"', "=" * 200, "gAAAAABn" + "A" * 100):
            headers = {"Cookie": f"chat={value}"}
            assert (await person.ask("/", headers=headers)).status == 303
            assert (await person.ask("/ws", headers=headers)).status == 401
            assert (await person.ask("/login", headers=headers)).status == 200
    connection = http.client.HTTPConnection(urlsplit(chat.url).netloc, timeout=PATIENCE)
    connection.request("GET", "/", headers={"Cookie": b"chat=\xff"})  # this is no UTF-8
    assert connection.getresponse().status == 303
    connection.close()


@asynchronous
async def test_history(chat):
    """The newest 50 messages as a page, and all others before them."""
    async with people(chat, None) as [person]:
        await person.connect()
        for number in range(60):
            await person.say(f"<b>{number}</b>", f"{number}")
        await person.until(lambda: len(person.own) == 60)
        last = person.seen[-1]["id"]
        page = await (await person.ask("/")).text()
        assert re.findall(r'data-id="(\d+)"', page) == [str(n) for n in range(last - 49, last + 1)]
        assert "<b>59</b>" not in page and "&lt;b&gt;59&lt;/b&gt;" in page
        older = await (await person.ask(f"/?before={last - 49}")).text()
        assert f'data-id="{last - 50}"' in older and f'data-id="{last - 49}"' not in older
        answer = await (await person.ask(f"/messages?before={last}")).json()
        assert ids(answer["messages"]) == list(range(last - 50, last))
        assert await history(person) == person.seen


@asynchronous
async def test_a_gap_made_by_hand(mongo):
    """A message that was deleted stops nothing: neither the numbers, nor the pages."""
    uri = mongo()
    async with Chat(MONGODB_URI=uri) as chat, people(chat, None, None) as [person, other]:
        await person.connect()
        for number in range(1, 131):
            await person.say(f"{number}", f"{number}")
        await person.until(lambda: len(person.own) == 130)
        with pymongo.MongoClient(uri) as client:
            client.get_default_database().messages.delete_one({"_id": 64})
        expected = [*range(1, 64), *range(65, 131)]
        for restart in (False, True):
            if restart:
                chat.kill()
                await asyncio.to_thread(chat.start)
                await person.connect()
            await person.post()
            expected.append(expected[-1] + 1)
            assert ids(await history(person)) == expected
            assert ids(person.seen)[-1] == expected[-1]
            other.seen = []
            await other.connect(0)
            await other.until(lambda: ids(other.seen)[-1:] == expected[-1:])
            assert ids(other.seen) == expected


@asynchronous
async def test_static_files(chat):
    """They are kept for a year under an address with the right version, and only there."""
    async with people(chat, None) as [person]:
        page = await (await person.ask("/")).text()
        links = re.findall(r'"(/static/[^"]+\?v=[^"]+)"', page)
        assert len(links) == 3
        for link in links:
            for address, kept in (
                (link, "max-age=31536000, immutable"),
                (link[:-1] + "-", "no-cache"),  # the version of another release
                (link.partition("?")[0], "no-cache"),
            ):
                answer = await person.ask(address)
                assert (answer.status, answer.headers["Cache-Control"]) == (200, kept)
        for path in ("/static//dev/zero", "/static/%2fdev/zero", "/static/..%2f..%2fdev%2fzero"):
            assert (await person.ask(path)).status in (403, 404)
        assert (await person.ask("/static/%2e%2e/chat.py")).status in (403, 404)
        for path in ("/static/none.css", "/static/" + "x" * 300):
            answer = await person.ask(path)
            assert (answer.status, answer.headers["Cache-Control"]) == (404, "no-cache")
        assert "Traceback" not in chat.log()


@asynchronous
async def test_a_new_route_is_private(mongo):
    """A route that nobody has named public is shown to nobody who is not signed in."""
    prelude = """
from aiohttp import web
async def health(request):
    return web.Response(text="up", headers={"Cache-Control": "no-store"})
old_routes = chat.routes
chat.routes = lambda: [*old_routes(), web.get("/health", health), web.post("/poke", health)]
"""
    async with Chat(MONGODB_URI=mongo(), prelude=prelude) as chat, Person(chat) as person:
        for path, method in (("/health", "GET"), ("/health", "HEAD"), ("/poke", "POST")):
            answer = await person.ask(path, method)
            assert (answer.status, answer.headers["Location"]) == (303, "/login")
        await person.sign_up()
        assert await (await person.ask("/health")).text() == "up"
        assert (await person.ask("/poke", "POST")).status == 200


@asynchronous
@pytest.mark.parametrize("what", ["handshake", "form", "gzip", "garbage", "header"])
async def test_clients_that_hang_up(mongo, what):
    """However a client breaks off, or breaks HTTP: no traceback of it gets into the log."""
    async with Chat(MONGODB_URI=mongo()) as chat, people(chat, None) as [person]:
        form = b"POST /login HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n"
        form += b"Content-Type: application/x-www-form-urlencoded\r\n"
        request = {
            "handshake": handshake(person, "?after=0"),
            "form": form + b"\r\nlogin=",
            "gzip": form + b"Content-Encoding: gzip\r\n\r\n" + b"x" * 100,
            "header": b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
            "garbage": b"\x16\x03\x01 what TLS begins with\r\n\r\n",
        }[what]
        for number in range(10):
            with socket.create_connection(("127.0.0.1", urlsplit(chat.url).port)) as client:
                if number % 2:  # RST instead of FIN
                    options = struct.pack("ii", 1, 0)
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, options)
                client.sendall(request)
        await person.connect()
        await person.post()
        chat.check_log()


# ---------------------------------------------------------------------------
# The WebSocket
# ---------------------------------------------------------------------------


@asynchronous
async def test_frames(chat):
    """What a client may send, and what it is answered for all the rest."""
    async with people(chat, None) as [person], person.open(0) as ws:
        [online, *_] = await ws.receive_json()
        assert online["type"] == "online" and person.login in online["users"]
        await ws.close()
        await person.connect("new")
        for count, (bad, key) in enumerate(
            (
                ("[", None),
                ("[]", None),
                ("null", None),
                ("[" * 60000, None),
                ("1" * 6000, None),
                (" " * 65536, None),
                ('{"text": 5, "key": "k"}', "k"),
                ('{"text": " \\n ", "key": "k"}', "k"),
                ('{"text": "\\ud800", "key": "k"}', "k"),
                (json.dumps({"text": "x" * 2001, "key": "k" * 64}), "k" * 64),
                ('{"text": "x", "key": 5}', None),
                ('{"text": "x", "key": ""}', ""),
                ('{"text": "x", "key": "\\udc00"}', None),
                (json.dumps({"text": "x", "key": "k" * 65}), "k" * 65),
            ),
            1,
        ):
            await person.ws.send_str(bad)
            await person.until(lambda count=count: len(person.errors) == count)
            error = person.errors[-1]
            assert error["text"] and error.get("key") == key, bad
        for count, text in enumerate(("\0", "x" * 2000, "😀" * 2000, "ж\n  א"), 1):
            await person.post(f"  {text}\n", "k" * (65 - count))
            message = person.seen[-1]
            assert list(message) == ["type", "id", "key", "user", "text", "time"]
            assert message["text"] == text and isinstance(message["id"], int)
            moment = datetime.fromisoformat(message["time"])
            assert moment.utcoffset() == timedelta(0)
            assert abs(datetime.now(UTC) - moment) < timedelta(hours=0.5)
        for unnamed in ({"text": "again", "key": None}, {"text": "and again"}):
            count = len(person.own)
            await person.ws.send_json(unnamed)
            await person.until(lambda count=count: len(person.own) == count + 1)
        assert all(1 <= len(key) <= 64 for key in person.own)
        await person.ws.send_bytes(b"bytes")
        assert await person.closed() == 1003
        await person.connect("new")
        await person.ws.send_str(" " * 65537)
        assert await person.closed() == 1009


async def heartbeat(mongo):
    """Who answers the pings stays, and who does not is dropped."""
    prelude = "assert 25 <= chat.HEARTBEAT <= 30"
    limits = {"HEARTBEAT": "0.5"}
    async with (
        Chat(MONGODB_URI=mongo(), limits=limits, prelude=prelude) as chat,
        people(chat, None) as [person],
    ):
        with RawClient(person) as client:
            frames, pings = client.frames(), 0
            while pings < 5:  # it answers while it reads, and reads for some seconds
                kind, _ = await asyncio.to_thread(next, frames)
                pings += kind == PING_FRAME
            end = time.monotonic() + PATIENCE
            with contextlib.suppress(OSError):
                while client.socket.recv(65536):
                    assert time.monotonic() < end, "it still gets pings"


@asynchronous
async def test_who_is_online(three_chats):
    """Sorted by code point; nobody is said to come or leave who has another connection."""
    first, second, third = three_chats
    tag = secrets.token_hex(3)
    logins = ["zoe" + tag, "Ada" + tag, "eve" + tag]
    async with people(first, *logins) as [zoe, ada, eve]:

        def mine(person):
            return [
                (each["type"], each["user"]) for each in person.others[1:] if tag in each["user"]
            ]

        await zoe.connect("new")
        ada.chat = second
        await ada.connect("new")
        await zoe.until(lambda: ada.login in zoe.online())
        async with ada.open(), eve.open() as ws:  # one more Ada is no news
            [online] = await ws.receive_json()
            assert [user for user in online["users"] if tag in user] == sorted(logins)
            for each in (zoe, ada):
                await each.until(lambda each=each: eve.login in each.online())
        for each in (zoe, ada):
            await each.until(lambda each=each: eve.login not in each.online())
        # A reload: whatever is said of it, in the end everybody knows who is here.
        eve.chat = third
        for _ in range(3):
            await eve.connect("new")
        for each in (zoe, ada):
            await each.until(lambda each=each: eve.login in each.online())
        await ada.ws.close()
        for each in (zoe, eve):
            await each.until(lambda each=each: ada.login not in each.online())
        assert mine(zoe)[:3] == [("joined", ada.login), ("joined", eve.login), ("left", eve.login)]
        assert mine(zoe)[-1] == ("left", ada.login)


async def users_of_a_killed_process_leave(replica_set):
    """Promise 8: it could not say so itself (within 60 seconds, here with lowered limits)."""
    uri, limits = replica_set(), {"PRESENCE_TTL": "timedelta(seconds=2)", "SYNC_INTERVAL": "0.5"}
    async with (
        Chat(MONGODB_URI=uri, limits=limits) as chat,
        Chat(MONGODB_URI=uri, limits=limits, TZ="America/New_York") as killed,
        people(chat, None, None, None) as [stays, goes, comes],
    ):
        await stays.connect()
        goes.chat = killed
        await goes.connect()
        await stays.until(lambda: goes.login in stays.online())
        await asyncio.sleep(3)  # longer than one sign of life lasts
        assert goes.login in stays.online()
        killed.kill()
        await stays.until(lambda: goes.login not in stays.online())
        await comes.connect()
        await comes.until(lambda: comes.others)
        assert comes.online() == {stays.login, comes.login}


# ---------------------------------------------------------------------------
# What the chat promises about a message
# ---------------------------------------------------------------------------


@asynchronous
async def test_as_time_passes(replica_set):
    """What happens by itself. Most of it is waiting, so all of it waits at the same time."""
    await together(
        sessions=sessions_expire(replica_set),
        pings=heartbeat(replica_set),
        presence=users_of_a_killed_process_leave(replica_set),
        faster=faster_than_the_database(replica_set),
        long_history=long_history(replica_set),
        backlog=backlog_that_never_ends(replica_set),
        half_a_frame=half_a_frame(replica_set),
    )


async def faster_than_the_database(mongo):
    """Promise 5: whose answer to a ping waits behind many messages is slowed down, not dead."""
    async with (
        Proxy(mongo()) as proxy,
        chat_behind(proxy, 1, {"HEARTBEAT": "2"}) as (_, [person]),
    ):
        proxy.delay = 0.03
        for number in range(100):  # more than aiohttp reads ahead
            await person.say(LONGEST, f"{number}")
        await person.until(lambda: len(person.own) == 100)
        assert not person.errors and not person.ws.closed


async def long_history(mongo):
    """Promise 3: while a client catches up, its answers to pings are not read. It stays."""
    uri = mongo()
    count = len(history_of(uri, 700))
    limits = {"HEARTBEAT": "2", "PAGE_SIZE": "10"}
    async with Proxy(uri) as proxy, chat_behind(proxy, 1, limits) as (_, [person]):
        proxy.delay = 0.03
        await person.connect("")
        await person.until(lambda: len(person.seen) == count or person.ws.closed, 90)
        assert len(person.seen) == count


async def backlog_that_never_ends(mongo):
    """Promise 5: one that reads as fast as messages come stays, though some always wait for it."""
    async with (
        Chat(MONGODB_URI=mongo(), limits={"SEND_TIMEOUT": "2"}) as chat,
        people(chat, None, None) as [person, slow],
    ):
        await person.connect()
        with RawClient(slow, small=True) as client:
            client.rate, seen = 150_000, []
            reading = asyncio.create_task(asyncio.to_thread(client.numbers, 80, seen))
            for number in range(80):
                if number == 25:  # the chat waits for it from its next frame on
                    client.socket.sendall(client_frame(b"", PONG_FRAME))
                await person.until(lambda: len(person.own) - len(seen) < 30 or reading.done())
                await person.post(LONGEST)
            await reading
            assert seen == list(range(1, 81))


async def half_a_frame(mongo):
    """Promise 5: one that reads nothing, and begins a frame that is too long, is cut off."""
    async with (
        Chat(MONGODB_URI=mongo(), limits={"SEND_TIMEOUT": "1"}) as chat,
        people(chat, None, None) as [person, deaf],
    ):
        await person.connect()
        with RawClient(deaf, small=True) as client:
            for _ in range(50):  # 600 KB
                await person.post(LONGEST)
            client.socket.sendall(bytes([0x81, 0xFF]) + (10_000_000).to_bytes(8, "big") + bytes(4))
            await person.until(lambda: deaf.login not in person.online())


@asynchronous
async def test_everybody_has_everything(replica_set):
    """Promises 1 to 4 and 8: people who come and go, on two processes; one is killed."""
    uri, rng, sent = replica_set(), random.Random(1), {}
    async with (
        Chat(MONGODB_URI=uri) as chat,
        Chat(MONGODB_URI=uri) as second,
        people(chat, *[None] * 8) as them,
    ):
        for person in them[::2]:
            person.chat = second
        talking = [asyncio.create_task(each.keep_talking(rng, sent, "run", 0.1)) for each in them]

        def sent_by(person):
            return {key: text for (login, key), text in sent.items() if login == person.login}

        for moment in range(16):
            await asyncio.sleep(0.2)
            unlucky = rng.choice(them)
            if unlucky.ws and not unlucky.ws.closed:
                unlucky.ws.get_extra_info("socket").shutdown(socket.SHUT_RDWR)
            if moment == 8:
                second.kill()
                await asyncio.to_thread(second.start)
        for task in talking:
            task.cancel()
        for result in await asyncio.gather(*talking, return_exceptions=True):
            assert isinstance(result, asyncio.CancelledError), result
        # Once more, all that each has sent: nothing may be stored twice.
        for person in them:
            await person.connect()
            person.own = {}
        await asyncio.gather(*(p.say(text, key) for p in them for key, text in sent_by(p).items()))
        for person in them:
            await person.until(lambda person=person: person.own.keys() == sent_by(person).keys())
        truth = stored(uri)
        assert [number for number, *_ in truth] == list(range(1, len(sent) + 1))
        assert {(user, key): text for _, user, key, text in truth} == sent
        for person in them:
            # What a person has sent again it has seen again, so here each one counts once.
            await person.until(lambda person=person: len(set(ids(person.seen))) == len(sent))
            assert sorted(set(shown(person))) == truth
            assert not person.errors


@asynchronous
async def test_one_order(three_chats):
    """Promise 2: with no reconnecting, all lists are equal as they came, on three processes."""
    async with people(three_chats[0], *[None] * 9) as them:
        for number, person in enumerate(them):
            person.chat = three_chats[number % 3]
            await person.connect()
        first = len(await history(them[0])) + 1
        await asyncio.gather(*(each.say(f"{n}", f"{n}") for n in range(40) for each in them))
        for person in them:
            await person.until(lambda person=person: ids(person.seen)[-1:] == [first + 359])
            assert person.seen == them[0].seen and not person.errors
            own = [each["key"] for each in person.seen if each["user"] == person.login]
            assert own == [f"{n}" for n in range(40)]  # in the order in which they were sent
        assert ids(them[0].seen) == list(range(1, first + 360))
        assert await history(them[0]) == them[0].seen


@asynchronous
async def test_kill_9_loses_nothing(house):
    """Promise 1, with the local database in the same process: ten people, `kill -9`, twice."""
    rng, sent = random.Random(2), {}
    async with Chat(house) as chat, people(chat, *[None] * 10) as them:
        for run in range(2):
            tasks = [asyncio.create_task(p.keep_talking(rng, sent, str(run), 0.01)) for p in them]
            await asyncio.sleep(1)
            await asyncio.to_thread(chat.kill)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.to_thread(chat.start)
        everything = await history(them[0])
        assert ids(everything) == list(range(1, len(everything) + 1))
        for person in them:
            assert person.seen and all(each in everything for each in person.seen)


@asynchronous
async def test_nothing_is_missed(chat):
    """Promise 3: all that one missed comes first, however much, while others go on writing."""
    async with people(chat, None, None) as [writer, reader]:
        await writer.connect("new")
        count = 600  # many pages, and more than the chat keeps in memory
        for number in range(count):
            await writer.say(f"{number}", f"{number}")
        await writer.until(lambda: len(writer.own) == count)

        async def keep_writing():
            for number in range(count, 10_000):
                await writer.say(f"{number}", f"{number}")
                await asyncio.sleep(0.005)

        writing = asyncio.create_task(keep_writing())
        for back in (600, 599, 250, 101, 51, 50, 20, 1, 0):
            after = writer.seen[-1]["id"] - back
            reader.seen = []
            await reader.connect(after)
            newest = writer.seen[-1]["id"] + 10
            await reader.until(lambda newest=newest: ids(reader.seen)[-1:] > [newest])
            assert ids(reader.seen) == list(range(after + 1, reader.seen[-1]["id"] + 1))
        assert not writing.done()
        writing.cancel()


@asynchronous
async def test_stored_once(three_chats):
    """Promise 4: the same key again, at once and later, from here and there."""
    first, second, _ = three_chats
    async with people(first, None, None) as [person, other]:
        await person.connect("new")
        await other.connect("new")
        for _ in range(5):
            await person.say("once", "same key")
        await person.until(lambda: len(person.seen) == 5)
        assert len(set(ids(person.seen))) == 1
        person.chat = second
        await person.connect("new")
        await person.say("another text", "same key")
        await person.until(lambda: len(person.seen) == 6)
        assert person.seen[-1] == person.seen[0]
        await other.post("mine", "same key")  # another user's key is another key
        assert [each["text"] for each in other.seen] == ["once", "mine"]
        assert [each["text"] for each in await history(other)][-2:] == ["once", "mine"]


FLOODS = {
    "messages": client_frame(b'{"text": "flood"}'),
    "repeats": client_frame(b'{"text": "flood", "key": "the same"}'),
    "nonsense": client_frame(b"nonsense"),
    "pings": client_frame(b"", PING_FRAME),
}


@pytest.fixture(scope="module")
def flooded_chat(mongo):
    """A chat of its own, since other tests would have to read all those messages."""
    with Chat(MONGODB_URI=mongo()) as it:
        yield it


@asynchronous
@pytest.mark.parametrize("reads", [True, False], ids=["reading", "not reading"])
@pytest.mark.parametrize("kind", FLOODS)
async def test_a_flood_holds_up_nobody(flooded_chat, kind, reads):
    """Promise 5: whatever one client sends, another one's messages are shown in two seconds."""
    async with people(flooded_chat, None, None) as [person, flooder]:
        await person.connect("new")
        with flooding(flooder, FLOODS[kind], reads, connections=3):
            await asyncio.sleep(0.7)
            seconds = [await person.post() for _ in range(5)]
        assert statistics.median(seconds) < 2


@asynchronous
async def test_a_busy_process_leaves_others_their_turn(replica_set):
    """Promises 5 and 8: the same for one person on another process than the flood's."""
    uri = replica_set()
    async with (
        Chat(MONGODB_URI=uri) as chat,
        Chat(MONGODB_URI=uri) as busy_chat,
        people(chat, None, None) as [quiet, flooder],
    ):
        flooder.chat = busy_chat
        await quiet.connect("new")
        with flooding(flooder, FLOODS["messages"], connections=8):
            await asyncio.sleep(0.7)
            seconds = [await quiet.post() for _ in range(5)]
        assert statistics.median(seconds) < 2


@asynchronous
async def test_costly_logins_hold_up_nobody(chat):
    """Promise 5: a login that would take seconds to normalize is cut before that."""
    async with people(chat, None, None) as [person, bad]:
        await person.connect("new")
        login = "a" + "\u0300\u0316" * 15_000

        ended = asyncio.Event()

        async def keep_trying(path):
            while not ended.is_set():
                form = aiohttp.FormData({"login": login}, default_to_multipart=True)
                assert (await bad.ask(path, "POST", data=form)).status != 413

        trying = asyncio.gather(*(keep_trying(path) for path in ("/login", "/signup") * 2))
        await asyncio.sleep(0.3)
        seconds = [await person.post() for _ in range(5)]
        ended.set()
        await trying
        assert statistics.median(seconds) < 2


@asynchronous
async def test_slow_reader(mongo):
    """Promise 5: one that reads slowly catches up and stays, whatever the longest messages."""
    async with (
        Chat(MONGODB_URI=mongo(), limits={"SEND_TIMEOUT": "1", "HEARTBEAT": "1"}) as chat,
        people(chat, None, None) as [person, slow],
    ):
        await person.connect()
        for number in range(100):  # 1.2 MB
            await person.say(LONGEST, f"{number}")
        await person.until(lambda: len(person.own) == 100)
        with RawClient(slow, 0, small=True) as one, RawClient(slow, 50, small=True) as other:
            one.rate = other.rate = 200_000  # the answer to a ping waits behind 600 KB
            counts = ((one, 130), (other, 80))
            reading = [asyncio.to_thread(client.numbers, count) for client, count in counts]
            catching_up = asyncio.gather(*reading)
            for _ in range(30):
                await person.post()
                await asyncio.sleep(0.1)
            async with asyncio.timeout(60):
                assert await catching_up == [list(range(1, 131)), list(range(51, 131))]


@asynchronous
async def test_one_that_stops_reading(mongo):
    """Promise 5: it is cut off when about 1 MB waits for it, not sooner, and comes back."""
    async with Chat(MONGODB_URI=mongo()) as chat, people(chat, None, None) as [person, deaf]:
        await person.connect()
        with RawClient(deaf, small=True) as client:
            for _ in range(50):  # 600 KB
                await person.post(LONGEST)
            assert await asyncio.to_thread(client.numbers, 50) == list(range(1, 51))
        with RawClient(deaf, small=True) as client:
            for _ in range(130):  # 1.5 MB
                await person.post(LONGEST)
            with pytest.raises((EOFError, ConnectionError)):
                await asyncio.to_thread(client.numbers, 130)
        await deaf.connect(50)
        await deaf.until(lambda: len(deaf.seen) == 130)
        assert ids(deaf.seen) == list(range(51, 181))


@asynchronous
async def test_pings_without_reading(mongo):
    """Promise 5: pongs that nobody reads do not fill the memory: such a client is cut off."""
    pings = client_frame(b"x" * 125, PING_FRAME) * 500
    async with (
        Chat(MONGODB_URI=mongo(), limits={"SEND_TIMEOUT": "1"}) as chat,
        people(chat, None) as [person],
    ):
        with RawClient(person, small=True) as client:

            def ping():
                end = time.monotonic() + PATIENCE
                while time.monotonic() < end:
                    client.socket.sendall(pings)
                    time.sleep(0.01)

            with pytest.raises(ConnectionError):
                await asyncio.to_thread(ping)


@asynchronous
@pytest.mark.parametrize("reason, code", [("log-out", 1008), ("end", 1001)])
async def test_everything_arrives_before_the_close(mongo, reason, code):
    """Promise 5: however much waits for a client when it is closed, it gets all of it first."""
    limits = {"CLOSE_TIMEOUT": "3"}  # enough for all of them on a busy machine
    async with (
        Chat(MONGODB_URI=mongo(), limits=limits) as chat,
        people(chat, None, None) as [person, reader],
    ):
        # Each client has missed 12 KB more than the next one. The first ones miss more than the
        # kernel takes, so that different amounts, up to some 300 KB, wait in the chat.
        await person.connect()
        clients = []
        for _ in range(32):
            clients.append(RawClient(reader, small=True))
            await person.post(LONGEST)
        if reason == "log-out":
            await reader.ask("/logout", "POST")
        else:
            chat.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.7)  # they begin to read when the close has begun
        with ThreadPoolExecutor(len(clients)) as pool:
            loop = asyncio.get_running_loop()
            reading = [loop.run_in_executor(pool, each.events_to_the_end) for each in clients]
            results = await asyncio.gather(*reading)
        for missed, (client, events) in enumerate(zip(clients, results, strict=True)):
            assert client.close_code == code
            assert ids(events) == list(range(missed + 1, 33))
        if reason == "end":
            assert await asyncio.to_thread(chat.wait, 5) == 0


@asynchronous
@pytest.mark.parametrize("local", [False, True], ids=["SIGTERM", "Ctrl-C"])
async def test_clean_end(mongo, house, local):
    """Promise 6, while many send without pause: each message is stored, or answered."""
    settings = {"folder": house} if local else {"MONGODB_URI": mongo()}
    async with Chat(**settings) as chat, people(chat, *[None] * 7) as [deaf, *them]:
        sent = Counter()

        async def flood(person):
            await person.connect()
            with contextlib.suppress(OSError, aiohttp.ClientError):
                for number in range(1_000_000):
                    sent[person.login] += 1
                    await person.say(TEXT, f"{number}")
                    await asyncio.sleep(0)

        with RawClient(deaf, small=True):
            floods = [asyncio.create_task(flood(person)) for person in them]
            await asyncio.sleep(1)
            assert await chat.end(signal.SIGINT if local else signal.SIGTERM, 5) == 0
            async with asyncio.timeout(PATIENCE):
                await asyncio.gather(*floods)
            assert [await person.closed() for person in them] == [1001] * 6
        await asyncio.to_thread(chat.start)
        everything = await history(them[0])
        assert ids(everything) == list(range(1, len(everything) + 1))
        for person in them:
            kept = {int(each["key"]) for each in everything if each["user"] == person.login}
            refused = {int(each["key"]) for each in person.errors}
            # What was not read was sent last: before it there is nothing without an answer.
            assert kept | refused == set(range(len(kept | refused)))
            assert kept and len(kept | refused) <= sent[person.login]
            assert {int(key) for key in person.own} == kept


# ---------------------------------------------------------------------------
# The database may fail
# ---------------------------------------------------------------------------


async def together(**scenarios):
    """Run what mostly waits at the same time. One that fails leaves the others alone."""
    results = await asyncio.gather(*scenarios.values(), return_exceptions=True)
    failed = {n: e for n, e in zip(scenarios, results, strict=True) if isinstance(e, Exception)}
    if failed:
        raise ExceptionGroup(", ".join(failed), list(failed.values()))


async def switch(fault, proxy, server, works):
    """Let the database fail, or work again."""
    if fault == "cut":
        await (proxy.open() if works else proxy.cut())
    elif fault == "silent":
        proxy.silent = not works
    else:
        await asyncio.to_thread(server.start if works else server.kill)


async def send_again(person, texts):
    """Send messages once more, also those that were shown; then what is not shown, until it is."""
    end, missing = time.monotonic() + PATIENCE, texts.keys()
    while missing:
        assert time.monotonic() < end, (missing, person.errors[-2:])
        for key in sorted(missing):
            await person.say(texts[key], key)
        with contextlib.suppress(AssertionError):
            await person.until(lambda: texts.keys() <= person.own.keys(), 1)
        missing = texts.keys() - person.own.keys()


async def everything_once(reader, keys):
    """Wait for the last of these messages; the reader has then seen the history, each once."""
    await reader.until(lambda: reader.seen and reader.seen[-1]["key"] == keys[-1])
    assert reader.seen == await history(reader)
    assert ids(reader.seen) == [*range(1, len(keys) + 1)]
    assert sorted(each["key"] for each in reader.seen) == sorted(keys)


@asynchronous
async def test_the_database_fails(replica_set, tmp_path):
    """Promises 6 and 7: cut off, silent, killed, without a primary: while it lasts and after."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(20))  # all wait at once
    with Mongo(tmp_path / "a") as server, Mongo(tmp_path / "b") as other_server:
        await together(
            cut=database_fails(replica_set(), "cut"),
            silent=database_fails(replica_set(), "silent"),
            killed=database_fails(server.uri("chat"), "killed", server),
            end_when_cut=chat_ends(replica_set(), "cut"),
            end_when_silent=chat_ends(replica_set(), "silent"),
            end_when_killed=chat_ends(other_server.uri("chat"), "killed", other_server),
            end_with_a_backlog=chat_ends_with_a_backlog(replica_set()),
            election=no_primary(replica_set()),
        )


async def database_fails(uri, fault, server=None):
    """Promise 7: 503 and errors in time; then all goes on, and nothing is stored twice."""
    async with Proxy(uri) as proxy, chat_behind(proxy) as (chat, [person, other]):
        await person.post(key="before")
        await other.until(lambda: other.seen)
        logged = len(chat.printed)
        await switch(fault, proxy, server, works=False)
        start = time.monotonic()
        texts = {key: f"{TEXT} {key}" for key in ("a", "b", "c", "d")}
        for key, text in texts.items():
            await person.say(text, key)
        async with Person(chat) as stranger:
            paths = ["/", "/messages?before=1", "/ws?after=1"] * 10
            pages = [other.ask(path) for path in paths] + [stranger.form("/login")]
            forms = [each.ask("/login") for each in (stranger, other)]
            answers = await asyncio.gather(stranger.ask("/static/chat.js"), *forms, *pages)
        assert [each.status for each in answers] == [200] * 3 + [503] * len(pages)
        assert time.monotonic() - start < 10
        await person.until(lambda: len(person.errors) == 4, start + 10 - time.monotonic())
        assert {each["key"] for each in person.errors} == texts.keys()
        assert not person.reading.done() and not other.reading.done()  # still connected
        assert len(chat.printed) > logged  # it says what failed
        await switch(fault, proxy, server, works=True)
        await send_again(person, texts)
        await other.post(key="after")
        await everything_once(other, ["before", *texts, "after"])
        assert not other.errors and (await other.ask("/")).status == 200


async def chat_ends(uri, fault, server=None):
    """Promise 6: in time and with status 0, after failing for a moment or for a while."""
    async with (
        Proxy(uri) as proxy,
        chat_behind(proxy, 1) as (first, [early]),
        chat_behind(proxy, 1) as (second, [late]),
    ):
        await switch(fault, proxy, server, works=False)
        await together(
            at_once=chat_ends_well(first, early, 0), later=chat_ends_well(second, late, 4)
        )


async def chat_ends_well(chat, person, seconds):
    """What is sent for so many seconds, until the chat has to end, is answered."""
    end, sent = time.monotonic() + seconds, []
    while not sent or time.monotonic() < end:
        sent.append(f"{len(sent)}")
        await person.say(TEXT, sent[-1])
        await asyncio.sleep(0.3)
    assert await chat.end(signal.SIGTERM, 10) == 0
    assert await person.closed() == 1001
    assert [each["key"] for each in person.errors] == sent


async def chat_ends_with_a_backlog(uri):
    """Promise 6: on each connection the first messages, those that were read, are answered."""
    async with (
        Proxy(uri) as proxy,
        chat_behind(proxy, 1) as (chat, [person]),
        twins(person, 60) as them,
    ):
        proxy.silent = True
        for each in them:
            for number in range(10):
                await each.say(TEXT, f"{number}")
        await asyncio.sleep(0.5)
        assert await chat.end(signal.SIGTERM, 10) == 0
        for each in them:
            assert await each.closed() == 1001
            answered = [error["key"] for error in each.errors]
            assert answered and answered == [f"{n}" for n in range(len(answered))]


async def no_primary(uri):
    """Promise 7: a replica set elects a primary, for 6 s while the chat starts, and later."""
    until = None

    def answer(command, reply):
        nonlocal until
        until = until or time.monotonic() + 6  # after the first question
        electing = time.monotonic() < until
        if "ismaster" in reply:
            reply.pop("topologyVersion", None)  # else the driver waits to be told of changes
            if electing:
                reply.pop("primary", None)
                reply |= {"isWritablePrimary": False, "ismaster": False, "secondary": True}
        elif electing:  # and what was asked for may have happened all the same
            name, labels = "InterruptedDueToReplStateChange", ["RetryableWriteError"]
            reply = {"ok": 0.0, "errmsg": name, "code": 11602, "errorLabels": labels}
        return reply

    async with Proxy(uri) as proxy:
        proxy.answer, start = answer, time.monotonic()
        async with chat_behind(proxy, uri=proxy.discovered_uri()) as (_, [person, other]):
            assert time.monotonic() - start > 6
            await person.post(key="before")
            until = (start := time.monotonic()) + 4
            texts = {key: f"{TEXT} {key}" for key in ("a", "b", "c", "d")}
            for key, text in texts.items():
                await person.say(text, key)
            await person.until(  # each is shown, or answered with an error
                lambda: len(person.errors) + len(person.own) > 4, start + 10 - time.monotonic()
            )
            await send_again(person, texts)
            await other.post(key="after")
            await everything_once(other, ["before", *texts, "after"])


@asynchronous
async def test_stored_but_not_acknowledged(replica_set):
    """Promise 7: an answer gets lost, or says that a majority did not acknowledge in time."""
    keys = ["lost", "lost as long as it tries", "64", "100", "91", "189", "14031"]  # codes
    times = dict.fromkeys(keys, 1) | {"lost as long as it tries": 10**9}

    def answer(command, reply):
        key = command.document.get("documents", [{}])[0].get("key")
        if times.get(key, 0) == 0:
            return reply
        times[key] -= 1
        if key.startswith("lost"):
            return None
        error = {"code": int(key), "codeName": f"Code{key}", "errmsg": "not in time"}
        if key == "14031":  # no space on the disk: the driver's exception quotes the message
            return reply | {"writeErrors": [error | {"index": 0}]}
        labels = ["RetryableWriteError"] if key in ("91", "189") else []
        return reply | {"writeConcernError": error, "errorLabels": labels}

    limits = {"DATABASE_TIMEOUT": "1"}
    async with (
        Proxy(replica_set()) as proxy,
        chat_behind(proxy, 2, limits) as (chat, [person, other]),
    ):
        proxy.answer = answer

        def refused(key):
            return key in [each["key"] for each in person.errors]

        for key in keys:
            await person.say(TEXT, key)
            await person.until(lambda key=key: refused(key) or key in person.own)
            assert refused(key) is (key not in ("lost", "91", "189"))  # the driver tried again
            times[key] = 0
            for each in person, other:
                await each.until(
                    lambda each=each, key=key: each.seen and each.seen[-1]["key"] == key
                )
            del person.own[key]  # only an answer, and no refusal, brings it back
            await send_again(person, {key: TEXT})
        await everything_once(other, keys)
        assert "IndexError" not in "".join(chat.printed)


@asynchronous
async def test_repeated_keys(mongo):
    """Promise 5: who sends the same again and again holds up nobody, on a distant database."""
    async with Proxy(mongo()) as proxy, chat_behind(proxy, 3) as (_, [first, second, honest]):
        await first.post(key="same")
        await second.post(key="same")
        async with twins(first, 60) as some, twins(second, 60) as more:
            proxy.delay = 0.0025  # there and back in 5 ms
            for each in some + more:
                for _ in range(3):
                    await each.say(TEXT, "same")
            slowest = max([await honest.post() for _ in range(3)])
            assert slowest < 2 and not honest.errors
            for each in some + more:  # its own message with the rest, and three times as an answer
                own = each.own["same"]["id"]
                await each.until(lambda each=each, own=own: ids(each.seen).count(own) == 4)
                assert set(ids(each.seen)) <= {1, 2, 3, 4, 5} and not each.errors
            proxy.commands.clear()  # the same new message from two connections, thirty times
            for number, each in enumerate(some):
                await each.say(TEXT, f"pair {number // 2}")
            for number, each in enumerate(some):
                await each.until(lambda each=each, n=number: f"pair {n // 2}" in each.own)
            assert [each[:2] for each in proxy.commands].count(("insert", "messages")) < 15


@asynchronous
@pytest.mark.parametrize("fault", ["lost", "empty", "refused"])
async def test_a_failed_look_up(mongo, fault):
    """Promise 5: when a repeated message cannot be looked up, others are stored all the same."""
    failed = []

    def answer(command, reply):
        by_key = command.name == "find" and "'key':" in str(command.document["filter"])
        if failed or not by_key:
            return reply
        failed.append(command)
        if fault == "empty":
            reply["cursor"]["firstBatch"] = []
        elif fault == "refused":
            reply = {"ok": 0.0, "errmsg": "", "code": 50, "codeName": "MaxTimeMSExpired"}
        return None if fault == "lost" else reply

    async with Proxy(mongo()) as proxy, chat_behind(proxy, 3) as (_, [first, person, honest]):
        await person.post(key="same")
        proxy.delay, proxy.answer = 0.05, answer
        await first.say(TEXT)  # while it is stored, the others gather
        await asyncio.sleep(0.05)
        await person.say(TEXT, "same")
        await asyncio.sleep(0.02)
        await honest.say(TEXT)
        await honest.until(lambda: honest.own or honest.errors)
        assert failed and not honest.errors
        await person.until(lambda: person.errors or ids(person.seen).count(1) > 1)


@asynchronous
async def test_catching_up(mongo):
    """Promise 3: a page may end early, as after a failover; others write while somebody comes."""
    lengths = []

    def answer(command, reply):
        if command[:2] == ("find", "messages") and lengths and reply["cursor"]["firstBatch"]:
            del reply["cursor"]["firstBatch"][lengths.pop(0) :]
        return reply

    limits = {"PAGE_SIZE": "10"}
    async with Proxy(mongo()) as proxy, chat_behind(proxy, 2, limits) as (_, [writer, reader]):
        proxy.answer, coming = answer, [Twin(reader) for _ in range(20)]
        for _ in range(55):
            await writer.post()
        for pages in ([7], [0], [10, 3], [1, 0]):
            reader.seen, lengths[:] = writer.seen[:2], pages
            while len(reader.seen) < 55:
                await reader.connect()
                await reader.until(lambda: len(reader.seen) >= 55 or reader.reading.done())
                assert len(reader.seen) >= 55 or reader.ws.close_code == 1013  # come back!
            assert reader.seen == writer.seen and not lengths

        async def come():
            for each in coming:
                await each.connect("")
                await asyncio.sleep(0.03)

        proxy.delay, arriving = 0.01, asyncio.create_task(come())
        while not arriving.done():
            await writer.post()
        await writer.post(key="last")
        for each in coming:
            await each.until(lambda each=each: each.seen and each.seen[-1]["key"] == "last")
            assert each.seen == writer.seen
            await each.stop_reading()


def without_news(command, reply):
    """A change stream that stays open, and tells of nothing."""
    if command.name == "getMore" and command.collection == "$cmd.aggregate":
        reply["cursor"]["nextBatch"] = []
    return reply


@asynchronous
@pytest.mark.parametrize("index", [{"_id": 1}, {"user": 1, "key": 1}], ids=["number", "key"])
async def test_number_and_key_are_taken(replica_set, index):
    """Promise 4: a message was stored by another process: whichever index MongoDB checks first."""
    refused = []

    def answer(command, reply):
        for error in reply.get("writeErrors", ()):
            document = command.document["documents"][error["index"]]
            if document.get("key") == "same" and not refused:
                refused.append(document)
                values = {name: document[name] for name in index}
                error |= {"keyPattern": index, "keyValue": values, "errmsg": f"E11000 {values}"}
        return without_news(command, reply)

    async with (
        Proxy(replica_set()) as proxy,
        chat_behind(proxy) as (_, [person, other]),
        Chat(MONGODB_URI=proxy.parts.geturl()) as second,
        Person(second, person.login) as elsewhere,
    ):
        proxy.answer = answer
        await elsewhere.form("/login")
        await elsewhere.connect()
        await person.post(key="first")
        await elsewhere.until(lambda: elsewhere.seen)
        for key in ("between", "same"):
            await elsewhere.post(key=key)
        await person.say(TEXT, "same")
        await person.until(lambda: 3 in ids(person.seen))
        await other.post(key="new")
        for each in (other, elsewhere):
            await everything_once(each, ["first", "between", "same", "new"])
        # Its sender has seen it with all the others, in order, and as the answer.
        await person.until(lambda: len(person.seen) > 4)
        assert list(dict.fromkeys(ids(person.seen))) == [1, 2, 3, 4]
        assert len(person.seen) == 5 and not person.errors and refused


@asynchronous
async def test_options_are_overruled(replica_set):
    """Promise 7: nothing in the connection string weakens it, and `admin` is not used."""
    limits = {"SYNC_INTERVAL": "60"}  # so what another process does is heard, or missed
    async with Proxy(replica_set()) as proxy:
        uri = proxy.discovered_uri().replace(proxy.parts.path, "/admin")
        uri += "&" if "?" in uri else "?"
        uri += "readPreference=secondaryPreferred&w=0&journal=false&retryWrites=false"
        async with (
            chat_behind(proxy, 2, limits, uri) as (_, [person, other]),
            chat_behind(proxy, 1, limits, uri) as (_, [elsewhere]),
        ):
            await person.post()
            await elsewhere.until(lambda: elsewhere.seen)
            await other.ask("/logout", "POST")
            assert await other.closed() == 1008
    seen = set()
    for name, collection, document in proxy.commands:
        seen.add((name, collection))
        assert document.get("$db") != "admin" or name in NO_OPERATIONS, name
        assert document.get("$readPreference", {"mode": "primary"})["mode"] == "primary", name
        if name in ("insert", "update", "delete", "createIndexes"):
            assert document["writeConcern"] == {"w": "majority", "j": True}, name
        if name in ("insert", "update"):
            assert document["txnNumber"], name  # so MongoDB carries it out once
    assert {("insert", "messages"), ("insert", "users"), ("find", "messages")} <= seen


# What drivers say among themselves, and what waits for changes.
NO_OPERATIONS = {"hello", "ismaster", "isMaster", "ping", "saslStart", "saslContinue"}
NO_OPERATIONS |= {"endSessions", "getMore", "killCursors"}


@asynchronous
async def test_operations_for_each_message(replica_set):
    """The work of the database for one message, with 1, 2, 4 and 8 processes."""
    at_most = {1: 1.2, 2: 2.5, 4: 5, 8: 9}
    counts = await asyncio.gather(*(operations(replica_set(), number) for number in at_most))
    counts = dict(zip(at_most, counts, strict=True))
    assert all(0 < counts[number] <= at_most[number] for number in at_most), counts


async def operations(uri, processes):
    """Operations for each message that somebody sends, while nothing else happens."""
    limits = {"SYNC_INTERVAL": "30"}
    async with Proxy(uri) as proxy, contextlib.AsyncExitStack() as stack:
        chats = [Chat(MONGODB_URI=proxy.uri, limits=limits) for _ in range(processes)]
        await asyncio.gather(*(stack.enter_async_context(each) for each in chats))
        [person] = await stack.enter_async_context(people(chats[0], None))
        await person.connect()

        async def settled():
            """Wait until all is quiet: how many operations there were."""
            count, before = 0, -1
            while count > before:
                await asyncio.sleep(0.6)
                before = count
                count = sum(each.name not in NO_OPERATIONS for each in proxy.commands)
            return count

        before = await settled()
        for _ in range(20):
            await person.say(TEXT)
            await asyncio.sleep(0.1)
        return (await settled() - before) / 20


@asynchronous
async def test_the_change_stream_tells_nothing(replica_set):
    """Promise 8: what other processes do is noticed all the same, a bit later."""
    limits = {"SYNC_INTERVAL": "1"}
    async with (
        Proxy(replica_set()) as proxy,
        chat_behind(proxy, 2, limits) as (_, [person, other]),
        Chat(MONGODB_URI=proxy.parts.geturl()) as second,
    ):
        proxy.answer = without_news
        elsewhere = Twin(person)
        elsewhere.chat = second
        await elsewhere.connect()
        await elsewhere.post()
        await other.until(lambda: other.seen)
        await elsewhere.ask("/logout", "POST")
        assert await person.closed() == 1008
        assert await elsewhere.closed() == 1008


def test_the_end_while_the_database_is_awaited():
    """Promise 6: a chat that still waits for its database ends as cleanly."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(PATIENCE)
        chat = Chat(MONGODB_URI=f"mongodb://127.0.0.1:{silent.getsockname()[1]}/").spawn()
        silent.accept()  # from now on, it waits
        chat.process.send_signal(signal.SIGTERM)
        assert chat.wait(10) == 0
        chat.check_log()


@asynchronous
async def test_without_change_streams(tmp_path):
    """Promise 8: on a MongoDB that has none it says so, and runs as one process."""
    with Mongo(tmp_path, "--standalone") as server:
        async with chat_behind(None, uri=server.uri("chat")) as (chat, [person, other]):
            [line] = [each for each in chat.printed if "change streams" in each]
            assert "process" in line
            await person.post()
            await other.until(lambda: other.seen)
            await other.ask("/logout", "POST")
            assert await other.closed() == 1008
            left = {"type": "left", "user": other.login}
            await person.until(lambda: left in person.others)


# ---------------------------------------------------------------------------
# Settings, and Heroku
# ---------------------------------------------------------------------------


def ends_with_one_line(chat, hint, seconds=10):
    """The chat ends in time, with status 1 and one line that has the hint and no secret."""
    settings = {name: chat.env[name] for name in SETTINGS & chat.env.keys()}
    try:
        status = chat.spawn().wait(seconds)
    except subprocess.TimeoutExpired:
        status = f"still running after {seconds} s"
    finally:
        chat.kill()
    lines = chat.printed
    assert status == 1 and len(lines) == 1, (settings, status, lines)
    assert lines[0].startswith("chat.py: ") and hint in lines[0], (settings, lines)
    for hidden in ("Traceback", "secret@", "word@", "fifteen", "hunter2"):
        assert hidden not in lines[0].lower(), lines


UNREACHABLE = "mongodb://127.0.0.1:1/"


def test_settings_that_cannot_work(mongo):
    """Each one ends the program in time, with one line that names the setting."""
    uri, soon = mongo(), {"START_TIMEOUT": "2"}  # instead of 20 s
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it accepts, and says nothing
        port = silent.getsockname()[1]
        wrong = [
            ("PORT", Chat(MONGODB_URI=uri, PORT="http")),
            ("PORT", Chat(MONGODB_URI=uri, PORT="70000")),
            ("PORT", Chat(MONGODB_URI=uri, PORT="-1")),
            ("PORT", Chat(MONGODB_URI=uri, PORT=str(port))),
            ("HOST", Chat(MONGODB_URI=uri, HOST="192.0.2.1")),
            ("HOST", Chat(MONGODB_URI=uri, HOST="no such host")),
            ("SECRET_KEY", Chat(MONGODB_URI=uri, SECRET_KEY="fifteen letters")),
        ]
        for address, limits in (
            ("postgres://localhost", None),
            ("mongodb://me:pass/word@secret@127.0.0.1/chat", None),
            ("mongodb://u:12/x?hunter2Secret=1@127.0.0.1:1/", soon),
            (UNREACHABLE + "bad.name", None),
            (UNREACHABLE + "bad%20name", None),
            (UNREACHABLE + "?tls=true&tlsCAFile=/no/such/file.pem", None),
            (UNREACHABLE, soon),
            ("mongodb+srv://me:secret@nowhere.invalid/chat", soon),
            (f"mongodb://127.0.0.1:{port}/", None),
        ):
            wrong.append(("MONGODB_URI", Chat(MONGODB_URI=address, limits=limits)))
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda each: ends_with_one_line(each[1], each[0]), wrong))
    for _, chat in wrong:
        assert "writable" not in chat.log()  # data/ has nothing to do with any of this


@pytest.mark.parametrize(
    "mistake, told",
    [
        ("old = chat.routes; chat.routes = lambda: [*old(), *old()]", "ValueError"),
        ("chat.routes = lambda: int('x')", "ValueError"),
        ("chat.routes = lambda: __import__('asyncoi')", "ModuleNotFoundError"),
        ("chat.routes = lambda: open('no such file')", "FileNotFoundError"),
    ],
)
def test_a_bug_shows_its_traceback(mongo, mistake, told):
    """A mistake in the program is not taken for a wrong setting."""
    chat = Chat(MONGODB_URI=mongo(), prelude=mistake)
    try:
        assert chat.spawn().wait(PATIENCE) != 0
    finally:
        chat.kill()
    assert "Traceback" in chat.log() and told in chat.log()
    assert "chat.py: " not in chat.log()


@asynchronous
async def test_data(house, mongo):
    """data/ is for its owner, and for one chat; others may use that one's database."""
    (house / "data").mkdir(mode=0o755)  # as an older chat left it
    async with Chat(house, SECRET_KEY="", MONGODB_URI="", HOST="", HTTPS="") as chat:
        assert chat.printed[0].startswith("The local database: mongodb://")
        for path, private in ((house / "data", 0o700), (house / "data" / "secret-key", 0o600)):
            assert stat.S_IMODE(path.stat().st_mode) == private
        await asyncio.to_thread(ends_with_one_line, Chat(house), "MONGODB_URI")
        async with people(chat, None, None) as [person, other]:
            uri = chat.database  # it names no database, so `chat` is used, here and there
            assert urlsplit(uri).path in ("", "/", "/chat")
            async with Chat(house, SECRET_KEY="", MONGODB_URI=uri) as second:
                other.chat = second  # with the same key: the cookie is good there, too
                await person.connect()
                await other.connect()
                await other.post()
                await person.until(lambda: person.seen)


def test_data_that_cannot_be_a_folder(house):
    """The line names the folder, whether the database or only the key cannot be kept."""
    (house / "data").write_text("")
    ends_with_one_line(Chat(house), "data")
    ends_with_one_line(Chat(house, SECRET_KEY="", MONGODB_URI=UNREACHABLE), "data")


class Router:
    """What Heroku's router does, in small: it adds the X-Forwarded headers to what came."""

    def __init__(self, chat, scheme="https", client="192.0.2.7"):
        self.chat, self.scheme, self.client = chat, scheme, client
        self.url = None

    async def __aenter__(self):
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_):
        self.server.close()

    async def serve(self, reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        forged = re.findall(r"(?im)^X-Forwarded-For: (.*)\r$", head)
        head = re.sub(r"(?im)^X-Forwarded-.*\r\n", "", head)
        addresses = ", ".join([*forged, self.client])
        added = f"X-Forwarded-For: {addresses}\r\nX-Forwarded-Proto: {self.scheme}\r\n"
        added += "Connection: close\r\n" if "Upgrade" not in head else ""
        there, here = await asyncio.open_connection("127.0.0.1", urlsplit(self.chat.url).port)
        here.write((head[:-2] + added + "\r\n").encode())
        await asyncio.gather(self.pump(reader, here), self.pump(there, writer))

    async def pump(self, reader, writer):
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
            writer.close()


@asynchronous
async def test_heroku(mongo):
    """The Procfile's own command line, with app.json's settings, behind a router."""
    app = json.loads((HERE / "app.json").read_text())
    settings = {name: each["value"] for name, each in app["env"].items() if "value" in each}
    assert settings["HTTPS"] == "1" and app["env"]["SECRET_KEY"]["generator"] == "secret"
    procfile = (HERE / "Procfile").read_text()
    command = re.fullmatch(r"web: (.*)\n", procfile)[1]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    settings |= {"MONGODB_URI": mongo(), "PATH": path, "PORT": str(free_port())}
    async with Chat(command=("sh", "-c", "exec " + command), **settings) as chat:
        assert "http://0.0.0.0:" in chat.log()
        async with Router(chat, "http") as plain, Person(plain) as person:
            answer = await person.ask("/login?x=1")
            host = urlsplit(plain.url).netloc
            assert answer.status == 308
            assert answer.headers["Location"] == f"https://{host}/login?x=1"
        async with Router(chat) as router, Person(router) as person:
            own = {"Origin": router.url.replace("http:", "https:")}
            assert (await person.form("/signup", headers={"Origin": router.url})).status == 403
            answer = await person.form("/signup", headers=own)
            cookie = answer.headers["Set-Cookie"]
            assert answer.status == 303 and cookie.startswith("__Host-chat=")
            assert "; Secure" in cookie and "Path=/" in cookie and "Domain" not in cookie
            assert answer.headers["Strict-Transport-Security"] == "max-age=31536000"
            signed_in = {"Cookie": cookie.split(";")[0]}
            async with person.open(headers=own | signed_in) as ws:
                assert (await ws.receive_json())[0]["users"] == [person.login]
            # Ten wrong passwords from one address, whatever addresses the client makes up.
            for number in range(10):
                forged = own | {"X-Forwarded-For": f"198.51.100.{number}"}
                assert (await person.form("/login", password="x", headers=forged)).status == 401
            assert (await person.form("/login", headers=own)).status == 429
            async with Router(chat, client="192.0.2.8") as elsewhere:
                person.chat, own["Origin"] = elsewhere, elsewhere.url.replace("http:", "https:")
                assert (await person.form("/login", headers=own)).status == 303
        assert await chat.end(signal.SIGTERM, 5) == 0


def test_heroku_files():
    """app.json has only keys that Heroku knows; nothing overrules .python-version."""
    app = json.loads((HERE / "app.json").read_text())
    known = {"name", "description", "keywords", "repository", "website", "env", "success_url"}
    assert app.keys() <= known
    for setting in app["env"].values():
        assert setting.keys() <= {"description", "value", "required", "generator"}
        assert setting["description"]
    assert app["env"]["MONGODB_URI"]["required"] is True
    assert re.fullmatch(r"3\.1[123]\n", (HERE / ".python-version").read_text())
    assert not (HERE / "runtime.txt").exists()
    pins = re.findall(r"(?m)^([\w-]+)(==[\d.]+)?", (HERE / "requirements.txt").read_text())
    needed = {"aiohttp", "aiohttp-jinja2", "aiohttp-session", "cryptography", "motor"}
    assert {name for name, _ in pins} - {"pymongo"} == needed
    assert all(version for _, version in pins)


def test_requirements_are_enough():
    """What chat.py imports comes with them. The local database does not, and the chat says so."""
    waiting = set(re.findall(r"(?m)^[\w-]+", (HERE / "requirements.txt").read_text()))
    installed = set()
    while waiting:
        name = canonicalize_name(waiting.pop())
        installed.add(name)
        for requirement in map(Requirement, metadata.requires(name) or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting |= {requirement.name} - installed
    providers = metadata.packages_distributions()
    for node in ast.walk(ast.parse((HERE / "chat.py").read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {getattr(node, "module", None) or each.name for each in node.names}
            for name in {each.partition(".")[0] for each in names} - sys.stdlib_module_names:
                found = set(map(canonicalize_name, providers[name]))
                assert found & installed or name == "secantus", name
    missing = Chat(prelude="import sys; sys.modules['secantus'] = None")
    ends_with_one_line(missing, "requirements-dev.txt")


# ---------------------------------------------------------------------------
# The page, in real browsers
# ---------------------------------------------------------------------------

AXE = importlib.resources.files("axe_playwright_python").joinpath("axe.min.js").read_text()
# What a browser says by itself when an answer is an error or the server is gone, and what the
# tests break on purpose.
EXPECTED = (
    "Failed to load resource",
    "WebSocket connection to",
    "Error: broken on purpose",
    "SyntaxError",
)
MESSAGES = "#messages .text"
LOG = "document.getElementById('log')"
LOST_BOTTOM = f"{LOG}.scrollTop < -1"

# The tests of the page share an event loop, and so one Chromium: to start it takes a second.
PAGES = asyncio.Runner()
on_pages = functools.partial(asynchronous, run_in=PAGES)


@functools.cache
def chromium_path():
    """The path of Debian's Chromium; "" for Playwright's own, installed if need be; or None."""
    if path := shutil.which("chromium"):
        return path
    command = [sys.executable, "-m", "playwright", "install", "chromium"]
    with contextlib.suppress(subprocess.SubprocessError):
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        return ""
    return None


@contextlib.asynccontextmanager
async def browser():
    path = await asyncio.to_thread(chromium_path)
    if path is None:
        message = "No browser: apt-get install chromium, or python -m playwright install chromium"
        pytest.fail(message, pytrace=False)
    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    async with async_playwright() as playwright:
        it = await playwright.chromium.launch(executable_path=path or None, args=options)
        yield it
        await it.close()


@pytest.fixture(scope="module")
def chromium():
    stack = contextlib.AsyncExitStack()
    yield PAGES.run(stack.enter_async_context(browser()))
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
    yield page
    assert [each for each in complaints if not each.startswith(EXPECTED)] == []
    await context.close()


async def fill_form(page, login, password=PASSWORD):
    await page.get_by_label("Username").fill(login)
    await page.get_by_label("Password").fill(password)
    await page.keyboard.press("Enter")


async def type_in(page, text):
    await page.locator("#text").fill(text)
    await page.keyboard.press("Enter")


async def texts(page):
    return await page.locator(MESSAGES).all_text_contents()


async def wait_for_texts(page, *wanted):
    await expect(page.locator(MESSAGES)).to_have_text(wanted)


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


WEBDRIVER_PATHS = {
    "NewSession": "/session",
    "Navigate": "/url",
    "ExecuteScript": "/execute/sync",
    "PerformActions": "/actions",
    "SetWindowRect": "/window/rect",
}
WEBDRIVER_KEYS = {"Enter": "\ue007", "Shift": "\ue008", "Tab": "\ue004"}


class Driven:
    """A page of Firefox or WebKit, in dark, with what walk() needs of a page of Playwright.

    Both speak WebDriver (https://www.w3.org/TR/webdriver2): Firefox in frames of its own, which
    it calls Marionette, and WebKit in HTTP.
    """

    def __init__(self, engine, folder):
        self.engine, self.folder, self.port, self.session = engine, folder, free_port(), ""
        self.keyboard, self.processes = self, contextlib.ExitStack()

    def run(self, *command, **options):
        with open(self.folder / "log", "ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, **options)
        self.processes.callback(process.wait)
        self.processes.callback(process.terminate)

    async def __aenter__(self):
        port, env = str(self.port), dict(os.environ)
        if self.engine == "firefox":
            dark = "layout.css.prefers-color-scheme.content-override"
            preferences = f'user_pref("marionette.port", {port});\nuser_pref("{dark}", 0);\n'
            (self.folder / "user.js").write_text(preferences)
            self.run("firefox-esr", "--headless", "--marionette", "--profile", self.folder)
        else:
            display, other = os.pipe()
            self.run("Xvfb", "-displayfd", str(other), pass_fds=[other])
            env |= {"DISPLAY": f":{os.read(display, 9).decode().strip()}"}
            self.run("WebKitWebDriver", "-p", port, env=env | {"GTK_THEME": "Adwaita:dark"})
        await asyncio.to_thread(self.connect)
        self.session = (await self.call("NewSession", capabilities={}))["sessionId"]
        return self

    async def __aexit__(self, *_):
        if self.engine == "webkit":
            with contextlib.suppress(OSError):
                self.http.request("DELETE", f"/session/{self.session}")
                self.http.getresponse().read()
        await asyncio.to_thread(self.processes.close)

    def connect(self):
        end = time.monotonic() + PATIENCE
        while True:
            try:
                self.socket = socket.create_connection(("127.0.0.1", self.port), PATIENCE)
                break
            except OSError:
                assert time.monotonic() < end, (self.folder / "log").read_text()
                time.sleep(0.1)
        self.file = self.socket.makefile("rb")
        self.http = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        if self.engine == "firefox":
            self.receive()

    def receive(self):
        length = b""
        while (byte := self.file.read(1)) != b":":
            length += byte
        return json.loads(self.file.read(int(length)))

    def send(self, name, parameters):
        if self.engine == "firefox":
            frame = json.dumps([0, 1, f"WebDriver:{name}", parameters]).encode()
            self.socket.sendall(b"%d:%s" % (len(frame), frame))
            _, _, error, result = self.receive()
        else:
            path = WEBDRIVER_PATHS[name]
            if self.session:
                path = f"/session/{self.session}{path}"
            self.http.request("POST", path, json.dumps(parameters))
            answer = self.http.getresponse()
            result = json.load(answer)
            error = result if answer.status >= 400 else None
        assert error is None, error
        return result["value"] if set(result) == {"value"} else result

    async def call(self, name, **parameters):
        return await asyncio.to_thread(self.send, name, parameters)

    async def goto(self, url):
        await self.call("Navigate", url=url)

    async def evaluate(self, expression):
        return await self.call("ExecuteScript", script=f"return {expression}", args=[])

    async def set_viewport_size(self, size):
        await self.call("SetWindowRect", **size)

    async def press(self, keys):
        keys = [WEBDRIVER_KEYS.get(key, key) for key in keys.split("+")]
        actions = [{"type": "keyDown", "value": key} for key in keys]
        actions += [{"type": "keyUp", "value": key} for key in reversed(keys)]
        await self.call("PerformActions", actions=[{"type": "key", "id": "k", "actions": actions}])

    async def type(self, text):
        for character in text:
            await self.press(character)


@contextlib.asynccontextmanager
async def page_in(engine, chromium, folder, chat):
    """A page in one of the engines, in dark."""
    if engine == "chromium":
        async with tab(chromium, chat, sign_up=False, color_scheme="dark") as page:
            yield page
        return
    async with Driven(engine, folder) as page:
        yield page


# Chromium always, and what else is installed: .ci/run installs all of it, on Debian.
ENGINES = ["chromium"]
ENGINES += ["firefox"] if shutil.which("firefox-esr") else []
ENGINES += ["webkit"] if shutil.which("WebKitWebDriver") and shutil.which("Xvfb") else []


@pytest.mark.parametrize("engine", ENGINES)
@on_pages
async def test_page_in_every_engine(mongo, chromium, tmp_path, engine):
    uri = mongo()
    older = history_of(uri, 120)
    async with (
        Chat(MONGODB_URI=uri) as chat,
        people(chat, "anna") as [anna],
        page_in(engine, chromium, tmp_path, chat) as page,
    ):
        await anna.connect("new")
        await walk(page, chat, anna, older)


async def walk(page, chat, anna, older):
    """What somebody does in a browser, with nothing but keys; anna is somewhere else."""

    async def has(count, expression="true"):
        await becomes_true(page, f"document.querySelectorAll('{MESSAGES}').length === {count}")
        await becomes_true(page, expression)

    async def type_form():
        await becomes_true(page, "document.activeElement.name === 'login'")
        for text, key in (("ben", "Tab"), (PASSWORD, "Enter")):
            await page.keyboard.type(text)
            await page.keyboard.press(key)

    def last(selector):
        return f"[...document.querySelectorAll('{selector}')].at(-1)"

    box, rect = "document.getElementById('text')", "getBoundingClientRect()"
    await page.set_viewport_size({"width": 1200, "height": 800})
    await page.goto(chat.url + "/signup")
    await type_form()
    await becomes_true(page, "document.querySelector('.count')?.textContent === '2'")
    # Both ways; one's own messages are on the right; Shift+Enter in a box that grows.
    await page.keyboard.type("one")
    height = await page.evaluate(f"{box}.offsetHeight")
    for _ in range(3):
        await page.keyboard.press("Shift+Enter")
    await page.keyboard.type("two")
    assert await page.evaluate(f"{box}.offsetHeight") > height + 40
    await page.keyboard.press("Enter")
    await anna.until(lambda: anna.seen and anna.seen[-1]["text"] == "one\n\n\ntwo")
    await anna.say("Hello ben")
    await has(52, f"{last(MESSAGES)}.textContent === 'Hello ben'")
    assert await page.evaluate(f"{box}.offsetHeight") == height
    left = f"{last('#messages li:not(.mine) .bubble')}.{rect}.left"
    assert await page.evaluate(f"{left} < {last('#messages .mine .bubble')}.{rect}.left - 100")
    assert await page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    dark = "getComputedStyle(document.body).backgroundColor === 'rgb(17, 21, 28)'"
    assert await page.evaluate(dark)
    # The window becomes narrower bit by bit, and is still at the bottom; then it is a phone.
    for width in range(1200, 480, -30):
        await page.set_viewport_size({"width": width, "height": 700})
        assert not await page.evaluate(LOST_BOTTOM), width
    await page.set_viewport_size({"width": 360, "height": 700})
    await becomes_true(page, "document.getElementById('people-button').offsetHeight > 0")
    assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    # Older messages, and a new one meanwhile: what one reads stays in its place.
    await page.evaluate(f"{LOG}.scrollTop = -{LOG}.scrollHeight + {LOG}.clientHeight + 100")
    await page.evaluate("window.mark = document.querySelector('#messages li:nth-child(2) .text')")
    top = await page.evaluate(f"mark.{rect}.top")
    await has(102)
    await anna.say("news")
    await has(103, "!document.getElementById('jump').hidden")
    assert abs(await page.evaluate(f"mark.{rect}.top") - top) < 3
    await page.evaluate(f"{LOG}.scrollTop = -1e6")
    await has(123, "document.getElementById('older').hidden")
    await page.evaluate("document.getElementById('jump').click()")
    assert not await page.evaluate(LOST_BOTTOM)
    # kill -9, and back: nothing is lost, nothing doubled, and what was typed goes on.
    chat.kill()
    await becomes_true(page, "document.getElementById('connection').textContent !== ''", 5)
    for number in range(3):
        await page.keyboard.type(f"waits {number}")
        await page.keyboard.press("Enter")
    await page.keyboard.type("half a sent")
    states = "[...document.querySelectorAll('#unsent .state')].map(each => each.textContent)"
    assert await page.evaluate(states) == ["Sending…"] * 3
    await asyncio.to_thread(chat.start)
    await has(126, "document.getElementById('connection').textContent === ''")
    await becomes_true(page, "document.querySelectorAll('#unsent li').length === 0")
    shown = await page.evaluate(
        f"[...document.querySelectorAll('{MESSAGES}')].map(each => each.textContent)"
    )
    assert shown == [*older, "one\n\n\ntwo", "Hello ben", "news", "waits 0", "waits 1", "waits 2"]
    await page.evaluate("void location.reload()")
    await has(50, f"{box}.value === 'half a sent'")
    # A log-out in another tab, which has the same cookie; then one in this tab.
    await page.evaluate("void fetch('/logout', { method: 'POST' })")
    await becomes_true(page, "location.search === '?ended' && !!document.forms[0]")
    assert await page.evaluate("document.body.textContent.includes('Your session has ended')")
    await page.goto(chat.url + "/login")
    await type_form()
    await has(50, f"{box}.value === 'half a sent'")
    await page.evaluate("document.querySelector('header form button').click()")
    await becomes_true(page, "location.pathname === '/login' && !location.search")


@on_pages
async def test_page_two_people(chat, chromium):
    async with (
        tab(chromium, chat) as anna,
        tab(chromium, chat, "Боря" + secrets.token_hex(3)) as boris,
    ):
        await expect(anna.locator("#news")).to_have_text(f"{boris.login} joined")
        await expect(anna.locator("#text")).to_be_focused()
        count = await boris.locator(MESSAGES).count()
        said = ["Hello!", "<b>bold?</b> https://example.com/a?b=1, שלום", "one\n    two"]
        for page, text in ((anna, said[0]), (anna, said[1]), (boris, said[2])):
            await type_in(page, text)
            await expect(boris.locator(MESSAGES).last).to_have_text(text)
        for page in (anna, boris):
            await expect(page.locator(MESSAGES)).to_have_count(count + 3)
            assert (await texts(page))[-3:] == said
            items = page.locator("#messages li")
            # The same person goes on; the day is named once.
            same = await items.evaluate_all("all => all.slice(-3).map(each => each.className)")
            mine = [["mine", "mine same", ""], ["", "same", "mine"]][page is boris]
            assert same == mine
            assert await page.locator(".day:visible").count() == 1
            link = page.locator("#messages a").last
            assert await link.get_attribute("href") == "https://example.com/a?b=1"
            assert "noopener" in await link.get_attribute("rel")
            stamp = page.locator("#messages time").last
            utc = await stamp.get_attribute("datetime")
            hour = (int(utc[11:13]) + 9) % 24  # Tokyo
            assert (await stamp.text_content()).startswith(f"{hour:02}:")
            await has_no_barriers(page)
            await expect(page.locator("#unsent li")).to_have_count(0)
        # A reload is no news.
        await anna.evaluate("""window.news = [];
            new MutationObserver(() => news.push(1)).observe(
                document.getElementById("news"), { childList: true })""")
        await boris.reload()
        await type_in(boris, "back")
        await expect(anna.locator(MESSAGES).last).to_have_text("back")
        assert await anna.evaluate("news") == []

        async def slowly(route):
            await asyncio.sleep(0.5)
            await route.continue_()

        # Who logs out knows that the session has ended.
        await boris.route("**/login*", slowly)
        await boris.get_by_role("button", name="Log out").click()
        await boris.wait_for_url(chat.url + "/login")
        await expect(anna.locator("#news")).to_have_text(f"{boris.login} left")


@on_pages
async def test_page_forms_and_sizes(chat, chromium):
    """The forms say what is wrong; all pages have no barriers, and fit on small screens."""
    options = {"viewport": {"width": 320, "height": 500}, "device_scale_factor": 2}
    login = "W" * 14 + secrets.token_hex(3)
    async with tab(chromium, chat, login, **options) as page:
        wide = "document.documentElement.scrollWidth > innerWidth"
        await type_in(page, "w" * 300)
        await expect(page.get_by_text("w" * 300).last).to_be_visible()
        await page.locator("#people-button").click()
        await expect(page.locator("#online")).to_contain_text(login)
        await has_no_barriers(page)
        assert not await page.evaluate(wide)
        await page.set_viewport_size({"width": 1000, "height": 500})
        await page.keyboard.press("Escape")
        await expect(page.locator("#people-button")).to_be_hidden()
        await expect(page.locator("#online")).to_be_visible()
        await page.set_viewport_size({"width": 320, "height": 500})
        await page.context.clear_cookies()
        for path in ("/nothing", "/signup", "/login"):
            await page.goto(chat.url + path)
            await has_no_barriers(page)
            assert not await page.evaluate(wide), path
        await fill_form(page, login, "wrong password")
        await expect(page.get_by_role("alert")).to_have_text("Wrong username or password.")
        await expect(page.get_by_label("Username")).to_have_value(login)
        assert await page.locator("[aria-invalid=true]").get_attribute("name") == "password"
        await has_no_barriers(page)
        assert await page.evaluate("document.scripts.length") == 0


@on_pages
async def test_page_and_a_message_that_could_not_be_stored(tmp_path, chromium):
    with Mongo(tmp_path) as mongo:
        async with (
            Chat(MONGODB_URI=mongo.uri("chat")) as chat,
            tab(chromium, chat) as page,
        ):
            await type_in(page, "before")
            await wait_for_texts(page, "before")
            mongo.kill()
            for text in ("again", "edit"):
                await type_in(page, text)
            refused = page.locator("#unsent .failed .state")
            await expect(refused).to_have_count(2)
            await expect(refused.first).to_contain_text("may not have been")
            await has_no_barriers(page)
            mongo.start()
            # They are not sent again by themselves, not even when the page connects anew.
            for _ in range(60):  # until the chat has noticed that the database is back
                if (await page.goto(chat.url)).ok:
                    break
                await asyncio.sleep(0.5)
            await expect(page.locator("#connection")).to_have_text("")
            await expect(refused).to_have_count(2)
            assert await texts(page) == ["before"]
            await page.get_by_role("button", name="Edit").last.click()
            await expect(page.locator("#text")).to_have_value("edit")
            await expect(page.locator("#text")).to_be_focused()
            for _ in range(10):
                await page.get_by_role("button", name="Try again").click()
                await expect(page.locator("#unsent li:not(.failed)")).to_have_count(0)
                if await page.locator("#messages li").count() == 2:
                    break
                await asyncio.sleep(0.5)
            await page.locator("#text").press("Enter")
            await wait_for_texts(page, "before", "again", "edit")
            await page.reload()
            await wait_for_texts(page, "before", "again", "edit")
            await expect(page.locator("#unsent li")).to_have_count(0)


@on_pages
async def test_page_older_messages(mongo, chromium):
    """Loading that fails can be repeated; what was loaded is let go again."""
    uri = mongo()
    wanted = history_of(uri, 500)
    # A request that is never answered is given up after 12 s: here after 2.
    impatient = (
        "AbortSignal.timeout = (real => () => real.call(AbortSignal, 2000))(AbortSignal.timeout)"
    )
    async with Chat(MONGODB_URI=uri) as chat, people(chat, None) as [person]:
        await person.connect("new")
        async with tab(chromium, chat, "anna", script=impatient) as page:
            # A message was stored, and her tab was closed before she knew.
            await page.evaluate("""localStorage.setItem("unsent anna 5", '{"text": "x"}')""")
            await page.reload()
            await expect(page.locator("#unsent li")).to_have_count(0)
            assert await texts(page) == wanted[-50:]
            older, again = page.locator("#older"), page.get_by_text("could not be loaded")
            unanswered = []
            answers = (lambda route: route.abort(), lambda route: unanswered.append(route))
            for shown, answer in zip((100, 150), answers, strict=True):
                await page.route("**/messages?*", answer)
                await older.click()
                await expect(again).to_be_visible()
                for route in unanswered:
                    await route.abort()
                await page.unroute("**/messages?*")
                await older.press("Enter")
                await expect(page.locator(MESSAGES)).to_have_count(shown)
                await expect(again).to_be_hidden()
        async with tab(chromium, chat) as page:
            # With JavaScript, an address of an older page leads to the newest.
            await page.goto(chat.url + "/?before=100")
            await page.wait_for_url(chat.url + "/")
            await becomes_true(page, "document.querySelector('.count').textContent === '2'")
            assert await texts(page) == wanted[-50:]
            await page.evaluate("""async () => {
                while (!document.getElementById("older").hidden) {
                    document.getElementById("log").scrollTop = -1e7;
                    await new Promise(requestAnimationFrame);
                }
            }""")
            assert await texts(page) == wanted
            # The smallest step up leads away from the bottom; only the messages scroll.
            await page.evaluate(f"{LOG}.scrollTop = 0")
            await page.locator("#log").press("ArrowUp")
            await becomes_true(page, f"{LOG}.scrollTop < -20")
            assert await page.evaluate("document.documentElement.scrollHeight <= innerHeight")
            await page.locator("#log").press("PageUp")
            await becomes_true(page, f"{LOG}.scrollTop < -200")
            # New messages do not pull somebody away who reads old ones.
            await person.say("news")
            await page.get_by_role("button", name="New messages").click()
            await expect(page.get_by_text("news", exact=True)).to_be_in_viewport()
            await expect(page.locator("#jump")).to_be_hidden()
            await expect(page.locator("#text")).to_be_focused()
            assert len(await texts(page)) == 300
            await older.page.close()
            await page.evaluate(f"{LOG}.scrollTop = -1e7")
            await expect(page.locator(MESSAGES)).to_have_count(350)
            assert await texts(page) == [*wanted[151:], "news"]


@on_pages
async def test_page_typing(chat, chromium):
    # A message with a link is one that the page cannot show, here.
    script = """document.createElement = (real => name => {
        if (name === "a") throw new Error("broken on purpose");
        return real.call(document, name);
    })(document.createElement)"""
    async with tab(chromium, chat, script=script) as page, people(chat, None) as [person]:
        await person.connect("new")
        await person.say("http://example.com")
        await person.say("begin")
        await expect(page.locator(MESSAGES).last).to_have_text("begin")
        box, counter = page.locator("#text"), page.locator("#counter")
        await box.fill("😀" * 1900)
        await expect(counter).to_have_text("Characters left: 100")
        await box.fill("😀" * 2003)
        await expect(counter).to_have_text("Characters left: -3")
        await expect(box).to_have_attribute("aria-invalid", "true")
        await box.press("Enter")
        await expect(box).to_have_value("😀" * 2003)  # refused, and kept whole
        await page.reload()
        await expect(box).to_have_value("😀" * 2003)
        await box.fill("")
        for _ in range(5):
            await box.press("Shift+Enter")
        await expect(page.locator("#messages li").last).to_be_in_viewport()  # still at the bottom
        await box.fill("one")
        await box.press("Shift+Enter")
        await page.keyboard.type("two")
        await box.evaluate(
            "box => box.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', isComposing: true}))"
        )
        await expect(box).to_have_value("one\ntwo")
        await page.get_by_role("button", name="Send").click()
        await expect(page.locator(MESSAGES).last).to_have_text("one\ntwo")
        await expect(page.locator("#unsent li")).to_have_count(0)
        await expect(box).to_have_value("")
        await expect(box).to_be_focused()


FORBIDDEN = """Object.defineProperty(window, "localStorage", {
    get() { throw new Error("broken on purpose") } })"""


@pytest.mark.parametrize("script", ["", FORBIDDEN], ids=["nonsense", "forbidden"])
@on_pages
async def test_page_and_its_storage(chat, chromium, script):
    async with tab(chromium, chat, script=script) as page:
        if not script:
            for name in ("draft ", "unsent "):
                for value in ("{", "null", "[]", '{"text": 5}'):
                    path = f"{name}{page.login}" + (f" {value}" if name == "unsent " else "")
                    await page.evaluate(
                        "([name, value]) => localStorage.setItem(name, value)", [path, value]
                    )
        await page.reload()
        await expect(page.locator("#text")).to_have_value("")
        await type_in(page, f"from {page.login}")
        await expect(page.locator(MESSAGES).last).to_have_text(f"from {page.login}")
        await expect(page.locator("#unsent li")).to_have_count(0)
        await page.keyboard.type("not sent")
        asked = []

        async def ask(dialog):
            asked.append(dialog.type)
            await dialog.accept()

        page.on("dialog", ask)
        await page.reload()
        # Either it is there again, or the browser has asked before it was lost.
        kept = await page.locator("#text").input_value()
        assert (kept, asked) == (("", ["beforeunload"]) if script else ("not sent", []))


@on_pages
async def test_page_and_somebody_else(mongo, chromium):
    """What one has not sent is not sent, and not shown, under another login."""
    async with (
        Chat(MONGODB_URI=mongo()) as chat,
        people(chat, "mallory") as [other],
        tab(chromium, chat, "anna") as page,
    ):
        cookie = (await other.form("/login")).cookies["chat"].value
        chat.kill()
        await type_in(page, "a secret")
        await page.keyboard.type("a draft")
        await expect(page.locator("#unsent li")).to_have_count(1)
        # Before the page is back, the cookie becomes another one's.
        await page.context.add_cookies([{"name": "chat", "value": cookie, "url": chat.url}])
        chat.start()
        await expect(page.locator("#chat")).to_have_attribute("data-user", "mallory")
        await expect(page.locator("#text")).to_have_value("")
        await type_in(page, "hello")
        await wait_for_texts(page, "hello")
        assert "a secret" not in await page.content()
        await page.context.clear_cookies()
        await page.goto(chat.url + "/login")
        await fill_form(page, "anna")
        await page.wait_for_url(chat.url + "/")
        await wait_for_texts(page, "hello", "a secret")
        await expect(page.locator("#messages b").last).to_have_text("anna")
        await expect(page.locator("#text")).to_have_value("a draft")


@on_pages
async def test_page_without_javascript_and_its_weight(mongo, chromium):
    uri = mongo()
    wanted = history_of(uri, 51)
    async with Chat(MONGODB_URI=uri) as chat:
        async with tab(chromium, chat, java_script_enabled=False) as page:
            assert await texts(page) == wanted[1:]
            await page.locator("#older").click()
            assert await texts(page) == wanted[:1]
            await page.get_by_role("button", name="Log out").click()
            await page.wait_for_url(chat.url + "/login")
        async with tab(chromium, chat) as page:
            state = await page.context.storage_state()
            page = await (await chromium.new_context(storage_state=state)).new_page()
            sizes = []

            async def note(answer):
                sizes.append(len(await answer.body()) if answer.status == 200 else 0)

            page.on("response", note)
            await page.goto(chat.url, wait_until="networkidle")
            async with asyncio.timeout(PATIENCE):
                while len(sizes) < 4:
                    await asyncio.sleep(0.05)
            assert len(sizes) <= 5 and 1000 < sum(sizes) < 45_000, sizes
            again = "performance.getEntriesByType('resource').map(each => each.transferSize)"
            await page.goto(chat.url, wait_until="networkidle")
            assert sum(await page.evaluate(again)) == 0  # from the cache
            await page.context.close()


# ---------------------------------------------------------------------------
# The tutorial against the code
# ---------------------------------------------------------------------------
# A link into a file with lines has the form  [`name`](../chat.py#L1)  and may be followed
# by an excerpt of that definition (a `python` or `js` block); in other files the name is what
# the line contains. An `sh` block has commands, and the `text` block right after it what they
# print. An exercise stands in <details>: its `diff` blocks are applied to a copy of the chat,
# and its commands run there. In the commands, 8080 is the chat's port, and 8000 naive.py's.

CHAPTERS = sorted((HERE / "tutorial").glob("[0-9]*.md"))
TEXTS = [HERE / "README.md", HERE / "tutorial" / "README.md", *CHAPTERS]
TEXTS.append(HERE / "tutorial" / "how-it-is-tested.md")
LINK = re.compile(r"!?\[([^\]\n]*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```([\w -]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
each_text = pytest.mark.parametrize("text", TEXTS, ids=lambda text: text.name)


@functools.cache
def definitions(path):
    """The first and last line of each definition in a Python or JavaScript file, by its name."""
    source = path.read_text()
    found = {}
    if path.suffix != ".py":
        pattern = r"^( *)(?:async )?function (\w+).*?^\1}$"
        for match in re.finditer(pattern, source, re.MULTILINE | re.DOTALL):
            first = source.count("\n", 0, match.start()) + 1
            found[match[2]] = first, first + match[0].count("\n")
        return found
    tree = ast.parse(source)
    for parent in (tree, *(each for each in tree.body if isinstance(each, ast.ClassDef))):
        prefix = f"{parent.name}." if parent is not tree else ""
        for each in parent.body:
            if isinstance(each, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                first = min([each.lineno, *(one.lineno for one in each.decorator_list)])
                found[prefix + each.name] = first, each.end_lineno
            elif isinstance(each, (ast.Assign, ast.AnnAssign)) and not prefix:
                for target in getattr(each, "targets", None) or [each.target]:
                    for name in ast.walk(target):
                        if isinstance(name, ast.Name):
                            found[name.id] = each.lineno, each.end_lineno
    return found


def place(path, name):
    """The fragment that a link to a name in a file must have."""
    if name in definitions(path):
        first, last = definitions(path)[name]
        return f"L{first}-L{last}" if last > first else f"L{first}"
    lines = path.read_text().splitlines()
    [line] = [number for number, line in enumerate(lines, 1) if name in line]
    return f"L{line}"


def line_links(text):
    """Each link of a text into a file with lines: the match, its name, path and fragment."""
    for match in LINK.finditer(text.read_text()):
        target, _, fragment = match[2].partition("#")
        if re.match(r"L\d", fragment) and not target.startswith("http"):
            yield match, match[1], (text.parent / target).resolve(), fragment


def put_right():
    """Put all line numbers right; names that are nowhere are left to the tests."""
    for text in TEXTS:
        new = text.read_text()
        for match, name, path, fragment in line_links(text):
            with contextlib.suppress(OSError, ValueError):
                right = match[0].replace("#" + fragment, "#" + place(path, name.strip("`")))
                new = new.replace(match[0], right)
        if new != text.read_text():
            text.write_text(new)
            print(f"{text.relative_to(HERE)}: line numbers put right")


@each_text
def test_line_links(text):
    for _, name, path, fragment in line_links(text):
        assert re.fullmatch("`[^`]+`", name), f"{name}: a link with lines is named `so`"
        assert fragment == place(path, name.strip("`")), f"{name}: python test_chat.py"


def test_every_definition_is_explained():
    chat = HERE / "chat.py"
    links = [link for text in CHAPTERS for link in line_links(text)]
    linked = {name.strip("`") for _, name, path, _ in links if path == chat}
    hidden = {name for name in definitions(chat) if name.endswith("__")}
    assert definitions(chat).keys() - hidden - linked == set()


def pattern(lines):
    """A regular expression for lines; `...` is for what is left out, lines or a part of one."""
    return "".join(
        r"(?:.*\n)*?" if line.strip() == "..." else re.escape(line).replace(r"\.\.\.", ".*") + r"\n"
        for line in lines
    )


@pytest.mark.parametrize("text", CHAPTERS, ids=lambda text: text.name)
def test_excerpts(text):
    for fence in FENCE.finditer(text.read_text()):
        if fence[1] in ("python", "js"):
            suffix = {"python": ".py", "js": ".js"}[fence[1]]
            before = [each for each in line_links(text) if each[0].end() < fence.start()]
            _, name, path, _ = [each for each in before if each[2].suffix == suffix][-1]
            first, last = definitions(path)[name.strip("`")]
            lines = "\n".join(path.read_text().splitlines()[first - 1 : last])
            excerpt = re.compile("^" + pattern(fence[2].splitlines()), re.MULTILINE)
            assert excerpt.search(lines + "\n"), f"{name}: {fence[2]}"


def test_chapters_are_the_sections():
    sections = re.findall(r"^# (\d+)\. (.*)$", (HERE / "chat.py").read_text(), re.MULTILINE)
    heads = [re.match(r"# (\d+)\. (.*)", each.read_text()).groups() for each in CHAPTERS]
    assert sections == heads
    assert [int(each.name[:2]) for each in CHAPTERS] == list(range(1, 11))
    assert [int(number) for number, _ in sections] == list(range(1, 11))


def anchors(markdown):
    """The sections of a text, by their anchors."""
    _, *parts = re.split(r"^#+ (.*)$", FENCE.sub("", markdown), flags=re.MULTILINE)
    names = [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in parts[::2]]
    return dict(zip(names, parts[1::2], strict=True))


@each_text
def test_no_dead_links(text):
    for match in LINK.finditer(FENCE.sub("", text.read_text())):
        target, _, fragment = match[2].partition("#")
        if target.startswith(("http:", "https:")):
            continue
        path = (text.parent / target).resolve() if target else text
        assert path.exists(), match[0]
        if fragment and not re.match(r"L\d", fragment):
            assert fragment in anchors(path.read_text()), match[0]


def prose(markdown):
    """What a reader reads as sentences: no code, no headings, no links to what comes later."""
    markdown = re.sub(r"`[^`\n]*`", "", FENCE.sub("", markdown))
    kept = re.sub(
        r"^(#|\*\*The question|Next:|←|\[The tutorial\]).*\n", "", markdown, flags=re.MULTILINE
    )
    return LINK.sub(r"\1", kept)


def test_terms():
    """The terms at the end of tutorial/README.md first appear, in bold, where the table says."""
    how_to_read, *chapters = TEXTS[1:]
    intro, _, table = how_to_read.read_text().partition("## Terms")
    earlier = re.sub(r"^\|.*\n", "", prose(intro), flags=re.MULTILINE)
    rows = re.findall(r"^\| \*\*(.+?)\*\* \|.*\]\((\d[^)#]+)#?(.*?)\) \|$", table, re.MULTILINE)
    assert len(rows) > 20
    texts = {text.name: text.read_text() for text in chapters}
    for term, name, anchor in rows:
        word = rf"(?<![\w-]){re.escape(term)}(s|es)?\b"
        before = earlier + "".join(prose(texts[each]) for each in sorted(texts) if each < name)
        assert not re.search(word, before, re.IGNORECASE), f"{term}: used before {name}"
        first = re.search(rf"(\*\*)?{word}(\*\*)?", prose(texts[name]), re.IGNORECASE)
        assert first and first[0].startswith("**") and first[0].endswith("**"), f"{term}: {first}"
        assert not anchor or f"**{first[0].strip('*')}**" in anchors(texts[name])[anchor], term


def commands(markdown):
    """The `sh` blocks of a text: the kind, the commands, and what they print."""
    fences = list(FENCE.finditer(markdown))
    for fence, after in zip(fences, [*fences[1:], None], strict=True):
        if fence[1].startswith("sh"):
            is_output = (
                after and after[1] == "text" and not markdown[fence.end() : after.start()].strip()
            )
            yield fence[1], fence[2], after[2] if is_output else ""


@each_text
def test_commands_can_be_pasted(text):
    """In zsh, too, where a # begins no comment, and an exclamation mark recalls a command."""
    for _, block, _ in commands(text.read_text()):
        assert not re.search(r"(^|\s)#|(?<!\$)!|^[$>] ", block, re.MULTILINE), block
        for shell in filter(shutil.which, ("bash", "zsh")):
            subprocess.run([shell, "-n", "-c", block], check=True)


def run_commands(blocks, house):
    """Run `sh` blocks beside a chat (and naive.py): do they print what is shown?"""
    own_environment = {name: os.environ[name] for name in os.environ.keys() - SETTINGS}
    own_environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    naive = Chat(house, [sys.executable, "-u", "tutorial/naive.py", "0"])
    output = house / "output"
    if not blocks:
        return
    with contextlib.ExitStack() as stack, Chat(house) as chat:
        own_environment |= {"DB": chat.database, "PORT": chat.env["PORT"]}
        ports = {"8080": chat.env["PORT"]}
        if any("8000" in block for _, block, _ in blocks):
            stack.callback(naive.start().kill)  # it may leave tracebacks
            ports["8000"] = naive.env["PORT"]
        for kind, block, shown in blocks:
            if kind != "sh":
                continue  # this one is for people: it goes on running, for example
            command = re.sub(r"\b80[08]0\b", lambda port: ports[port[0]], block)
            with output.open("w") as file:
                process = subprocess.Popen(
                    ["bash", "-c", command],
                    cwd=house,
                    env=own_environment,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                stack.callback(end_group, process)
                process.wait(PATIENCE)
            printed = "".join(f"{line.rstrip()}\n" for line in output.read_text().splitlines())
            for told, real in ports.items():
                printed = printed.replace(real, told)
            same = re.fullmatch(pattern(shown.splitlines()), printed)
            assert same, f"{block}\n{printed}"


def end_group(process):
    """End what a command has left running."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def apply_diffs(markdown, house):
    """Apply `diff` blocks. What stays and what goes must stand exactly once in the file."""
    for fence in FENCE.finditer(markdown):
        if fence[1] == "diff":
            lines = fence[2].splitlines(keepends=True)
            head = lines.pop(0)[4:].strip() if lines[0].startswith("--- ") else "chat.py"
            old = "".join(line[1:] or "\n" for line in lines if line[0] != "+")
            new = "".join(line[1:] or "\n" for line in lines if line[0] != "-")
            source = "\n" + (house / head).read_text()
            assert source.count("\n" + old) == 1, f"{head}:\n{old}"
            (house / head).write_text(source.replace("\n" + old, "\n" + new)[1:])


@pytest.mark.parametrize("part", ["chapter", "exercise"])
@pytest.mark.parametrize("text", CHAPTERS, ids=lambda text: text.name)
def test_commands(house, text, part):
    """What a chapter's commands print is what it shows; and so it is after its exercise."""
    (house / "tutorial").mkdir()
    for script in (HERE / "tutorial").glob("*.py"):
        shutil.copy(script, house / "tutorial")
    pieces = re.split(r"</?details>", text.read_text())
    markdown = "".join(pieces[1::2] if part == "exercise" else pieces[::2])
    apply_diffs(markdown, house)
    blocks = list(commands(markdown))
    assert blocks or part == "chapter", "an exercise has a command that shows its effect"
    run_commands(blocks, house)


SCRIPT = "<img src=x onerror=alert(1)>"


@on_pages
async def test_flaws_of_the_naive_chat(chromium):
    """The flaws of naive.py that no command of chapter 1 shows."""
    naive = Chat(command=[sys.executable, "-u", "tutorial/naive.py", "0"])
    other = Chat(command=naive.command)
    async with naive, other:
        ann, ben, cleo = [await chromium.new_page() for _ in range(3)]
        boxes = []
        for page, url in ((ann, naive.url), (ben, naive.url), (cleo, other.url)):
            page.on("dialog", lambda box: (boxes.append(box.message), box.dismiss())[1])
            await page.goto(url)

        async def write(page, user, text):
            await page.locator("#user").fill(user)
            await page.locator("#text").fill(text)
            await page.get_by_role("button").click()
            await expect(page.locator("#text")).to_have_value("")  # as if it had been sent

        await write(ann, "Ben", "It is me, Ben.")  # nobody knows who writes
        await expect(ben.locator("p")).to_have_text("Ben: It is me, Ben.")
        await write(ann, "Ann", SCRIPT)  # a script in a message runs
        async with asyncio.timeout(PATIENCE):
            while boxes != ["1", "1"]:
                await asyncio.sleep(0.05)
        await write(cleo, "Cleo", "Hello?")  # a second process is a second chat
        await expect(cleo.locator("p")).to_have_text("Cleo: Hello?")
        await ben.reload()
        await expect(ben.locator("p")).to_have_count(2)
        assert await naive.end(signal.SIGINT, PATIENCE) == 0
        await write(ann, "Ann", "lost")  # a lost connection loses a message
        naive.command = [*naive.command[:-1], naive.env["PORT"]]
        await asyncio.to_thread(naive.start)
        await ben.reload()  # a restart forgets everything
        await write(ben, "Ben", "Is anybody here?")
        await expect(ben.locator("p")).to_have_text("Ben: Is anybody here?")


@asynchronous
async def test_who_writes_and_what(chat):
    """Flaws six and seven of naive.py: chat.py has neither."""
    async with people(chat, None, None) as (ann, ben):
        await asyncio.gather(ann.connect("new"), ben.connect("new"))
        await ann.ws.send_json({"user": ben.login, "text": SCRIPT})
        await ben.until(lambda: ben.seen)
        assert [(each["user"], each["text"]) for each in ben.seen] == [(ann.login, SCRIPT)]
        page = await (await ben.ask("/")).text()
        assert "<img" not in page and "&lt;img src=x" in page


# ---------------------------------------------------------------------------
# The tutorial in one window
# ---------------------------------------------------------------------------

READER = HERE / "tutorial" / "index.html"
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "reduced_motion": "reduce"}
DESKTOP = {"viewport": {"width": 1440, "height": 900}, "reduced_motion": "reduce"}


def build_reader(folder=HERE):
    subprocess.run([sys.executable, folder / "tutorial" / "build.py"], check=True)


@contextlib.contextmanager
def web_server():
    """Any web server: it knows nothing of the page. The URL of the page."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=HERE / "tutorial")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@contextlib.asynccontextmanager
async def reader(it, url, **options):
    """The page. It must not complain about anything, nor ask for anything but itself."""
    context = await it.new_context(**options)
    page = await context.new_page()
    complaints = []
    context.on("weberror", lambda error: complaints.append(str(error.error)))
    context.on("console", lambda line: complaints.append(line.text))
    context.on("request", lambda each: each.url == url or complaints.append(each.url))
    await page.goto(url)
    yield page
    assert complaints == []
    await context.close()


def test_reader_is_up_to_date(tmp_path):
    copy_house(tmp_path)
    shutil.copytree(HERE / "tutorial", tmp_path / "tutorial", dirs_exist_ok=True)
    build_reader(tmp_path)
    content = (tmp_path / "tutorial" / "index.html").read_bytes()
    assert content == READER.read_bytes(), "python test_chat.py"
    assert len(content) <= 400_000


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text.name)
def test_github_can_publish(text):
    """GitHub Pages takes Markdown for a template, and `{%` for a tag, if it is not called raw."""
    rest = re.sub(r"{% raw %}.*?{% endraw %}", "", text.read_text(), flags=re.DOTALL)
    assert "{%" not in rest and "{{" not in rest


DEAD_LINKS = """[...document.querySelectorAll("a[href^='#']")].map((link) => link.hash.slice(1))
  .filter((id) => document.querySelectorAll(`[id="${decodeURIComponent(id)}"]`).length !== 1)"""
# Follows each link into the code. Tells what is marked, whether it is in view (as much of it as
# there is room for, and nothing covers its first line), and whether the focus has gone along.
FOLLOW_ALL = """[...document.querySelectorAll("main a.to-code")].map((link) => {
  link.click();
  const marked = document.querySelectorAll(".marked"), lines = marked[0];
  const box = lines.getBoundingClientRect();
  const view = document.getElementById("files").getBoundingClientRect();
  const seen = Math.min(box.bottom, view.bottom) - box.top;
  const top = document.elementFromPoint(view.left + 80, box.top + 5);
  return {
    target: link.hash.slice(1),
    text: lines.textContent,
    good: marked.length === 1 && lines.contains(top) && seen >= Math.min(box.height, view.height / 2)
      && document.activeElement === lines && link.ariaCurrent === "true",
  };
})"""


@on_pages
@pytest.mark.parametrize("options", [DESKTOP, PHONE], ids=["file, desktop", "http, phone"])
async def test_reader_links(chromium, options):
    """Each link brings its very lines into view. And the code can be copied as it is."""
    with web_server() as url:
        async with reader(
            chromium, READER.as_uri() if options is DESKTOP else url, **options
        ) as page:
            assert await page.evaluate(DEAD_LINKS) == []
            links = await page.evaluate(FOLLOW_ALL)
            assert [link["target"] for link in links if not link["good"]] == []
            for link in links:
                name, _, fragment = link["target"].partition(":")
                if numbers := [int(number) for number in re.findall(r"\d+", fragment)]:
                    lines = (HERE / name).read_text().splitlines(keepends=True)
                    assert link["text"] == "".join(lines[numbers[0] - 1 : numbers[-1]]), link
            wanted = {
                f"{path.relative_to(HERE)}:{fragment}"
                for text in TEXTS[1:]
                for _, _, path, fragment in line_links(text)
                if path.name != "test_chat.py"
            }
            assert wanted <= {link["target"] for link in links}
            for name in ("chat.py", "static/chat.js"):
                copied = await page.evaluate(
                    """(name) => {
                      getSelection().selectAllChildren(document.getElementById(name).lastChild);
                      return getSelection().toString();
                    }""",
                    name,
                )
                assert copied.rstrip() == (HERE / name).read_text().rstrip()


@on_pages
async def test_reader_desktop(chromium):
    """Keyboard, history, memory: the text leads the code, and the code leads back."""
    with web_server() as url:
        async with reader(chromium, url, **DESKTOP) as page:
            marked, focused = page.locator(".marked"), page.locator(":focus")
            links = page.locator("[id='06-databases'] p > .to-code")
            first, second = [await links.nth(number).get_attribute("href") for number in (1, 2)]
            await links.nth(1).focus()
            await page.keyboard.press("Enter")
            await expect(focused).to_have_id(first[1:])
            await links.nth(2).click()
            await expect(marked).to_have_id(second[1:])
            # Back and forward, from one place in the code to another.
            await page.go_back()
            await expect(marked).to_have_id(first[1:])
            await expect(marked).to_be_in_viewport()
            await expect(page).to_have_url(url + first)
            await page.go_forward()
            await expect(marked).to_have_id(second[1:])
            await expect(focused).to_have_id(second[1:])
            # Escape leads to the link, and a link in the code to every place that explains it.
            await page.keyboard.press("Escape")
            await expect(links.nth(2)).to_be_focused()
            # That marks its own lines, and does not move the code.
            back, code = page.locator(f"[id='{first[1:]}'] .back").last, "pane.scrollTop"
            explained = (await back.get_attribute("href"))[1:]
            await back.scroll_into_view_if_needed()
            before = await page.evaluate(code)
            await back.click()
            await expect(focused).to_have_id(explained)
            await expect(focused).to_be_in_viewport()
            assert await focused.get_attribute("href") == first
            await expect(marked).to_have_id(first[1:])
            assert await page.evaluate(code) == before
            # The two tables of contents. The history knows where the text was.
            text = "document.querySelector('main').scrollTop"
            before = await page.evaluate(text)
            for menu, title in (("Contents of the code", "8."), ("Chapters", "7.")):
                await page.get_by_role("button", name=menu).click()
                await page.get_by_role("navigation", name=menu).get_by_text(title).click()
                await expect(page.get_by_role("button", name=menu)).to_contain_text(title)
            await expect(page.locator("article[id^='07']")).to_be_focused()
            await expect(marked).to_contain_text("# 7.")  # the code has come along
            await page.go_back()
            await becomes_true(page, f"{text} === {before}")
            await expect(marked).to_contain_text("# 8.")
            await page.go_forward()
            await expect(page.locator("article[id^='07'] h1")).to_be_in_viewport()
            # When the text is scrolled, the code follows. Its end is read, and that is remembered.
            await page.mouse.move(300, 500)
            await page.mouse.wheel(0, 900)
            await expect(marked).not_to_contain_text("# 7.")
            await expect(marked).to_be_in_viewport()
            await page.locator("article[id^='07']").evaluate("each => each.scrollIntoView(false)")
            await expect(page.locator("nav a.read")).to_contain_text("7.")
            await expect(marked).to_have_count(0)  # its last sections explain no code
            # Lines that were chosen stay marked when the text moves a bit.
            chosen = (await links.nth(6).get_attribute("href"))[1:]
            await links.nth(6).click()
            await becomes_true(page, f"history.state.text === {text}")
            before = await page.evaluate(text)
            await page.mouse.wheel(0, 20)
            await becomes_true(page, f"{text} === {before} + 20 && history.state.text === {text}")
            await expect(marked).to_have_id(chosen)
            # A narrow window shows the same paragraph, and so does the wide one after it.
            heading = await page.evaluate("localStorage['tutorial-heading']")
            for width in (820, 1440):
                await page.set_viewport_size({"width": width, "height": 900})
                await expect(links.nth(6)).to_be_in_viewport()
                await becomes_true(page, "history.state.text === scroller().scrollTop")
                assert await page.evaluate("localStorage['tutorial-heading']") == heading
            await page.get_by_role("separator").press("ArrowLeft")
            width = await page.get_by_role("separator").get_attribute("aria-valuenow")
            await becomes_true(page, f"history.state.text === {text}")
            before = await page.evaluate(text)
            id = await marked.get_attribute("id")
            await page.reload()
            await expect(marked).to_have_id(id)
            await expect(page.locator("nav a.read")).to_have_count(1)
            assert await page.evaluate(text) == before
            await expect(page.get_by_role("separator")).to_have_attribute("aria-valuenow", width)
            # Commands can be copied.
            await page.context.grant_permissions(["clipboard-read", "clipboard-write"])
            block = page.locator(".block.sh").first
            await block.get_by_role("button").click()
            copied = await page.evaluate("navigator.clipboard.readText()")
            assert copied == await block.locator("pre").text_content()
            await has_no_barriers(page, ["dark"], "{exclude: ['section + section']}")


@on_pages
async def test_reader_phone(chromium):
    """The code is a sheet over the text."""
    async with reader(chromium, READER.as_uri(), **PHONE) as page:
        code, links = page.get_by_role("complementary"), page.locator("main .to-code")
        await expect(code).to_be_hidden()
        await links.nth(3).tap()
        await expect(page.locator(".marked")).to_be_in_viewport()
        await has_no_barriers(page, ["light"], "{exclude: ['pre', 'article:nth-of-type(n+4)']}")
        await page.keyboard.press("Escape")
        await expect(code).to_be_hidden()
        await expect(links.nth(3)).to_be_focused()
        await page.get_by_role("button", name="Code").tap()
        await expect(page.locator(".marked")).to_be_in_viewport()
        await page.go_back()
        await expect(code).to_be_hidden()
        for width in (390, 320):
            await page.set_viewport_size({"width": width, "height": 600})
            assert not await page.evaluate("document.documentElement.scrollWidth > innerWidth")


@on_pages
async def test_reader_without_javascript(chromium):
    """First the text, then the code."""
    async with reader(chromium, READER.as_uri(), **DESKTOP, java_script_enabled=False) as page:
        parts = await page.locator("article, #files section").all()
        tops = [(await part.bounding_box())["y"] for part in parts]
        assert tops == sorted(tops) and len(set(tops)) == len(parts) > 11
        link = page.locator("main .to-code").nth(3)
        await link.click()
        target = page.locator(f"[id='{(await link.get_attribute('href'))[1:]}']")
        await expect(target).to_be_in_viewport()
        await page.go_back()
        await expect(link).to_be_in_viewport()


if __name__ == "__main__":
    put_right()
    build_reader()
