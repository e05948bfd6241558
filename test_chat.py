"""Every promise of the chat, checked from outside, and the tutorial against the code.

``pytest`` runs it all: against real processes of the chat, a database that speaks
MongoDB's protocol (SecantusDB, or the one that MONGODB_URI names), and a real Chromium.
``python test_chat.py`` puts the tutorial's line numbers right.
"""

import ast
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
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import pymongo
import pytest
from playwright.async_api import async_playwright, expect

HERE = Path(__file__).resolve().parent
KEY = "a secret key for tests only"
PASSWORD = "correct horse battery"


def asynchronous(test):
    """Run a test that is a coroutine, in an event loop of its own."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        return asyncio.run(test(*args, **kwargs))

    return run


# ---------------------------------------------------------------------------
# The parts: a chat, a database, a proxy, people
# ---------------------------------------------------------------------------


def free_port():
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        return it.getsockname()[1]


class Chat:
    """A process of the chat. Settings are the environment's; the port is any free one."""

    def __init__(self, folder=HERE, command=(sys.executable, "chat.py"), **settings):
        names = {"MONGODB_URI", "SECRET_KEY", "HOST", "PORT", "HTTPS"}
        env = {name: value for name, value in os.environ.items() if name not in names}
        self.env = env | {"SECRET_KEY": KEY, "PORT": "0"} | settings
        self.folder, self.command = folder, command
        self.process = self.url = self.database = None

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.kill()

    async def __aenter__(self):
        return await asyncio.to_thread(self.start)  # a proxy in this event loop goes on

    async def __aexit__(self, *_):
        self.kill()

    def spawn(self):
        """Start it, without waiting for it to listen."""
        self.process = subprocess.Popen(
            self.command,
            cwd=self.folder,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return self.process

    def start(self):
        """Start it, and wait for the line with its address. The next time it keeps its port."""
        self.printed = []
        for line in self.spawn().stdout:
            self.printed.append(line)
            if "mongodb://" in line:
                self.database = re.search(r"mongodb://\S+", line)[0]
            if found := re.search(r"http://[^ ]*:(\d+)", line):
                self.url, self.env["PORT"] = f"http://127.0.0.1:{found[1]}", found[1]
                return self
        raise AssertionError("the chat did not start: " + "".join(self.printed))

    def kill(self):
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()


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
        end = time.monotonic() + 20
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


@pytest.fixture(scope="module")
def chat(mongo):
    """One chat for all tests that do not break it."""
    with Chat(MONGODB_URI=mongo()) as it:
        yield it


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


@pytest.fixture(scope="session", autouse=True)
def begun(request, tmp_path_factory):
    """What takes long and mostly waits is begun at once, beside the other tests."""
    wanted = {item.originalname for item in request.session.items}
    folder, results = tmp_path_factory.mktemp, {}
    with ThreadPoolExecutor(3) as pool:
        if "test_commands" in wanted:
            for text in CHAPTERS:
                results[text] = pool.submit(run_commands, text, folder(text.stem))
        if "test_requirements_are_enough" in wanted:
            results["python"] = pool.submit(install_requirements, folder("environment"))
        yield results


class Proxy:
    """A TCP proxy between chat and database that can be cut, slow, or deaf."""

    def __init__(self, port):
        self.target, self.delay, self.deaf, self.writers = port, 0, False, set()

    async def __aenter__(self):
        self.port = free_port()
        await self.open()
        return self

    async def __aexit__(self, *_):
        await self.cut()

    async def open(self):
        self.delay, self.deaf = 0, False
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", self.port)

    async def cut(self):
        self.server.close()
        for writer in list(self.writers):
            writer.transport.abort()
        await asyncio.sleep(0.05)

    async def serve(self, reader, writer):
        there, here = await asyncio.open_connection("127.0.0.1", self.target)
        self.writers |= {writer, here}
        await asyncio.gather(self.pump(reader, here), self.pump(there, writer))
        self.writers -= {writer, here}

    async def pump(self, reader, writer):
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                await asyncio.sleep(self.delay)
                if not self.deaf:
                    writer.write(data)
        with contextlib.suppress(OSError):
            writer.close()


class Person:
    """Somebody with a cookie jar, and a WebSocket whose messages are kept in a list."""

    def __init__(self, chat, login=None):
        self.chat, self.login = chat, login or "u" + secrets.token_hex(5)
        self.seen, self.errors, self.others = [], [], []
        self.ws = self.reading = None

    async def __aenter__(self):
        self.http = aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True))
        return self

    async def __aexit__(self, *_):
        if self.reading:
            self.reading.cancel()
        await self.http.close()

    async def ask(self, path, method="GET", **options):
        options = {"allow_redirects": False} | options
        async with self.http.request(method, self.chat.url + path, **options) as answer:
            await answer.read()
            return answer

    async def form(self, path, login=None, password=PASSWORD, **options):
        fields = {"login": self.login if login is None else login, "password": password}
        return await self.ask(path, "POST", data=fields, **options)

    async def sign_up(self):
        answer = await self.form("/signup")
        assert answer.status == 303, await answer.text()
        return self

    def open(self, after="", **options):
        url = f"{self.chat.url}/ws" + ("" if after is None else f"?after={after}")
        return self.http.ws_connect(url, **options)

    async def connect(self, after=None):
        """Open the WebSocket after what was seen, and read it in the background."""
        if after is None:
            after = self.seen[-1]["id"] if self.seen else 0
        self.ws = await self.open(after, max_msg_size=0)
        self.reading = asyncio.create_task(self.read())
        return self

    async def read(self):
        async for frame in self.ws:
            for event in json.loads(frame.data):
                kind = {"message": self.seen, "error": self.errors}
                kind.get(event["type"], self.others).append(event)

    async def say(self, text, key=None):
        await self.ws.send_json({"text": text, "key": key or secrets.token_hex(8)})

    async def until(self, condition, seconds=10):
        """Wait until something is so."""
        end = time.monotonic() + seconds
        while not condition():
            told = f"{self.login}: {len(self.seen)} seen, {self.errors[-2:]}, {self.others[-4:]}"
            assert time.monotonic() < end, told
            await asyncio.sleep(0.02)

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
                    for event in self.seen[-200:]:
                        waiting.pop(event["key"], None)
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


def stored(uri):
    """What the database holds: (number, user, key, text) of each message, in order."""
    with pymongo.MongoClient(uri) as client:
        found = client.get_default_database().messages.find()
        return sorted((each["_id"], each["user"], each["key"], each["text"]) for each in found)


def shown(person):
    return [(each["id"], each["user"], each["key"], each["text"]) for each in person.seen]


async def history(person):
    """All messages that the pages of /messages hold, from the first."""
    messages, before = [], 10**9
    while page := (await (await person.ask(f"/messages?before={before}")).json())["messages"]:
        messages, before = page + messages, page[0]["id"]
    return messages


# ---------------------------------------------------------------------------
# Pages
# ---------------------------------------------------------------------------


@asynchronous
@pytest.mark.parametrize(
    "path, anonymous, signed_in",
    [
        ("/", 303, 200),
        ("/messages?before=1", 303, 200),
        ("/messages", 303, 400),
        ("/messages?before=x", 303, 400),
        ("/messages?before=1_0", 303, 400),
        ("/messages?before=" + "9" * 99, 303, 200),
        ("/ws", 401, 400),
        ("/ws?after=x", 401, 400),
        ("/login", 200, 303),
        ("/signup", 200, 303),
        ("/static/chat.css", 200, 200),
        ("/static/none", 404, 404),
        ("/static/%00", 404, 404),
        ("/nothing", 404, 404),
    ],
)
async def test_pages(chat, path, anonymous, signed_in):
    async with Person(chat) as person:
        for turn, status in enumerate((anonymous, signed_in)):
            for method in ("GET", "HEAD"):
                answer = await person.ask(path, method)
                assert answer.status == status, (method, path)
                policy = answer.headers["Content-Security-Policy"]
                assert "default-src 'none'" in policy and "unsafe" not in policy
                assert answer.headers["X-Content-Type-Options"] == "nosniff"
                assert answer.headers["Referrer-Policy"] == "same-origin"
                assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
                assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
                cached = "no-cache" if path.startswith("/static") else "no-store"
                assert answer.headers["Cache-Control"] == cached
                if status == 303:
                    home = "/" if path in ("/login", "/signup") else "/login"
                    assert answer.headers["Location"] == home
                elif status >= 400 and method == "GET" and not path.startswith("/static"):
                    assert '<link rel="stylesheet"' in await answer.text()
            if turn == 0:
                await person.sign_up()


@asynchronous
async def test_methods(chat):
    async with Person(chat) as person:
        for path, method, allowed in (
            ("/", "POST", {"GET", "HEAD"}),
            ("/login", "PUT", {"GET", "HEAD", "POST"}),
            ("/logout", "GET", {"POST"}),
        ):
            answer = await person.ask(path, method)
            assert answer.status == 405
            assert set(answer.headers["Allow"].split(",")) == allowed


@asynchronous
async def test_sign_up(chat):
    name = secrets.token_hex(3)
    async with Person(chat) as person:
        for login, password, status, field in (
            ("ab", PASSWORD, 400, "login"),
            ("a" * 21, PASSWORD, 400, "login"),
            ("no spaces", PASSWORD, 400, "login"),
            ("a<b>" + name, PASSWORD, 400, "login"),
            ("good_" + name, "1234567", 400, "password"),
            ("good_" + name, "x" * 201, 400, "password"),
            ("Straße_" + name, "ж" * 200, 303, None),
            ("STRASSE_" + name, PASSWORD, 409, "login"),
            ("ｓｔｒａｓｓｅ_" + name, PASSWORD, 409, "login"),
        ):
            person.http.cookie_jar.clear()
            answer = await person.form("/signup", login, password)
            assert answer.status == status, login
            if field:
                page = await answer.text()
                assert 'role="alert"' in page and password not in page
                inputs = re.findall("<input[^>]*>", page)
                [bad] = [each for each in inputs if 'aria-invalid="true"' in each]
                assert f'name="{field}"' in bad
                if "<" not in login:
                    assert f'value="{login}"' in page
                else:
                    assert "a&lt;b&gt;" in page
        # Any spelling logs in; shown is the one that was signed up.
        assert (await person.form("/login", "strasse_" + name, "ж" * 200)).status == 303
        assert f'data-user="Straße_{name}"' in await (await person.ask("/")).text()


@asynchronous
async def test_forms_that_cannot_be_read(chat):
    async with Person(chat) as person:
        kind = "application/x-www-form-urlencoded"
        for data, content_type in (
            (b"login=\xff&password=\xff", kind),
            (b"login=a&password=b", kind + "; charset=nonsense"),
            (b"login=%2B2AA-&password=b", kind + "; charset=utf-7"),
            (b"--x\r\nbroken", "multipart/form-data; boundary=x"),
            (b"--x\r\nbroken: \r\n\r\nx", "multipart/form-data; boundary=x"),
            (b"login=a", "multipart/form-data"),
            (b"login=a", "application/json"),
        ):
            headers = {"Content-Type": content_type}
            answer = await person.ask("/login", "POST", data=data, headers=headers)
            assert answer.status in (400, 401), data
        for path in ("/login", "/signup"):
            assert (await person.form(path, "x" * 66000)).status == 413
        await person.sign_up()
        answer = await person.ask("/logout", "POST", data=b"x" * 66000)
        assert answer.status == 413


@asynchronous
async def test_ten_wrong_passwords(chat):
    async with people(chat, "A" + secrets.token_hex(4)) as [person]:
        person.http.cookie_jar.clear()
        names = [person.login.upper(), person.login.lower()]
        tries = [person.form("/login", names[n % 2], "wrong password") for n in range(14)]
        answers = Counter([answer.status for answer in await asyncio.gather(*tries)])
        assert answers == {401: 10, 429: 4}
        answer = await person.form("/login")  # the right password
        assert answer.status == 429 and 0 < int(answer.headers["Retry-After"]) <= 300
        # Others are let in, from elsewhere too: the header is not believed without HTTPS=1.
        forged = {"X-Forwarded-For": "192.0.2.1"}
        assert (await person.form("/login", headers=forged)).status == 429
        nobody = "nobody" + secrets.token_hex(4)
        unknown = [person.form("/login", nobody, "wrong password") for _ in range(11)]
        answers = Counter([answer.status for answer in await asyncio.gather(*unknown)])
        assert answers == {401: 10, 429: 1}


@asynchronous
async def test_right_passwords_are_not_counted(chat):
    async with people(chat, None) as [person]:
        answers = await asyncio.gather(*(person.form("/login") for _ in range(15)))
        assert {answer.status for answer in answers} == {303}


@asynchronous
async def test_unknown_login_takes_the_same_time(chat):
    async with people(chat, *[None] * 8) as them:
        taken = {True: [], False: []}
        for person in them:
            for known in (True, False):
                person.http.cookie_jar.clear()
                start = time.perf_counter()
                login = person.login if known else person.login + "x"
                answer = await person.form("/login", login, "wrong password")
                taken[known].append(time.perf_counter() - start)
                assert answer.status == 401
                page = re.sub(r'value="\w+"', "", await answer.text())
        assert "no such login with this password" in page
        assert 0.5 < min(taken[True]) / min(taken[False]) < 2


@asynchronous
async def test_passwords_are_hashed(mongo):
    uri = mongo()
    with Chat(MONGODB_URI=uri) as chat:
        async with people(chat, None):
            with pymongo.MongoClient(uri) as client:
                [user] = client.get_default_database().users.find()
    assert user["password"].startswith("$argon2id$v=19$m=19456,t=2,p=1$")
    assert PASSWORD not in str(user)


@asynchronous
async def test_other_sites_cannot_post(chat):
    async with people(chat, None) as [person]:
        for origin, status in (
            ("http://evil.example", 403),
            ("null", 403),
            (chat.url.replace("http", "https"), 403),
            (chat.url, 303),
        ):
            answer = await person.form("/login", headers={"Origin": origin})
            assert answer.status == status, origin
        with pytest.raises(aiohttp.WSServerHandshakeError, match="403"):
            await person.open(headers={"Origin": "http://evil.example"})


@asynchronous
async def test_session(mongo):
    """The cookie's attributes; a log-out ends the session, not another one of the same user."""
    uri = mongo()
    with Chat(MONGODB_URI=uri) as chat, Chat(MONGODB_URI=uri) as second:
        async with people(chat, None) as [person], Person(chat, person.login) as other:
            await other.form("/login")
            cookie = (await person.form("/login")).headers["Set-Cookie"]
            for word in ("HttpOnly", "SameSite=Lax", "Max-Age=604800", "Path=/"):
                assert word in cookie
            assert person.login not in cookie
            copy = {"Cookie": cookie.split(";")[0]}
            await person.connect()
            await other.connect()
            async with aiohttp.ClientSession() as thief:
                url = second.url + "/messages?before=1"
                async with thief.get(url, headers=copy, allow_redirects=False) as answer:
                    assert answer.status == 200  # sessions hold on every process
                async with thief.ws_connect(second.url + "/ws", headers=copy) as elsewhere:
                    await elsewhere.receive()
                    answer = await person.ask("/logout", "POST")
                    assert (answer.status, answer.headers["Location"]) == (303, "/login")
                    await person.until(lambda: person.ws.close_code == 1008)
                    while (frame := await elsewhere.receive(5)).type is aiohttp.WSMsgType.TEXT:
                        pass
                    assert frame.data == 1008
                for each in (chat, second):
                    url = each.url + "/messages?before=1"
                    async with thief.get(url, headers=copy, allow_redirects=False) as answer:
                        assert answer.status == 303
            await other.say("still here")
            await other.until(lambda: other.seen)
            assert (await person.ask("/logout", "POST")).status == 303


@asynchronous
@pytest.mark.parametrize("value", ["x", "\xff", "gAAAA", '"', "=" * 200])
async def test_unreadable_cookie_is_no_cookie(chat, value):
    async with Person(chat) as person:
        headers = {"Cookie": f"chat={value}"}
        assert (await person.ask("/", headers=headers)).status == 303
        assert (await person.ask("/login", headers=headers)).status == 200


@asynchronous
async def test_history(chat):
    async with people(chat, None) as [person]:
        await person.connect()
        for number in range(60):
            await person.say(f"<b>{number}</b>")
        await person.until(lambda: len([e for e in person.seen if e["user"] == person.login]) == 60)
        last = person.seen[-1]["id"]
        page = await (await person.ask("/")).text()
        assert re.findall(r'data-id="(\d+)"', page) == [str(n) for n in range(last - 49, last + 1)]
        assert "<b>59</b>" not in page and "&lt;b&gt;59&lt;/b&gt;" in page
        older = await (await person.ask(f"/?before={last - 49}")).text()
        assert f'data-id="{last - 50}"' in older and f'data-id="{last - 49}"' not in older
        everything = await history(person)
        assert [each["id"] for each in everything] == list(range(1, last + 1))
        assert everything[-60:] == [e for e in person.seen if e["user"] == person.login]
        answer = await person.ask("/messages?before=-5")
        assert await answer.json() == {"messages": []}


@asynchronous
async def test_static_files(chat):
    async with Person(chat) as person:
        page = await (await person.ask("/login")).text()
        links = re.findall(r'"(/static/[^"]+\?v=[^"]+)"', page)
        assert len(links) == 3
        for link in links:
            answer = await person.ask(link)
            assert answer.headers["Cache-Control"] == "max-age=31536000, immutable"
            answer = await person.ask(link[:-1] + "-")  # a version that this process lacks
            assert answer.headers["Cache-Control"] == "no-cache"


# ---------------------------------------------------------------------------
# The WebSocket
# ---------------------------------------------------------------------------


@asynchronous
async def test_frames(chat):
    async with people(chat, None) as [person], person.open(None) as ws:
        [online] = await ws.receive_json()
        assert online["type"] == "online" and person.login in online["users"]
        for bad, key in (
            ("[", None),
            ("[]", None),
            ("null", None),
            ("[" * 60000, None),
            ("1" * 6000, None),
            ('{"text": 5, "key": "k"}', "k"),
            ('{"text": " \\n ", "key": "k"}', "k"),
            ('{"text": "\\ud800", "key": "k"}', "k"),
            (json.dumps({"text": "x" * 2001, "key": "k"}), "k"),
            ('{"text": "x", "key": 5}', None),
            ('{"text": "x", "key": ""}', ""),
            ('{"text": "x", "key": "\\udc00"}', None),
            (json.dumps({"text": "x", "key": "k" * 65}), "k" * 65),
        ):
            await ws.send_str(bad)
            [error] = await ws.receive_json()
            assert error["type"] == "error" and error["text"] and error.get("key") == key, bad
        for good in ("\0", "x" * 2000, "😀" * 2000, "ж\n  א"):
            await ws.send_json({"text": f"  {good}\n"})
            [message] = await ws.receive_json()
            assert (message["text"], message["user"]) == (good, person.login)
            assert message["key"] and message["time"].endswith("+00:00")
        await ws.send_json({"text": "again", "key": None})
        assert (await ws.receive_json())[0]["id"] == message["id"] + 1
        await ws.send_bytes(b"bytes")
        assert (await ws.receive()).data == 1003
        async with person.open(None) as ws:
            await ws.send_str(" " * 65537)
            while (frame := await ws.receive()).type is aiohttp.WSMsgType.TEXT:
                pass
            assert frame.data == 1009


@asynchronous
async def test_one_client_cannot_stop_the_others(chat):
    """A file without end, a login that takes seconds to normalize, nonsense without pause."""
    async with people(chat, None, None) as [person, bad]:
        await person.connect(10**6)
        for path in ("/static//dev/zero", "/static/%2fdev/zero", "/static/..%2f..%2fdev%2fzero"):
            assert (await person.ask(path)).status in (403, 404)
        login = "a" + "\u0300\u0316" * 16000
        start = time.monotonic()
        await asyncio.gather(*(bad.form(path, login) for path in ("/login", "/signup") * 4))
        assert time.monotonic() - start < 3
        async with bad.open(None) as ws:
            async for _ in ws:
                break

            async def flood():
                while True:
                    await ws.send_str("nonsense")
                    await asyncio.sleep(0)

            floods = asyncio.gather(*(flood() for _ in range(5)))
            start = time.monotonic()
            await person.say("hello")
            await person.until(lambda: person.seen)
            assert time.monotonic() - start < 1
            floods.cancel()


@asynchronous
async def test_pings_without_reading(chat):
    """Promise 5: pongs that nobody reads do not fill the memory either."""
    async with people(chat, None) as [person]:
        ws = await person.open(None, autoping=False)
        ws._conn.transport.pause_reading()
        start = time.monotonic()
        with pytest.raises((OSError, aiohttp.ClientError)):
            while time.monotonic() < start + 20:
                for _ in range(500):
                    await ws.ping(b"x" * 125)
                await asyncio.sleep(0)


@asynchronous
async def test_who_is_online(mongo):
    uri = mongo()
    with Chat(MONGODB_URI=uri) as chat, Chat(MONGODB_URI=uri) as second:
        async with people(chat, "zoe", "Ada", "eve") as [zoe, ada, eve]:
            await zoe.connect()
            ada.chat = second
            await ada.connect()
            await zoe.until(lambda: {"type": "joined", "user": "Ada"} in zoe.others)
            async with ada.open(), eve.open() as ws:  # one more Ada is no news
                [online] = await ws.receive_json()
                assert online["users"] == ["Ada", "eve", "zoe"]  # by code point
                for each in (zoe, ada):
                    joined = {"type": "joined", "user": "eve"}
                    await each.until(lambda each=each, joined=joined: joined in each.others)
            for each in (zoe, ada):
                left = {"type": "left", "user": "eve"}
                await each.until(lambda each=each, left=left: left in each.others)
            await ada.ws.close()
            await zoe.until(lambda: {"type": "left", "user": "Ada"} in zoe.others)
            names = [(each["type"], each.get("user")) for each in zoe.others]
            assert names == [
                ("online", None),
                ("joined", "Ada"),
                ("joined", "eve"),
                ("left", "eve"),
                ("left", "Ada"),
            ]


# ---------------------------------------------------------------------------
# What the chat promises about a message
# ---------------------------------------------------------------------------


@asynchronous
async def test_everybody_has_everything(mongo):
    """Promises 1 to 4 and 8: two processes, people who come and go, a process that is killed."""
    uri, rng, sent = mongo(), random.Random(1), {}
    with Chat(MONGODB_URI=uri) as chat, Chat(MONGODB_URI=uri) as second:
        async with people(chat, *[None] * 12) as them:
            for person in them[::2]:
                person.chat = second
            talking = [
                asyncio.create_task(person.keep_talking(rng, sent, "run")) for person in them
            ]
            for moment in range(20):
                await asyncio.sleep(0.2)
                unlucky = rng.choice(them)
                if unlucky.ws and not unlucky.ws.closed:
                    unlucky.ws.get_extra_info("socket").shutdown(socket.SHUT_RDWR)
                if moment == 10:
                    second.kill()
                    second.start()
            for task in talking:
                task.cancel()
            await asyncio.gather(*talking, return_exceptions=True)
            for person in them:  # a last time, each with all its keys: nothing is stored twice
                await person.connect()
                for (login, key), text in sent.items():
                    if login == person.login:
                        await person.say(text, key)
            truth = []
            while len(truth) < len(sent):
                await asyncio.sleep(0.1)
                truth = stored(uri)
            for person in them:
                # What it sent again it has seen again: here each one counts once.
                await person.until(
                    lambda person=person: len({each["id"] for each in person.seen}) >= len(sent)
                )
                first = sorted({each["id"]: each for each in person.seen}.items())
                person.seen = [each for _, each in first]
                assert shown(person) == truth
            assert [each[0] for each in truth] == list(range(1, len(sent) + 1))
            assert {(user, key): text for _, user, key, text in truth} == sent


@asynchronous
async def test_order_is_the_same_live(mongo):
    """Promise 2: without reconnecting, all lists are equal as they came, on two processes."""
    uri = mongo()
    with Chat(MONGODB_URI=uri) as chat, Chat(MONGODB_URI=uri) as second:
        async with people(chat, *[None] * 10) as them:
            for number, person in enumerate(them):
                person.chat = (chat, second)[number % 2]
                await person.connect()
            await asyncio.gather(*(p.say(f"{n}") for n in range(60) for p in them))
            for person in them:
                await person.until(lambda person=person: len(person.seen) >= 600, 20)
            truth = stored(uri)
            assert [shown(person) for person in them] == [truth] * len(them)
            assert not any(person.errors for person in them)


@asynchronous
async def test_kill_9_loses_nothing(house):
    """Promise 1, with the local database in the same process: ten people, `kill -9`, twice."""
    rng, sent = random.Random(2), {}
    with Chat(house) as chat:
        assert chat.printed[0].startswith("The local database: mongodb://")
        async with people(chat, *[None] * 10) as them:
            for run in range(2):
                tasks = [
                    asyncio.create_task(p.keep_talking(rng, sent, str(run), 0.01)) for p in them
                ]
                await asyncio.sleep(1)
                chat.kill()
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                chat.start()
            everything = await history(them[0])
            assert [each["id"] for each in everything] == list(range(1, len(everything) + 1))
            assert len(everything) > 100
            for person in them:
                assert person.seen and all(each in everything for each in person.seen)


@asynchronous
async def test_nothing_is_missed(chat):
    """Promise 3: who comes back is sent all that it missed, however much, then what is new."""
    async with people(chat, None, None) as [writer, reader]:
        await writer.connect(10**6)
        before = len(await history(writer))
        count = 1300  # more than the chat keeps in memory
        for number in range(count):
            await writer.say(f"{number}")
        await writer.until(lambda: len(writer.seen) >= count, 30)
        for after in (writer.seen[0]["id"], writer.seen[-20]["id"], writer.seen[-1]["id"]):
            reader.seen = []
            await reader.connect(after)
            await writer.say("news")
            want = [*range(after + 1, before + count + 1)]
            await reader.until(lambda: reader.seen and reader.seen[-1]["text"] == "news", 20)
            count += 1
            assert [each["id"] for each in reader.seen][: len(want)] == want
            await reader.ws.close()


@asynchronous
async def test_stored_once(mongo):
    """Promise 4: the same key again, at once and later, from here and there."""
    uri = mongo()
    with Chat(MONGODB_URI=uri) as chat, Chat(MONGODB_URI=uri) as second:
        async with people(chat, None, None) as [person, other]:
            await person.connect()
            for _ in range(5):
                await person.say("once", "same key")
            await person.until(lambda: len(person.seen) == 5)
            assert len({each["id"] for each in person.seen}) == 1
            person.chat = second
            await person.connect()
            await person.say("twice?", "same key")
            await person.until(lambda: len(person.seen) == 6)
            assert person.seen[-1] == person.seen[0]
            await other.connect()
            await other.say("mine", "same key")  # another user's key is another key
            await other.until(lambda: len(other.seen) == 2)
    assert [each[1:] for each in stored(uri)] == [
        (person.login, "same key", "once"),
        (other.login, "same key", "mine"),
    ]


@asynchronous
async def test_slow_reader(chat):
    """Promise 5: who does not read is cut off; the others do not notice; it comes back."""
    async with people(chat, None, None, None) as [writer, reader, slow]:
        await writer.connect(10**6)
        await reader.connect(10**6)
        ws = await slow.open(10**6, max_msg_size=0)
        ws.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        ws._conn.transport.pause_reading()
        longest = 0
        for number in range(4000):
            await writer.say("x" * 1900)
            if number % 100 == 99:
                start = time.monotonic()
                own = (each for each in reader.seen if each["user"] == writer.login)
                while sum(1 for _ in own) <= number and time.monotonic() < start + 20:
                    await asyncio.sleep(0.02)
                    own = (each for each in reader.seen if each["user"] == writer.login)
                longest = max(longest, time.monotonic() - start)
        assert longest < 2
        ws._conn.transport.resume_reading()
        got = 0
        async with asyncio.timeout(10):  # else it was not cut off, and goes on for ever
            async for frame in ws:
                got += len(json.loads(frame.data))
        assert ws.close_code == 1006 and got < 4000
        slow.seen = [reader.seen[0]]
        await slow.connect()
        await slow.until(lambda: len(slow.seen) == len(reader.seen), 20)
        assert slow.seen == reader.seen


@asynchronous
async def test_clean_end(house):
    """Promise 6, on Ctrl-C: 1001, status 0, in time, though somebody does not read."""
    with Chat(house) as chat:
        async with people(chat, *[None] * 4) as [*them, deaf]:
            for person in them:
                await person.connect()
            ws = await deaf.open(None, max_msg_size=0)
            ws._conn.transport.pause_reading()
            for number in range(400):
                await them[0].say("x" * 1000, f"{number}")
            await asyncio.sleep(0.2)
            start = time.monotonic()
            chat.process.send_signal(signal.SIGINT)
            assert await asyncio.to_thread(chat.process.wait, 5) == 0
            assert time.monotonic() - start < 5
            for person in them:
                await person.reading
                assert person.ws.close_code == 1001
            answered = len(them[0].seen) + len(them[0].errors)
            assert answered > 0 and not them[0].errors
            chat.start()
            assert len(await history(them[1])) == len(them[1].seen)


@asynchronous
async def test_clean_end_under_load(mongo):
    """Promise 6, while many send without pause: each message is stored, or answered."""
    async with Chat(MONGODB_URI=mongo()) as chat, contextlib.AsyncExitStack() as stack:
        them = await stack.enter_async_context(people(chat, *[None] * 8))

        async def flood(person):
            await person.connect()
            with contextlib.suppress(OSError, aiohttp.ClientError):
                while True:
                    await asyncio.gather(*(person.say("x") for _ in range(50)))

        floods = [asyncio.create_task(flood(person)) for person in them]
        await asyncio.sleep(1)
        chat.process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(chat.process.wait, 5) == 0
        for each in floods:
            each.cancel()
        for person in them:
            await person.reading
            assert person.ws.close_code in (1001, 1006)


# ---------------------------------------------------------------------------
# The database may fail
# ---------------------------------------------------------------------------


@asynchronous
async def test_the_database_fails(tmp_path_factory):
    """Promise 7: 503 and errors in time; then all goes on, and nothing is stored twice."""
    faults = ("cut", "deaf", "killed")
    await asyncio.gather(*(database_fails(tmp_path_factory.mktemp(each), each) for each in faults))


async def database_fails(folder, fault):
    with Mongo(folder) as mongo:
        async with Proxy(mongo.port) as proxy:
            uri = mongo.uri("chat", proxy.port)
            async with (
                Chat(MONGODB_URI=uri) as chat,
                people(chat, None, None) as [person, other],
            ):
                await person.connect()
                await other.connect()
                await person.say("before", "1")
                await other.until(lambda: other.seen)
                if fault == "cut":
                    await proxy.cut()
                elif fault == "deaf":
                    proxy.deaf = True
                else:
                    mongo.kill()
                start = time.monotonic()
                await person.say("meanwhile", "2")
                async with Person(chat) as stranger:
                    assert (await stranger.ask("/login")).status == 200
                assert time.monotonic() - start < 1
                pages = ["/", "/messages?before=1", "/ws?after=1"] * 10
                answers = await asyncio.gather(*(other.ask(path) for path in pages))
                assert {answer.status for answer in answers} == {503}
                assert time.monotonic() - start < 10
                assert '<link rel="stylesheet"' in await answers[0].text()
                assert (await other.ask("/login")).status == 200  # with a cookie, too
                assert (await other.ask("/static/chat.js")).status == 200
                await person.until(lambda: person.errors)
                assert person.errors[0]["key"] == "2"
                assert time.monotonic() - start < 10
                assert not person.ws.closed and not other.ws.closed
                if fault == "cut":
                    await proxy.open()
                elif fault == "deaf":
                    await proxy.cut()
                    await proxy.open()
                else:
                    mongo.start()
                person.errors = []
                for _ in range(10):
                    await person.say("meanwhile", "2")
                    await asyncio.sleep(1)
                    if len(person.seen) > 1:
                        break
                await other.say("after", "3")
                await other.until(lambda: other.seen[-1]["text"] == "after")
                assert [each["text"] for each in other.seen] == ["before", "meanwhile", "after"]
                assert (await other.ask("/")).status == 200
                direct = mongo.uri("chat")
                assert shown(other) == stored(direct)


@asynchronous
async def test_slow_database_and_a_lost_answer(tmp_path):
    """Promise 7: stored, but the answer got lost: everybody sees it, once."""
    with Mongo(tmp_path) as mongo:
        async with (
            Proxy(mongo.port) as proxy,
            Chat(MONGODB_URI=mongo.uri("chat", proxy.port)) as chat,
            people(chat, None, None) as [person, other],
        ):
            await person.connect()
            await other.connect()
            proxy.delay = 0.2
            await person.say("slowly", "1")
            await other.until(lambda: other.seen)
            # Another process, straight at the database, takes the next number;
            # this is as well what a lost answer of our own looks like.
            with pymongo.MongoClient(mongo.uri("chat")) as client:
                message = client.chat.messages.find_one({"_id": 1})
                message |= {"_id": 2, "key": "2", "text": "unheard"}
                client.chat.messages.insert_one(message)
            await person.say("unheard", "2")
            await other.until(lambda: len(other.seen) == 2, 15)
            await person.until(lambda: [e["id"] for e in person.seen].count(2) == 2)
            assert [each["text"] for each in other.seen] == ["slowly", "unheard"]


@asynchronous
async def test_ends_while_the_database_is_silent(tmp_path):
    """Promise 6: within 10 seconds, with status 0."""
    with Mongo(tmp_path) as mongo:
        async with (
            Proxy(mongo.port) as proxy,
            Chat(MONGODB_URI=mongo.uri("chat", proxy.port)) as chat,
            people(chat, None) as [person],
        ):
            await person.connect()
            proxy.deaf = True
            await person.say("unheard", "1")
            await asyncio.sleep(0.3)
            chat.process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(chat.process.wait, 10) == 0
            await person.reading
            assert [each["key"] for each in person.errors] == ["1"]
            assert person.ws.close_code == 1001


@asynchronous
async def test_a_killed_process_leaves(mongo):
    """Promise 8: its users have left within 60 seconds (here the clock is turned)."""
    uri = mongo()
    with Chat(MONGODB_URI=uri) as chat, Chat(MONGODB_URI=uri) as second:
        async with people(chat, None, None) as [stays, goes]:
            await stays.connect()
            goes.chat = second
            await goes.connect()
            joined = {"type": "joined", "user": goes.login}
            await stays.until(lambda: joined in stays.others)
            second.kill()
            with pymongo.MongoClient(uri) as client:
                [entry] = client.get_default_database().online.find({"users": goes.login})
                left = entry["until"].timestamp() - time.time()
                assert 15 < left < 45  # and it looks every 10 s
                gone = {"$set": {"until": entry["until"].replace(year=2020)}}
                client.get_default_database().online.update_one({"_id": entry["_id"]}, gone)
            await stays.until(lambda: {"type": "left", "user": goes.login} in stays.others, 15)


@asynchronous
async def test_without_change_streams(tmp_path):
    """Promise 8: on a MongoDB that has none it says so, and runs as one process."""
    with Mongo(tmp_path, "--standalone") as mongo, Chat(MONGODB_URI=mongo.uri("chat")) as chat:
        [line] = [line for line in chat.printed if "change streams" in line]
        assert "single process" in line
        async with people(chat, None, None) as [person, other]:
            await person.connect()
            await other.connect()
            await person.say("hello")
            await other.until(lambda: other.seen)
            await other.ask("/logout", "POST")
            await other.until(lambda: other.ws.close_code == 1008)
            left = {"type": "left", "user": other.login}
            await person.until(lambda: left in person.others)


# ---------------------------------------------------------------------------
# Settings, and Heroku
# ---------------------------------------------------------------------------

SECRET = "pass/word@secret"


def test_settings_that_cannot_work(mongo):
    uri, srv = mongo(), "mongodb+srv://me:secret@nowhere.invalid/chat"
    wrong = [
        ({"MONGODB_URI": uri, "PORT": "http"}, "PORT"),
        ({"MONGODB_URI": uri, "PORT": "70000"}, "PORT"),
        ({"MONGODB_URI": uri, "PORT": "-1"}, "PORT"),
        ({"MONGODB_URI": uri, "HOST": "192.0.2.1"}, "HOST"),
        ({"MONGODB_URI": uri, "HOST": "no such host"}, "HOST"),
        ({"MONGODB_URI": uri, "SECRET_KEY": "fifteen letters"}, "SECRET_KEY"),
        ({"MONGODB_URI": f"mongodb://me:{SECRET}@127.0.0.1/chat"}, "MONGODB_URI"),
        ({"MONGODB_URI": "mongodb://u:12/x?hunter2Secret=1@127.0.0.1:1/"}, "MONGODB_URI"),
        ({"MONGODB_URI": "mongodb://127.0.0.1:1/chat"}, "MONGODB_URI"),
        ({"MONGODB_URI": srv}, "MONGODB_URI"),
        ({"MONGODB_URI": "postgres://localhost"}, "MONGODB_URI"),
    ]
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it accepts, and says nothing
        address = f"mongodb://127.0.0.1:{silent.getsockname()[1]}/"
        wrong.append(({"MONGODB_URI": address}, "MONGODB_URI"))
        chats = [(Chat(**settings), hint) for settings, hint in wrong]
        for chat, _ in chats:
            chat.spawn()
        for chat, hint in chats:
            ends_with_one_line(chat, hint)


def ends_with_one_line(chat, hint):
    output, _ = (chat.process or chat.spawn()).communicate(timeout=10)
    assert chat.process.returncode == 1
    assert output.count("\n") == 1 and output.startswith("chat.py: ") and hint in output, output
    for hidden in ("Traceback", "secret@", "word@", "fifteen", "hunter2"):
        assert hidden not in output.lower()


def test_data_in_use_and_a_kept_key(house, mongo):
    with Chat(house, SECRET_KEY="") as chat:
        mode = (house / "data" / "secret-key").stat().st_mode
        assert mode & 0o777 == 0o600
        ends_with_one_line(Chat(house), "MONGODB_URI")  # another chat on the same data/
        taken = urlsplit(chat.url).port
        ends_with_one_line(Chat(house, PORT=str(taken), MONGODB_URI=mongo()), "PORT")
        # But a second process on the first one's database is welcome, with the same key.
        with Chat(house, SECRET_KEY="", MONGODB_URI=chat.database):
            pass


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
        assert "http://0.0.0.0:" in chat.printed[-1]
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
        chat.process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(chat.process.wait, 10) == 0


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
    pins = (HERE / "requirements.txt").read_text().split()
    names = [pin.split("==")[0] for pin in pins]
    assert names == ["aiohttp", "aiohttp-jinja2", "aiohttp-session", "cryptography", "motor"]


def install_requirements(folder):
    """A fresh environment with nothing but requirements.txt: its Python."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    command = [folder / "bin" / "python", "-m", "pip", "install", "-q", "--no-compile", "-r"]
    subprocess.run([*command, HERE / "requirements.txt"], check=True, stderr=subprocess.DEVNULL)
    return command[0]


def test_requirements_are_enough(begun, mongo):
    """They start a chat with a MONGODB_URI, and say what is missing without one."""
    python = begun["python"].result()
    with Chat(command=(python, "chat.py"), MONGODB_URI=mongo()) as chat:
        assert chat.url
    ends_with_one_line(Chat(command=(python, "chat.py")), "requirements-dev.txt")


@asynchronous
async def test_a_busy_process_leaves_others_their_turn(mongo):
    """Promise 5: one person on one process, while the other process is saturated."""
    uri = mongo()
    with Chat(MONGODB_URI=uri) as chat, Chat(MONGODB_URI=uri) as second:
        async with people(chat, *[None] * 6) as [quiet, *busy]:
            quiet.chat = second
            await asyncio.gather(*(each.connect() for each in (quiet, *busy)))

            async def flood(person):
                while True:
                    await asyncio.gather(*(person.say("x") for _ in range(40)))
                    await asyncio.sleep(0.01)

            floods = [asyncio.create_task(flood(each)) for each in busy]
            await asyncio.sleep(0.5)
            slowest = 0
            for number in range(6):
                start = time.monotonic()
                await quiet.say("hello", f"{number}")
                await quiet.until(
                    lambda number=number: any(
                        each["key"] == f"{number}" and each["user"] == quiet.login
                        for each in quiet.seen[-2000:]
                    )
                )
                slowest = max(slowest, time.monotonic() - start)
            for each in floods:
                each.cancel()
            assert slowest < 2.5 and not quiet.errors


# ---------------------------------------------------------------------------
# The page, in a real browser
# ---------------------------------------------------------------------------

AXE = importlib.resources.files("axe_playwright_python").joinpath("axe.min.js").read_text()
# What a browser says by itself when an answer is an error or the server is gone.
EXPECTED = "Failed to load resource", "WebSocket connection to"


@functools.cache
def chromium():
    """Debian's Chromium where there is one; else Playwright's own, installed if need be."""
    if path := shutil.which("chromium"):
        return path
    subprocess.run([sys.executable, "-m", "playwright", "install", "chromium"], check=True)
    return None


@contextlib.asynccontextmanager
async def browser():
    path, options = chromium(), ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    async with async_playwright() as playwright:
        it = await playwright.chromium.launch(executable_path=path, args=options)
        yield it
        await it.close()


@contextlib.asynccontextmanager
async def tab(it, chat, login=None, sign_up=True, **options):
    """A page in a profile of its own, signed up; it must not complain about anything."""
    context = await it.new_context(**{"locale": "en-GB", "timezone_id": "Asia/Tokyo"} | options)
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
    await page.get_by_label("Login").fill(login)
    await page.get_by_label("Password").fill(password)
    await page.keyboard.press("Enter")


async def type_in(page, text):
    await page.locator("#text").fill(text)
    await page.keyboard.press("Enter")


async def texts(page):
    return await page.locator("#messages .text").all_text_contents()


async def wait_for_texts(page, *wanted):
    await expect(page.locator("#messages .text")).to_have_text(wanted, timeout=15000)


async def has_no_barriers(page):
    """axe-core finds nothing, in light and in dark."""
    for scheme in ("light", "dark"):
        await page.emulate_media(color_scheme=scheme)
        await page.evaluate(AXE)
        found = await page.evaluate("axe.run().then(result => result.violations)")
        assert [(each["id"], each["nodes"][0]["html"]) for each in found] == [], scheme


@asynchronous
async def test_page_two_people(mongo):
    async with (
        Chat(MONGODB_URI=mongo()) as chat,
        browser() as it,
        tab(it, chat, "anna") as anna,
        tab(it, chat, "Боря") as boris,
    ):
        await expect(anna.locator("#news")).to_have_text("Боря has come")
        await expect(anna.locator("#text")).to_be_focused()
        await type_in(anna, "Hello!")
        await type_in(anna, "<b>bold?</b> https://example.com/a?b=1, שלום")
        await expect(boris.locator("#messages .text")).to_have_count(2)
        await type_in(boris, "one\n    two")
        for page in (anna, boris):
            await wait_for_texts(
                page, "Hello!", "<b>bold?</b> https://example.com/a?b=1, שלום", "one\n    two"
            )
            assert await page.locator("#messages li.same").count() == 1  # the same person
            assert await page.locator(".day:visible").count() == 1
            link = page.locator("#messages a")
            assert await link.get_attribute("href") == "https://example.com/a?b=1"
            assert "noopener" in await link.get_attribute("rel")
            stamp = page.locator("#messages time").first
            utc = await stamp.get_attribute("datetime")
            hour = (int(utc[11:13]) + 9) % 24  # Tokyo
            assert (await stamp.text_content()).startswith(f"{hour:02}:")
            await has_no_barriers(page)
            await expect(page.locator("#unsent li")).to_have_count(0)
        await boris.context.close()
        await expect(anna.locator("#news")).to_have_text("Боря has left")
        async with tab(it, chat, sign_up=False) as page:
            for path in ("/login", "/signup", "/nothing"):
                await page.goto(chat.url + path)
                await has_no_barriers(page)
            await page.goto(chat.url + "/login")
            await fill_form(page, "anna", "wrong password")
            await expect(page.get_by_role("alert")).to_be_visible()
            await expect(page.get_by_label("Login")).to_have_value("anna")
            bad = page.locator("[aria-invalid=true]")
            assert await bad.get_attribute("name") == "password"
            await has_no_barriers(page)


@asynchronous
async def test_page_reconnects(mongo):
    """The server is killed; both go on typing; all arrives once, in one order."""
    async with (
        Chat(MONGODB_URI=mongo()) as chat,
        browser() as it,
        tab(it, chat, "anna") as anna,
        tab(it, chat, "boris") as boris,
    ):
        await type_in(anna, "before")
        await wait_for_texts(boris, "before")
        chat.kill()
        for page in (anna, boris):
            await expect(page.locator("#connection")).to_contain_text("Not connected")
            for number in (1, 2, 3):
                await type_in(page, f"{page.login} {number}")
            await expect(page.locator("#unsent .state")).to_have_text(["Sending …"] * 3)
            await page.locator("#text").fill("half a sent")
        chat.start()
        for page in (anna, boris):
            await expect(page.locator("#messages .text")).to_have_count(7, timeout=15000)
            await expect(page.locator("#unsent li")).to_have_count(0)
            await expect(page.locator("#connection")).to_have_text("")
            await expect(page.locator("#text")).to_have_value("half a sent")
        lines = await texts(anna)
        assert lines == await texts(boris)
        for page in (anna, boris):
            own = [line for line in lines if line.startswith(page.login)]
            assert own == [f"{page.login} {number}" for number in (1, 2, 3)]
            await page.reload()
            assert await texts(page) == lines
            await expect(page.locator("#text")).to_have_value("half a sent")


@asynchronous
async def test_page_and_a_message_that_could_not_be_stored(tmp_path):
    with Mongo(tmp_path) as mongo:
        async with (
            Chat(MONGODB_URI=mongo.uri("chat")) as chat,
            browser() as it,
            tab(it, chat) as page,
        ):
            await type_in(page, "before")
            await wait_for_texts(page, "before")
            mongo.kill()
            for text in ("again", "edit"):
                await type_in(page, text)
            refused = page.locator("#unsent .failed")
            await expect(refused).to_have_count(2, timeout=12000)
            await expect(refused.first).to_have_text("This message could not be stored.")
            mongo.start()
            await asyncio.sleep(2)
            assert await texts(page) == ["before"]  # not sent again by itself
            await page.get_by_role("button", name="Edit").last.click()
            await expect(page.locator("#text")).to_have_value("edit")
            for _ in range(10):
                await page.get_by_role("button", name="Try again").click()
                await asyncio.sleep(1)
                if await page.locator("#messages li").count() == 2:
                    break
            await page.locator("#text").press("Enter")
            await wait_for_texts(page, "before", "again", "edit")
            await page.reload()
            await wait_for_texts(page, "before", "again", "edit")
            await expect(page.locator("#unsent li")).to_have_count(0)


@asynchronous
async def test_page_older_messages(mongo):
    async with Chat(MONGODB_URI=mongo()) as chat, browser() as it, people(chat, None) as [person]:
        await person.connect()
        for number in range(1, 231):
            await person.say(f"message {number}")
        await person.until(lambda: len(person.seen) == 230)
        async with tab(it, chat) as page:
            assert len(await texts(page)) == 50
            await page.route("**/messages?*", lambda route: route.abort())
            await page.get_by_text("Older messages").click()
            again = page.get_by_text("Try again")
            await expect(again).to_be_visible()
            await page.unroute("**/messages?*")
            await again.press("Enter")
            await expect(page.locator("#messages .text")).to_have_count(100)
            # The message that was the first one has stayed where it was, or nearly.
            await page.evaluate("document.getElementById('log').scrollTop = 150")
            mark = page.locator("#messages li[data-id='131'] .text")
            before = (await mark.bounding_box())["y"]
            await expect(page.locator("#messages .text")).to_have_count(150)
            await expect(page.locator("#older")).to_have_text("Older messages")
            assert abs((await mark.bounding_box())["y"] - before) < 3
            while await page.locator("#older").count():
                await page.locator("#log").hover()
                await page.mouse.wheel(0, -3000)
                await asyncio.sleep(0.1)
            assert await texts(page) == [f"message {number}" for number in range(1, 231)]
            # The smallest step up leads away from the bottom; only the messages scroll.
            await page.evaluate("document.getElementById('log').scrollTop = 1e9")
            await page.locator("#log").press("ArrowUp")
            await asyncio.sleep(0.5)  # it glides
            gap = "(log => log.scrollHeight - log.scrollTop - log.clientHeight)(document.getElementById('log'))"
            assert await page.evaluate(gap) > 20
            assert await page.evaluate("document.documentElement.scrollHeight <= innerHeight")
            await page.locator("#log").press("PageUp")
            await asyncio.sleep(0.5)
            # New messages do not pull somebody away who reads old ones.
            await person.say("news")
            jump = page.get_by_role("button", name="1 new message")
            await jump.click()
            await expect(page.get_by_text("news", exact=True)).to_be_in_viewport()
            await expect(jump).to_be_hidden()


@asynchronous
async def test_page_typing(chat):
    async with browser() as it, tab(it, chat) as page:
        await type_in(page, "begin")
        await expect(page.locator("#messages .text").last).to_have_text("begin")
        box, counter = page.locator("#text"), page.locator("#counter")
        await box.fill("😀" * 1900)
        await expect(counter).to_have_text("100 characters left")
        await box.fill("😀" * 2003)
        await expect(counter).to_have_text("3 characters too many")
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
        await box.press("Enter")
        await expect(page.locator("#messages .text").last).to_have_text("one\ntwo")
        await expect(page.locator("#unsent li")).to_have_count(0)
        await expect(box).to_have_value("")


@asynchronous
async def test_page_when_the_session_ends(chat):
    async with browser() as it, tab(it, chat) as page:
        second = await page.context.new_page()
        await second.goto(chat.url)
        await second.get_by_role("button", name="Log out").click()
        for each in (page, second):
            await each.wait_for_url(chat.url + "/login")
        await expect(page.get_by_text("Your session has ended")).to_be_visible()
        await expect(second.get_by_text("Your session has ended")).to_be_hidden()
        await page.reload()
        await expect(page.get_by_text("Your session has ended")).to_be_hidden()


@asynchronous
async def test_page_and_somebody_else(mongo):
    """What one has not sent is not sent, and not shown, under another login."""
    async with (
        Chat(MONGODB_URI=mongo()) as chat,
        browser() as it,
        people(chat, "mallory") as [other],
        tab(it, chat, "anna") as page,
    ):
        cookie = (await other.form("/login")).cookies["chat"].value
        chat.kill()
        await type_in(page, "a secret")
        await expect(page.locator("#unsent li")).to_have_count(1)
        # Before the page is back, the cookie becomes another one's.
        await page.context.add_cookies([{"name": "chat", "value": cookie, "url": chat.url}])
        chat.start()
        await expect(page.locator("#chat")).to_have_attribute("data-user", "mallory", timeout=15000)
        await type_in(page, "hello")
        await wait_for_texts(page, "hello")
        assert "a secret" not in await page.content()
        await page.context.clear_cookies()
        await page.goto(chat.url + "/login")
        await fill_form(page, "anna")
        await page.wait_for_url(chat.url + "/")
        await wait_for_texts(page, "hello", "a secret")
        await expect(page.locator("#messages b").last).to_have_text("anna")


@asynchronous
async def test_page_without_javascript(chat):
    async with browser() as it, tab(it, chat, java_script_enabled=False) as page:
        assert await page.locator("#messages").count() == 1
        if await page.locator("#older").count():
            await page.locator("#older").click()
            assert len(await texts(page)) == 50 or 'data-id="1"' in await page.content()
        await page.get_by_role("button", name="Log out").click()
        await page.wait_for_url(chat.url + "/login")


@asynchronous
async def test_page_is_light(mongo):
    async with Chat(MONGODB_URI=mongo()) as chat, browser() as it, tab(it, chat) as page:
        for number in range(50):
            await type_in(page, f"A message of usual length, number {number}")
        await expect(page.locator("#messages li")).to_have_count(50)
        state = await page.context.storage_state()
        context = await it.new_context(storage_state=state)
        page = await context.new_page()
        sizes = []

        async def note(answer):
            sizes.append(len(await answer.body()) if answer.status == 200 else 0)

        page.on("response", note)
        await page.goto(chat.url, wait_until="networkidle")
        assert len(sizes) <= 5 and sum(sizes) < 40_000, sizes
        again = "performance.getEntriesByType('resource').map(each => each.transferSize)"
        await page.goto(chat.url, wait_until="networkidle")
        assert sum(await page.evaluate(again)) == 0  # from the cache
        await context.close()


@asynchronous
@pytest.mark.parametrize("width, zoom", [(320, 1), (640, 2)])
async def test_page_needs_no_sideways_scrolling(chat, width, zoom):
    async with browser() as it:
        viewport = {"width": width // zoom, "height": 500}
        login = "W" * 18 + f"{width % 100}"
        async with tab(it, chat, login, viewport=viewport, device_scale_factor=zoom) as page:
            await type_in(page, "w" * 300)
            await expect(page.get_by_text("w" * 300).last).to_be_visible()
            await page.locator("summary").click()
            wide = "document.documentElement.scrollWidth > innerWidth"
            assert not await page.evaluate(wide)
            await page.goto(chat.url + "/nothing")
            assert not await page.evaluate(wide)
            await page.context.clear_cookies()
            for path in ("/login", "/signup"):
                await page.goto(chat.url + path)
                assert not await page.evaluate(wide)


# ---------------------------------------------------------------------------
# The tutorial against the code
# ---------------------------------------------------------------------------
# A link into a file with lines has the form  [`name`](../chat.py#L1-L9)  and may be followed
# by an excerpt of that definition; in other files the name is what the line contains. In a
# `diff`, what stays and what goes must be there. `console` blocks are run.

CHAPTERS = sorted((HERE / "tutorial").glob("[0-9]*.md"))
TEXTS = [HERE / "README.md", HERE / "tutorial" / "README.md", *CHAPTERS]
LINK = re.compile(r"(?<!!)\[([^\]\n]*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def definitions():
    """The first and last line of each definition in chat.py, by its name."""
    found = {}
    tree = ast.parse((HERE / "chat.py").read_text())
    for parent in (tree, *(each for each in tree.body if isinstance(each, ast.ClassDef))):
        prefix = f"{parent.name}." if parent is not tree else ""
        for each in parent.body:
            if isinstance(each, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                first = min([each.lineno, *(one.lineno for one in each.decorator_list)])
                found[prefix + each.name] = first, each.end_lineno
            elif isinstance(each, ast.Assign) and not prefix:
                for target in each.targets:
                    for name in ast.walk(target):
                        if isinstance(name, ast.Name):
                            found[name.id] = each.lineno, each.end_lineno
    return found


def place(path, name):
    """The fragment that a link to a name in a file must have."""
    if path.name == "chat.py":
        first, last = definitions()[name]
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
            with contextlib.suppress(KeyError, ValueError):
                right = match[0].replace("#" + fragment, "#" + place(path, name.strip("`")))
                new = new.replace(match[0], right)
        if new != text.read_text():
            text.write_text(new)
            print(f"{text.relative_to(HERE)}: line numbers put right")


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text.name)
def test_line_links(text):
    for _, name, path, fragment in line_links(text):
        assert re.fullmatch("`[^`]+`", name), f"{name}: a link with lines is named `so`"
        assert fragment == place(path, name.strip("`")), f"{name}: python test_chat.py"


def test_every_definition_is_explained():
    linked = {name.strip("`") for text in CHAPTERS for _, name, _, _ in line_links(text)}
    hidden = {name for name in definitions() if name.endswith("__")}
    assert definitions().keys() - hidden - linked == set()


def is_excerpt(block, lines):
    """Whether a block stands in these lines; `...` alone in a line is for what is left out."""
    pattern = "".join(
        r"(?:.*\n)*?" if line.strip() == "..." else re.escape(line) + r"\n" for line in block
    )
    return re.search(r"(?:^|\n)" + pattern, "\n".join(lines) + "\n") is not None


@pytest.mark.parametrize("text", CHAPTERS, ids=lambda text: text.name)
def test_excerpts(text):
    content, source = text.read_text(), (HERE / "chat.py").read_text().splitlines()
    for fence in FENCE.finditer(content):
        block = fence[2].splitlines()
        if fence[1] == "python":
            before = [each for each in line_links(text) if each[0].end() < fence.start()]
            name = [each[1] for each in before if each[2].name == "chat.py"][-1]
            first, last = definitions()[name.strip("`")]
            assert is_excerpt(block, source[first - 1 : last]), f"{name}: {fence[2]}"
        elif fence[1] == "diff":
            stays = [line[1:] for line in block if line[:1] in (" ", "-")]
            path = HERE / (block[0][4:] if block[0].startswith("--- ") else "chat.py")
            stays = stays[1:] if block[0].startswith("--- ") else stays
            assert all(line in path.read_text().splitlines() for line in stays), fence[2]


def test_chapters_are_the_sections():
    sections = re.findall(r"^# (\d+)\. (.*)$", (HERE / "chat.py").read_text(), re.MULTILINE)
    heads = [re.match(r"# (\d+)\. (.*)", each.read_text()).groups() for each in CHAPTERS]
    assert sections == heads
    assert [int(each.name[:2]) for each in CHAPTERS] == list(range(1, 11))
    assert [int(number) for number, _ in sections] == list(range(1, 11))


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text.name)
def test_no_dead_links(text):
    for match in LINK.finditer(FENCE.sub("", text.read_text())):
        target, _, fragment = match[2].partition("#")
        if target.startswith(("http:", "https:")):
            continue
        path = (text.parent / target).resolve() if target else text
        assert path.exists(), match[0]
        if fragment and not re.match(r"L\d", fragment):
            heads = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
            assert fragment in anchors, match[0]


def commands(text):
    """The commands of a chapter's `console` blocks, each with the output that it shows."""
    for fence in FENCE.finditer(text.read_text()):
        if fence[1] == "console":
            for part in re.split(r"^\$ ", fence[2], flags=re.MULTILINE)[1:]:
                command, *shown = part.splitlines()
                while shown and shown[0].startswith(">"):
                    command += "\n" + shown.pop(0)[2:]
                yield command, shown


def run_commands(text, house):
    """Run a chapter's commands, one after the other, against a chat of its own."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with Chat(copy_house(house)) as chat:
        for command, shown in commands(text):
            result = subprocess.run(
                command.replace("http://127.0.0.1:8080", chat.url),
                shell=True,
                check=False,
                cwd=house,
                env=os.environ | {"PATH": path, "DB": chat.database},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=30,
            )
            output = result.stdout.replace(chat.url, "http://127.0.0.1:8080").replace("\r", "")
            pattern = "\n".join(
                "(?:.*\n?)*?" if line == "..." else re.escape(line).replace(r"\.\.\.", ".*")
                for line in shown
            )
            assert re.fullmatch(pattern, output.rstrip()), f"$ {command}\n{output}"


@pytest.mark.parametrize("text", CHAPTERS, ids=lambda text: text.name)
def test_commands(begun, text):
    """What a chapter's commands print is what it shows."""
    begun[text].result()


if __name__ == "__main__":
    put_right()
