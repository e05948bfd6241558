"""Every promise of the chat, checked from outside.

``pytest -n 4`` runs it all, four tests at a time: against real processes of the chat, a database
that speaks MongoDB's protocol (SecantusDB, or the one that MONGODB_URI names), and real browsers.
"""

import ast
import asyncio
import contextlib
import gzip
import html
import itertools
import json
import os
import random
import re
import resource
import secrets
import signal
import socket
import stat
import statistics
import struct
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import aiohttp
import faults
import parts
import pymongo
import pytest
from browsers import ENGINES
from faults import PATIENCE, Mongo, Proxy, RawClient, Router, client_frame, free_port, request
from parts import (
    BOX,
    HERE,
    JUMP,
    LOG,
    MARK_TOP,
    MESSAGES,
    PASSWORD,
    PEOPLE,
    TEXT,
    Chat,
    Person,
    Wires,
    asynchronous,
    becomes_true,
    chat_behind,
    everything_once,
    has,
    has_no_barriers,
    history,
    ids,
    message,
    on_pages,
    page_of,
    people,
    press,
    send_again,
    shows_last,
    stored,
    tab,
    talking,
    texts,
    together,
    type_in,
)
from playwright.async_api import expect

# ---------------------------------------------------------------------------
# The promises to begin with. (The one about the database is further down.)
# ---------------------------------------------------------------------------


@asynchronous
async def test_everybody_has_everything(replica_set):
    """Connections are cut and a process is killed, and everybody gets every message once."""
    uri, sent = replica_set(), {}
    async with (
        Chat(MONGODB_URI=uri) as chat,
        Chat(MONGODB_URI=uri) as second,
        people(chat, *[None] * 8) as them,
    ):
        for person in them[::2]:
            person.chat = second
        async with talking(them, sent, pause=0.1):
            for moment in range(12):
                await asyncio.sleep(0.2)
                random.choice(them).cut_off()
                if moment == 6:
                    second.kill()
                    await asyncio.to_thread(second.start)
        await asyncio.gather(*(parts.sends_all_again(person, sent) for person in them))
        await them[0].until(lambda: len(parts.each_once(them[0].seen)) == len(sent))
        everything = await history(them[0])  # of the second process, which may be a second late
        assert ids(everything) == list(range(1, len(sent) + 1))
        assert {(each["user"], each["key"]): each["text"] for each in everything} == sent
        for person in them:
            await person.until(lambda person=person: parts.each_once(person.seen) == everything)
            assert not person.errors


@asynchronous
async def test_kill_9_loses_nothing(house):
    """What somebody has seen is still there after `kill -9` of the chat and its database."""
    async with Chat(house) as chat, people(chat, *[None] * 10) as them:
        for _ in range(2):
            async with talking(them, {}, pause=0.01):
                await asyncio.sleep(1)
                count = len(them[0].seen)
                await them[0].until(lambda count=count: len(them[0].seen) > count)
                chat.kill()  # just now, somebody has seen a message
            await asyncio.to_thread(chat.start)
        everything = {each["id"]: each for each in await history(them[0])}
        assert list(everything) == list(range(1, len(everything) + 1))
        for person in them:
            gone = [each["id"] for each in person.seen if everything.get(each["id"]) != each]
            assert person.seen and not gone, f"seen, but gone: {gone}"


FORM = "Content-Type: application/x-www-form-urlencoded"
COSTLY = b"login=" + "\u0300\u0316".encode() * 15_000  # it would take seconds to normalize this
BOMB = gzip.compress(bytes(30_000_000))
FLOODS = {
    "messages": (faults.open_websocket, client_frame(b'{"text": "flood"}')),
    "repeated messages": (
        faults.open_websocket,
        client_frame(b'{"text": "flood", "key": "the same"}'),
    ),
    "nonsense": (faults.open_websocket, client_frame(b"nonsense")),
    "pings": (faults.open_websocket, client_frame(b"", faults.PING_FRAME)),
    "form": (faults.open_connection, request("HEAD", "/login")),
    "missing page": (faults.open_connection, request("GET", "/nothing")),
    "redirect": (faults.open_connection, request("GET", "/")),
    "compressed": (
        faults.open_connection,
        request("POST", "/nothing", "Content-Encoding: gzip", BOMB),
    ),
    "costly login": (faults.open_connection, request("POST", "/login", FORM, COSTLY)),
    "hanging up": (faults.ask_and_hang_up, b"x"),
}


@asynchronous
@pytest.mark.parametrize("reads", [True, False], ids=["reading", "not reading"])
@pytest.mark.parametrize("kind", FLOODS)
async def test_a_flood_holds_up_nobody(busy_chat, kind, reads):
    """Whatever one person sends without pause, another one's messages are shown in two seconds."""
    connect, content = FLOODS[kind]
    async with people(busy_chat, None, None) as [person, flooder]:
        await person.connect("new")
        with faults.flooding(lambda: connect(flooder), content, reads):
            # What hangs up costs the database's time: then all that counts is that nothing fails.
            await parts.is_not_held_up(person, PATIENCE if kind == "hanging up" else 2)


# ---------------------------------------------------------------------------
# Pages
# ---------------------------------------------------------------------------


STATUSES = {  # the statuses for strangers and for users
    (303, 200): ["/", "/?before=1", "/messages?before=-5", "/messages?before=" + "9" * 99],
    (303, 400): ["/?before=x", "/messages", "/messages?before=", "/messages?before=1_0"],
    (401, 400): ["/ws", "/ws?after=x", "/ws?after=1_0"],
    (200, 303): ["/login", "/signup"],
    (200, 200): ["/static/chat.css"],
    (404, 404): ["/static/none", "/static/%00", "/static/" + "x" * 300, "/nothing"],
}


@asynchronous
async def test_pages(chat):
    """Each page answers strangers and users as it should, HEAD as GET, and says what is allowed."""
    async with Person(chat) as stranger, people(chat, None) as [user]:
        for statuses, paths in STATUSES.items():
            for path, method in itertools.product(paths, ("GET", "HEAD")):
                answers = await stranger.ask(path, method), await user.ask(path, method)
                assert tuple(each.status for each in answers) == statuses, (path, method)
                assert answers[0].headers.get("Location", "/login") == "/login"
                assert answers[1].headers.get("Location", "/") == "/"
        assert await (await user.ask("/messages?before=1")).json() == {"messages": []}
        for path, allowed in (("/", "GET,HEAD"), ("/login", "GET,HEAD,POST"), ("/logout", "POST")):
            answer = await user.ask(path, "PUT")
            assert answer.status == 405
            assert sorted(answer.headers["Allow"].split(",")) == allowed.split(",")


LONG_PASSWORD = "ж" * 199 + "\u00e9"
FORMS = [  # $ stands for what no other login has
    *(("/signup", f"a{each}na", PASSWORD, 400, "login") for each in " <😀\u1160\u115f\u3164\ufe0f"),
    *(("/signup", "x" * length, PASSWORD, 400, "login") for length in (0, 2, 21, 150)),
    ("/signup", "good_$", "7 chars", 400, "password"),
    ("/signup", "good_$", "x" * 201, 400, "password"),
    *(("/signup", each, PASSWORD, 303, None) for each in ("नमस्ते", "தமிழ்", "ประยุทธ์", "E\u0301va_1")),
    ("/signup", "Straße_$ ", LONG_PASSWORD, 303, None),  # phones put a space after it
    ("/signup", "Straße_$", LONG_PASSWORD, 303, None),  # a double click
    ("/signup", "STRASSE_$", PASSWORD, 409, "login"),
    ("/signup", "ｓｔｒａｓｓｅ_$", PASSWORD, 409, "login"),
    ("/login", " strasse_$", LONG_PASSWORD, 303, None),
    ("/login", "Straße_$", "ж" * 199 + "e\u0301", 303, None),  # another keyboard's é
    ("/login", "Straße_$", "ж" * 199 + "e", 401, "password"),
    *[("/signup", "Straße_$", PASSWORD, 409, "login")] * 7,  # these were ten guesses
    ("/signup", "Straße_$", LONG_PASSWORD, 429, None),
    ("/login", "nobody_$", PASSWORD, 401, "password"),
]


@asynchronous
async def test_forms(chat):
    """A form that is refused says what is wrong, and keeps the login but never the password."""
    tag = secrets.token_hex(3)
    async with Person(chat) as person:
        for path, login, password, status, field in FORMS:
            person.http.cookie_jar.clear()
            login = login.replace("$", tag)
            answer = await person.form(path, login, password)
            assert answer.status == status, (path, ascii(login))
            assert ("Set-Cookie" in answer.headers) == (status == 303)
            if status != 303:
                page = await answer.text()
                assert 'role="alert"' in page and password not in page
                assert f'value="{html.escape(login[:100].strip())}"' in page
                inputs = re.findall('<input[^>]*name="([^"]*)"([^>]*)>', page)
                bad = [name for name, rest in inputs if "aria-invalid" in rest]
                assert bad == [field] * (field is not None)
        await person.form("/login", "anna_" + tag)
        await person.form("/signup", "Anna_" + tag)
        assert f"Anna_{tag}" in await (await person.ask("/")).text()  # as it was signed up


@asynchronous
async def test_forms_that_cannot_be_read(chat):
    """Broken forms are their sender's fault; a body may have 64 KiB and no more."""
    form, multipart = "application/x-www-form-urlencoded", "multipart/form-data"
    async with people(chat, None) as [person]:
        for data, kind, status in (
            (b"login=\xff&password=\xff", form, 400),
            (b"login=a&password=b", f"{form}; charset=nonsense", 400),
            (b"login=%2B2AA-&password=b", f"{form}; charset=utf-7", 400),
            (b"--x\r\nbroken", f"{multipart}; boundary=x", 400),
            (b"login=a", multipart, 400),
            (b"login=a&login=b", form, 401),
            (b"password=".ljust(65536, b"x"), form, 401),
            (b"password=".ljust(65537, b"x"), form, 413),
        ):
            answer = await person.ask("/login", "POST", data=data, headers={"Content-Type": kind})
            assert answer.status == status, data[:30]


@asynchronous
async def test_guesses_are_counted(three_chats):
    """Ten wrong passwords for a login, sent at once to three processes, and then no more."""
    async with contextlib.AsyncExitStack() as stack:
        them = [await stack.enter_async_context(Person(chat)) for chat in three_chats]
        login = "A" + secrets.token_hex(4)
        await them[0].form("/signup", login)
        forged = {"X-Forwarded-For": "192.0.2.1"}
        for name in (login, login + "_nobody"):
            guesses = [them[n % 3].form("/login", name, "a wrong one") for n in range(15)]
            guesses += [them[n % 3].form("/login", name.upper(), "a wrong one") for n in range(15)]
            answers = await asyncio.gather(*guesses)
            assert Counter(answer.status for answer in answers) == {401: 10, 429: 20}
            for person in them:
                # The right password does not help, and nor does an address that is made up.
                answer = await person.form("/login", name, headers=forged)
                assert answer.status == 429 and 200 < int(answer.headers["Retry-After"]) <= 300
                page = await answer.text()
                assert f'value="{name}"' in page and 'role="alert"' in page
                assert PASSWORD not in page


@asynchronous
async def test_thirty_people_at_once(chat):
    """Thirty people who sign up within the same second all get in, and so when they log in."""
    async with contextlib.AsyncExitStack() as stack:
        them = [await stack.enter_async_context(Person(chat)) for _ in range(30)]
        for path in ("/signup", "/login"):
            await asyncio.gather(*(gets_in(each, path) for each in them))


async def gets_in(person, path):
    """Sign up or log in. Only who has waited for almost five seconds may be told to try again."""
    person.http.cookie_jar.clear()
    start = time.monotonic()
    while (answer := await person.form(path)).status == 503:
        assert time.monotonic() - start > 4 and answer.headers["Retry-After"]
        start = time.monotonic()
    assert answer.status == 303


@asynchronous
async def test_one_address_locks_out_nobody(chat):
    """A hundred log-ins under way from one address keep nobody else from logging in."""
    async with people(chat, None) as [person], Person(chat, address="127.0.0.2") as guesser:
        guesses = [guesser.form("/login", secrets.token_hex(8)) for _ in range(100)]
        guessing = asyncio.gather(*guesses)
        await asyncio.sleep(0.3)
        await gets_in(person, "/login")
        statuses = Counter(answer.status for answer in await guessing)
        assert statuses[429] > 30, statuses


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
async def test_passwords_are_hashed(chat):
    """A password is stored nowhere, only its hash: Argon2id with 19 MiB and two passes or more."""
    async with people(chat, None):
        with pymongo.MongoClient(chat.env["MONGODB_URI"]) as client:
            db = client.get_default_database()
            everything = str([list(db[name].find()) for name in db.list_collection_names()])
    hashes = set(re.findall(r"\$argon2id\$v=19\$m=(\d+),t=(\d+),p=1\$", everything))
    assert hashes and all(int(m) >= 19 * 1024 and int(t) >= 2 for m, t in hashes)
    assert PASSWORD not in everything


@asynchronous
async def test_other_sites_cannot_post(chat):
    """Forms and WebSockets of other sites are refused, and a router's headers not believed."""
    async with people(chat, None) as [person]:
        evil = "http://evil.example"
        for origin in (evil, "null", chat.url.replace("http", "https"), chat.url):
            answer = await person.form("/login", headers={"Origin": origin})
            assert answer.status == (303 if origin == chat.url else 403), origin
        assert (await person.ask("/", headers={"Origin": evil})).status == 200
        with pytest.raises(aiohttp.WSServerHandshakeError, match="403"):
            await person.open(headers={"Origin": evil})
        answer = await person.ask("/", headers={"X-Forwarded-Proto": "http"})
        assert answer.status == 200 and "Strict-Transport-Security" not in answer.headers


@asynchronous
async def test_log_out(three_chats):
    """Logging out ends a session on every process, and no other session of the same user."""
    first, second, third = three_chats
    async with people(first, None) as [person], Person(first, person.login) as other:
        await other.form("/login")
        cookie = (await person.form("/login")).headers["Set-Cookie"]
        for word in ("HttpOnly", "SameSite=Lax", "Max-Age=604800", "Path=/"):
            assert word in cookie
        assert person.login not in cookie and "Secure" not in cookie
        async with Person(second) as thief, Person(third) as second_thief:
            for each in (thief, second_thief):
                each.http.headers["Cookie"] = cookie.split(";")[0]
            for each in (person, other, thief, second_thief):
                await each.connect("new")
            answer = await person.ask("/logout", "POST")
            assert (answer.status, answer.headers["Location"]) == (303, "/login")
            for each in (person, thief, second_thief):
                assert await each.closed() == 1008
            for thief.chat in three_chats:
                assert (await thief.ask("/")).status == 303
                assert (await thief.ask("/ws")).status == 401
        await other.post()
        assert (await person.ask("/logout", "POST")).headers["Location"] == "/login"


@asynchronous
async def test_unreadable_cookie_is_no_cookie(chat):
    """Whoever sends a cookie that cannot be read is a stranger, and no error."""
    async with Person(chat) as person:
        for value in ("x", "\xff", "gAAAA", '"', "=" * 200, "gAAAAABn" + "A" * 100):
            headers = {"Cookie": f"chat={value}"}
            for path, status in (("/", 303), ("/ws", 401), ("/login", 200)):
                assert (await person.ask(path, headers=headers)).status == status
        answer = await faults.first_line(chat, request("GET", "/", "Cookie: chat=\xff"))
        assert answer.startswith(b"HTTP/1.1 303 ")


@asynchronous
async def test_history(chat):
    """The page has the newest 50 messages, and all others can be read before them."""
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
async def test_messages_deleted_by_hand(mongo):
    """Who deletes some messages, or all, or puts back a backup, stops neither pages nor people."""
    uri, limits = mongo(), {"RECENT_MAX": "5"}  # what is in memory was read before
    async with (
        Chat(MONGODB_URI=uri, limits=limits) as chat,
        people(chat, None, None) as [person, other],
    ):
        await person.connect()
        for number in range(1, 71):
            await person.say(f"{number}", f"{number}")
        await person.until(lambda: len(person.own) == 70)
        with pymongo.MongoClient(uri) as client:
            messages = client.get_default_database().messages
            messages.delete_many({"_id": {"$gte": 10, "$lt": 65}})
            await all_see(person, other, [*range(1, 10), *range(65, 72)])
            messages.delete_many({})
            await all_see(person, other, [72])
            # A backup has fewer messages. People who have seen more have to begin anew.
            chat.kill()
            messages.insert_one(messages.find_one_and_delete({}) | {"_id": 7})
            await asyncio.to_thread(chat.start)
            await person.connect(72)
            assert await person.closed() == 1008
            await person.connect(7)
            await all_see(person, other, [7, 8])


async def all_see(person, other, numbers):
    """After one more message, pages and people who come back show exactly these."""
    await person.post()
    assert person.seen[-1]["id"] == numbers[-1]
    assert ids(await history(person)) == numbers
    other.seen = []
    await other.connect("")
    await other.until(lambda: ids(other.seen)[-1:] == numbers[-1:])
    assert ids(other.seen) == numbers


@asynchronous
async def test_static_files(chat):
    """A file is kept for a year under an address with the right version, and only there."""
    async with people(chat, None) as [person]:
        page = await (await person.ask("/")).text()
        links = re.findall(r'"(/static/[^"]+\?v=[^"]+)"', page)
        assert len(links) == 3
        for link in links:
            for path, status, kept in (
                (link, 200, "max-age=31536000, immutable"),
                (link[:-1] + "-", 200, "no-cache"),  # the version of another release
                (link.partition("?")[0], 200, "no-cache"),
                (link.replace(".", "_"), 404, "no-cache"),
            ):
                answer = await person.ask(path)
                assert (answer.status, answer.headers["Cache-Control"]) == (status, kept)
        for path in ("/dev/zero", "%2fdev/zero", "..%2f..%2fdev%2fzero", "%2e%2e/chat.py"):
            assert (await person.ask(f"/static/{path}")).status in (403, 404)


NEW_ROUTES = """
from aiohttp import web
async def health(request):
    return web.Response(text="up")
old_routes = chat.routes
chat.routes = lambda: [*old_routes(), web.get("/health", health), web.post("/poke", health)]
"""


@asynchronous
async def test_a_new_route_is_private(mongo):
    """A route that nobody has named public is shown to nobody who is not signed in."""
    async with Chat(MONGODB_URI=mongo(), prelude=NEW_ROUTES) as chat, Person(chat) as person:
        for path, method in (("/health", "GET"), ("/health", "HEAD"), ("/poke", "POST")):
            answer = await person.ask(path, method)
            assert (answer.status, answer.headers["Location"]) == (303, "/login")
        await person.sign_up()
        assert await (await person.ask("/health")).text() == "up"


@asynchronous
async def test_sessions_and_throttles_end(mongo):
    """A session lasts so long from the login, used or not, and so does the wait after guesses."""
    limits = {"SESSION_LIFETIME": "5", "FAILED_LOGINS_WINDOW": "timedelta(seconds=5)"}
    async with (
        Chat(MONGODB_URI=mongo(), limits=limits) as chat,
        people(chat, None) as [person],
        Person(chat) as other,
    ):
        other.http.headers["Cookie"] = person.cookie()
        assert (await other.ask("/")).status == 200
        guesses = [person.form("/login", password="wrong") for _ in range(11)]
        assert 429 in [answer.status for answer in await asyncio.gather(*guesses)]
        end = time.monotonic() + PATIENCE
        while (await other.ask("/")).status == 200 or (await person.form("/login")).status == 429:
            assert time.monotonic() < end
            await asyncio.sleep(0.5)
        for _ in range(11):  # right passwords are not counted
            assert (await person.form("/login")).status == 303


@asynchronous
async def test_a_redirect_is_not_kept(mongo):
    """Behind a router, the redirect of a file to HTTPS is not kept for a year."""
    async with Chat(MONGODB_URI=mongo(), HTTPS="1") as chat, Person(chat) as person:
        page = await (await person.ask("/login")).text()
        link = re.search(r'"(/static/[^"]+\?v=[^"]+)"', page)[1]
        for scheme, status, kept in (("https", 200, True), ("http", 308, False)):
            answer = await person.ask(link, headers={"X-Forwarded-Proto": scheme})
            assert answer.status == status
            assert ("immutable" in answer.headers["Cache-Control"]) == kept


@asynchronous
async def test_clients_that_hang_up(chat):
    """However a client breaks off, or breaks HTTP: no traceback of it gets into the log."""
    async with people(chat, None) as [person]:
        for content in (
            faults.handshake(person, "?after=0"),
            request("POST", "/login", FORM, b"login=" + bytes(100))[:-50],
            request("POST", "/login", f"{FORM}\nContent-Encoding: gzip", b"no gzip"),
            request("GET", "/", "no colon"),
            b"\x16\x03\x01 what TLS begins with\r\n\r\n",
        ):
            for number in range(10):
                with socket.create_connection(faults.address(chat)) as client:
                    if number % 2:  # RST instead of FIN
                        reset = struct.pack("ii", 1, 0)
                        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
                    client.sendall(content)
        await person.connect("new")
        await person.post()
        chat.check_log()


@asynchronous
async def test_more_connections_than_open_files(house):
    """1,100 connections at the usual limit of 1,024 files break neither the chat nor its data."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 8192), most))  # they are files here, too
    command = ["sh", "-c", f"ulimit -Sn 1024; exec {sys.executable} chat.py"]
    async with Chat(house, command) as chat, people(chat, None, None) as [person, other]:
        await person.connect()
        with contextlib.ExitStack() as stack:
            for _ in range(1100):
                stack.enter_context(socket.create_connection(faults.address(chat), PATIENCE))
            await person.post()
            assert (await other.ask("/")).status == 200
        await person.post()
        assert await history(other) == person.seen


@asynchronous
async def test_one_user_with_a_thousand_windows(chat):
    """One user may have a hundred connections, and no more, so that others can go on."""
    async with people(chat, None, None) as [greedy, person]:
        await person.connect("new")
        results = await asyncio.gather(
            *(greedy.open() for _ in range(1000)), return_exceptions=True
        )
        refused = [each for each in results if isinstance(each, Exception)]
        assert Counter(each.status for each in refused) == {429: 900}
        assert "Retry-After" in (await greedy.ask("/")).headers
        await parts.is_not_held_up(person)
        await asyncio.gather(*(each.close() for each in results if each not in refused))
        while (await greedy.ask("/")).status == 429:
            await asyncio.sleep(0.1)


# ---------------------------------------------------------------------------
# The WebSocket
# ---------------------------------------------------------------------------


@asynchronous
async def test_good_messages(chat):
    """Any text is good, and comes back trimmed, with its writer, number and time."""
    async with people(chat, None) as [person]:
        await person.connect("new")
        for count, text in enumerate(("\0", "x" * 2000, "😀" * 2000, "ж\n  א"), 1):
            await person.post(f"  {text}\n", "k" * (65 - count))
            message = person.seen[-1]
            assert list(message) == ["type", "id", "key", "user", "text", "time"]
            assert (message["text"], message["user"]) == (text, person.login)
            moment = datetime.fromisoformat(message["time"])
            assert moment.utcoffset() == timedelta(0)
            assert abs(datetime.now(UTC) - moment) < timedelta(hours=0.5)
        for unnamed in ({"text": "again", "key": None}, {"text": "and again"}):
            await person.ws.send_json(unnamed)
        await person.until(lambda: len(person.own) == 6)
        assert all(1 <= len(key) <= 64 for key in person.own)


@asynchronous
async def test_bad_messages(chat):
    """What cannot be read as a message is answered with an error, and the connection stays open."""
    too_long = json.dumps({"text": "x" * 2001, "key": "k" * 64})
    async with people(chat, None) as [person]:
        await person.connect("new")
        for bad, key in (
            *((bad, None) for bad in ("[", "[]", "null", "[" * 60000, "1" * 6000, " " * 65536)),
            ('{"text": 5, "key": "k"}', "k"),
            ('{"text": " \\n ", "key": "k"}', "k"),
            ('{"text": "\\ud800", "key": "k"}', "k"),
            (too_long, "k" * 64),
            ('{"text": "x", "key": 5}', None),
            ('{"text": "x", "key": ""}', ""),
            ('{"text": "x", "key": "\\udc00"}', None),
            (too_long.replace("k" * 64, "k" * 65), "k" * 65),
        ):
            person.errors.clear()
            await person.ws.send_str(bad)
            await person.until(lambda: person.errors)
            [error] = person.errors
            assert error["text"] and error.get("key") == key, bad
        await person.post()


@asynchronous
async def test_bad_frames_and_handshakes(chat):
    """A binary frame and one over 64 KiB close the connection, and a bad handshake opens none."""
    async with people(chat, None) as [person]:
        with RawClient(person) as client:
            parts.check_headers(client.headers)
            online = next(client.events())
            assert online["type"] == "online" and person.login in online["users"]
        await person.connect("new")
        await person.ws.send_bytes(b"bytes")
        assert await person.closed() == 1003
        await person.connect("new")
        await person.ws.send_str(" " * 65537)
        assert await person.closed() == 1009
        for header in (b"Sec-WebSocket-Key: dG", b"Upgrade: w"):
            opening = faults.handshake(person).replace(header, header[:-1] + b"\xff")
            assert (await faults.first_line(chat, opening)).startswith(b"HTTP/1.1 400 ")


@asynchronous
async def test_who_is_online(three_chats):
    """Everybody sees who comes and goes, on whichever process, and one more window is no news."""
    tag = secrets.token_hex(3)
    logins = ["zoe" + tag, "Ada" + tag, "eve" + tag]
    async with people(three_chats[0], *logins) as [zoe, ada, eve]:
        for person, person.chat in zip((zoe, ada, eve), three_chats, strict=True):
            await person.connect("new")
        for person in (zoe, ada, eve):
            await person.until(lambda person=person: set(logins) <= person.online())
        async with ada.open():
            await eve.ws.close()
            for person in (zoe, ada):
                await person.until(lambda person=person: eve.login not in person.online())
        await eve.connect("new")
        for person in (zoe, ada):
            await person.until(lambda person=person: eve.login in person.online())
        mine = [(each["type"], each["user"]) for each in zoe.others[1:] if tag in each["user"]]
        assert mine[-2:] == [("left", eve.login), ("joined", eve.login)]


# ---------------------------------------------------------------------------
# What the chat promises about a message
# ---------------------------------------------------------------------------


@asynchronous
async def test_nothing_is_missed(mongo):
    """Who comes back gets all that was missed first, however much, while others go on writing."""
    limits = {"RECENT_MAX": "100"}  # older messages come from the database
    async with (
        Chat(MONGODB_URI=mongo(), limits=limits) as chat,
        people(chat, None, None) as [writer, reader],
    ):
        await writer.connect()
        for number in range(250):
            await writer.say(f"{number}", f"{number}")
        await writer.until(lambda: len(writer.own) == 250)
        async with talking([writer], {}, pause=0.01):
            for back in (250, 249, 200, 101, 100, 99, 51, 50, 1, 0):
                after = writer.seen[-1]["id"] - back
                reader.seen = []
                await reader.connect(after)
                newest = writer.seen[-1]["id"] + 10
                await reader.until(lambda newest=newest: ids(reader.seen)[-1:] > [newest])
                assert ids(reader.seen) == list(range(after + 1, reader.seen[-1]["id"] + 1))


@asynchronous
async def test_stored_once(three_chats):
    """A message that is sent again with its key is stored once, and its sender sees that one."""
    first, second, _ = three_chats
    async with people(first, None, None) as [person, other]:
        await other.connect("new")
        for count, person.chat in ((5, first), (10, second)):
            await person.connect("new")
            for _ in range(5):
                await person.say("once", "same key")
            await person.until(lambda count=count: len(person.seen) == count)
        assert person.seen == person.seen[:1] * 10
        for count in (2, 3):  # another user's key is another key
            await other.say("mine", "same key")
            await other.until(lambda count=count: len(other.seen) == count)
        assert [each["text"] for each in other.seen] == ["once", "mine", "mine"]
        assert [each["text"] for each in await history(other)][-2:] == ["once", "mine"]


@asynchronous
async def test_an_answer_overtakes_nothing(chat):
    """Who sends the newest message again while older ones are still on their way gets them first."""
    async with people(chat, None) as [person]:
        await person.connect("new")
        for number in range(100):  # 1.2 MB, more than is on its way at a time
            await person.say(parts.LONGEST, f"{number}")
        await person.until(lambda: len(person.own) == 100)
        first, last = person.seen[0]["id"], person.seen[-1]["id"]
        with RawClient(person, first - 1, small=True) as client:
            client.socket.sendall(client_frame(b'{"text": "again", "key": "99"}'))
            await asyncio.sleep(0.3)
            events = client.events()
            numbers = []
            while numbers[-1:] != [last]:
                numbers += ids([await asyncio.to_thread(next, events)])
        assert numbers == list(range(first, last + 1))


@asynchronous
async def test_as_time_passes(replica_set):
    """In the minute that it takes to see who is gone, slow readers get on, and others chat on."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(30))  # all wait at once
    uri = replica_set()
    parts.history_of(uri, 2000)
    with pymongo.MongoClient(uri) as client:
        long_text = {"$set": {"text": "字" * 2000}}  # 12 MB in all
        client.get_default_database().messages.update_many({}, long_text)
    async with Chat(MONGODB_URI=uri) as chat, people(chat, None, None) as [person, slow]:
        await person.connect("new")
        memory = parts.memory_of(chat)
        await together(
            heartbeat=heartbeat(replica_set()),
            killed=users_of_a_killed_process_leave(uri, person),
            slow=asyncio.gather(*(slow_reader(slow, 45) for _ in range(6))),
            lost=asyncio.gather(*(lost_client_leaves(person, kind) for kind in range(4))),
            others=others_chat_on(person, 45),
        )
        assert parts.memory_of(chat) - memory < 100


async def heartbeat(uri):
    """A silent chat sends pings, and what a page can see, so often that no router cuts it off."""
    async with (
        Chat(MONGODB_URI=uri) as chat,
        people(chat, None) as [person],
        person.open(autoping=False) as ws,
    ):
        start, came = time.monotonic(), {}
        while len(came) < 2:
            frame = await ws.receive(60)
            assert not ws.closed
            if (seconds := time.monotonic() - start) > 5:  # before that, it says who is online
                came[frame.type] = seconds
        assert came[aiohttp.WSMsgType.TEXT] < 30 and 24.9 < came[aiohttp.WSMsgType.PING] < 32


async def users_of_a_killed_process_leave(uri, person):
    """The users of a killed process are gone after a minute."""
    async with Chat(MONGODB_URI=uri) as killed, people(killed, None) as [lost]:
        await lost.connect("new")
        await person.until(lambda: lost.login in person.online())
        killed.kill()
        await person.until(lambda: lost.login not in person.online(), 60)


async def slow_reader(slow, seconds):
    """One that reads 20 KB in a second comes nearer; if it is cut off, it goes on from there."""
    end, seen = time.monotonic() + seconds, []

    def read():
        while time.monotonic() < end:
            with contextlib.suppress(EOFError, OSError), RawClient(slow, len(seen)) as client:
                client.rate = 20_000
                for event in itertools.takewhile(lambda _: time.monotonic() < end, client.events()):
                    seen.extend(ids([event]))

    await asyncio.to_thread(read)
    assert len(seen) > seconds / 2 and seen == list(range(1, len(seen) + 1))


async def lost_client_leaves(person, kind):
    """One that reads nothing is gone after a minute, whatever waits for it, and what it sends."""
    too_long = b"\x81\xff" + (10_000_000).to_bytes(8, "big")
    pings = client_frame(b"x" * 125, faults.PING_FRAME) * 100_000
    after, sends = [(0, b""), ("new", b""), ("new", too_long), (0, pings)][kind]
    async with people(person.chat, None) as [lost]:
        with RawClient(lost, after, small=True) as client:
            await person.until(lambda: lost.login in person.online())
            client.socket.setblocking(False)
            client.socket.send(sends)
            await person.until(lambda: lost.login not in person.online(), 60)


async def others_chat_on(person, seconds):
    """Meanwhile, somebody's messages are shown at once."""
    end, taken = time.monotonic() + seconds, []
    while time.monotonic() < end:
        taken.append(await person.post())
        await asyncio.sleep(0.5)
    assert statistics.median(taken) < 1, taken


@asynchronous
async def test_everything_arrives_before_the_close(mongo):
    """However much waits for a client when it is closed, it gets all of it first, and then why."""
    async with Chat(MONGODB_URI=mongo()) as chat, people(chat, *[None] * 3) as [person, one, two]:
        # Each client has missed 12 KB more than the next one. The first ones miss more than the
        # network takes, so that different amounts, up to some 300 KB, wait in the chat.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(32))
        await person.connect()
        clients = []
        for _ in range(16):
            for each in (one, two):
                clients.append(RawClient(each, small=True))
                await person.post(parts.LONGEST)
        await one.ask("/logout", "POST")
        await asyncio.sleep(1.5)  # they begin to read when the close has begun
        await parts.reads_to_the_end(clients[0::2], range(1, 33, 2), 1008)
        chat.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.5)
        await parts.reads_to_the_end(clients[1::2], range(2, 34, 2), 1001)
        assert await asyncio.to_thread(chat.wait, PATIENCE) == 0


@asynchronous
@pytest.mark.parametrize("local", [False, True], ids=["SIGTERM", "Ctrl-C"])
async def test_clean_end(mongo, house, local):
    """Who ends the chat, even three times, loses nothing: it is stored, or its sender knows."""
    settings = {"folder": house} if local else {"MONGODB_URI": mongo()}
    number = signal.SIGINT if local else signal.SIGTERM
    async with Chat(**settings) as chat, people(chat, *[None] * 6) as them:
        writing = [asyncio.create_task(parts.write_without_pause(person)) for person in them]
        deaf = [] if local else [RawClient(them[0], small=True)]  # delays the end by some seconds
        await asyncio.sleep(1)
        for each in (signal.SIGINT, signal.SIGTERM):  # at the same moment, as some shells do
            chat.process.send_signal(each)
        await asyncio.sleep(0.1)
        assert await chat.end(number, 5 if deaf else 3) == 0
        sent = await asyncio.gather(*writing)
        assert [await person.closed() for person in them] == [1001] * 6
        await asyncio.to_thread(chat.start)
        everything = await history(them[0])
        assert ids(everything) == list(range(1, len(everything) + 1))
        for person, count in zip(them, sent, strict=True):
            kept = {int(each["key"]) for each in everything if each["user"] == person.login}
            refused = {int(each["key"]) for each in person.errors}
            # What was not read was sent last: before it there is nothing without an answer.
            assert kept | refused == set(range(len(kept | refused)))
            assert {int(key) for key in person.own} == kept and 0 < len(kept) <= count


PATIENT = """run_app = chat.web.run_app
chat.web.run_app = lambda *args, **options: run_app(*args, **options | {"shutdown_timeout": 60})"""


@asynchronous
async def test_the_end_waits_for_no_browser(mongo):
    """After the close, a browser leaves it to the server to hang up: the end does not wait."""
    async with Chat(MONGODB_URI=mongo(), prelude=PATIENT) as chat, people(chat, None) as [person]:
        with RawClient(person) as browser:
            chat.process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(list, browser.events())
            browser.socket.sendall(client_frame(b"\x03\xe9", faults.CLOSE_FRAME))
            assert await asyncio.to_thread(chat.wait, 8) == 0  # aiohttp would wait for 10


# ---------------------------------------------------------------------------
# The database may fail
# ---------------------------------------------------------------------------


@asynchronous
async def test_the_database_fails(replica_set, tmp_path):
    """Whatever happens to the database, the chat says so, and goes on when it is back."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(20))  # all wait at once
    with Mongo(tmp_path) as server:
        await together(
            cut=database_fails(replica_set(), "cut"),
            silent=database_fails(replica_set(), "silent"),
            killed=database_fails(server.uri("chat"), "killed", server),
            election=database_fails(replica_set(), "election"),
            start=chat_starts_in_an_election(replica_set()),
        )


async def database_fails(uri, fault, server=None):
    """Pages and messages get errors in time; then all goes on, and everything is stored once."""
    texts = {f"{number:02}": f"{TEXT} {number}" for number in range(20)}
    async with (
        Proxy(uri) as proxy,
        chat_behind(proxy, 2, uri=proxy.discovered_uri()) as (chat, [person, other]),
    ):
        await person.post(key="before")
        await other.until(lambda: other.seen)
        await faults.switch(fault, proxy, server, works=False)
        start = time.monotonic()
        for key, text in texts.items():  # sent ahead: without waiting for answers
            await person.say(text, key)
        await pages_without_a_database(chat, other)
        await person.until(lambda: len(person.errors) == 20, start + 10 - time.monotonic())
        assert {each["key"] for each in person.errors} == texts.keys()
        assert not person.reading.done() and not other.reading.done()  # still connected
        told = chat.printed[2:]  # the first two lines said where it listens
        assert any("perhaps not stored" in line for line in told) and len(told) < 30
        await faults.switch(fault, proxy, server, works=True)
        await send_again(person, texts)
        await other.post(key="after")
        await everything_once(other, ["before", *texts, "after"])
        assert not other.errors and (await other.ask("/")).status == 200


async def pages_without_a_database(chat, person):
    """Within 10 seconds: 503 for what needs the database, and the rest as usual."""
    paths, start = ["/", "/messages?before=1", "/ws?after=1"] * 10, time.monotonic()
    async with Person(chat) as stranger:
        works = [stranger.ask(path) for path in ("/static/chat.js", "/login")]
        works.append(person.ask("/login"))
        fails = [person.ask(path) for path in paths] + [stranger.form("/login")]
        answers = await asyncio.gather(*works, *fails)
    assert [each.status for each in answers] == [200] * len(works) + [503] * len(fails)
    assert time.monotonic() - start < 10


async def chat_starts_in_an_election(uri):
    """A chat that starts while there is no primary waits for one."""
    async with Proxy(uri) as proxy:
        proxy.answer, start = faults.electing, time.monotonic()
        asyncio.get_running_loop().call_later(12, setattr, proxy, "answer", None)
        async with chat_behind(proxy, 1, uri=proxy.discovered_uri()) as (_, [person]):
            assert time.monotonic() - start > 12
            await person.post()


@asynchronous
async def test_the_end_without_a_database(replica_set, tmp_path):
    """The chat ends when it is told to, whatever has happened to the database."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(20))  # all wait at once
    with Mongo(tmp_path) as server:
        await together(
            while_it_connects=chat_ends_at_the_start(replica_set(), "ismaster"),
            while_it_starts=chat_ends_at_the_start(replica_set(), "createIndexes"),
            idle=chat_ends(replica_set(), "silent", 0),
            one_message=chat_ends(replica_set(), "silent", 1),
            silent=chat_ends(replica_set(), "silent", 12),
            cut=chat_ends(replica_set(), "cut", 12),
            killed=chat_ends(server.uri("chat"), "killed", 2, server),
        )


async def chat_ends(uri, fault, messages, server=None):
    """It ends in time; what got no answer is sent to the next process, and stored once."""
    texts = {f"{number:02}": TEXT for number in range(messages)}
    async with Proxy(uri) as proxy, chat_behind(proxy, 1) as (chat, [person]):
        await faults.switch(fault, proxy, server, works=False)
        for key, text in texts.items():
            await person.say(text, key)
            await asyncio.sleep(0.35)
        assert await chat.end(signal.SIGTERM, 10) == 0
        assert await person.closed() == 1001
        await faults.switch(fault, proxy, server, works=True)
        async with Chat(MONGODB_URI=uri) as person.chat:
            await person.connect()
            await send_again(person, texts)
        assert sorted(key for _, _, key, _ in stored(uri)) == sorted(texts)


async def chat_ends_at_the_start(uri, command):
    """It ends as well when the database falls silent at this command, before the chat is ready."""

    def answer(asked, reply):
        proxy.silent |= asked.name == command
        return reply

    async with Proxy(uri) as proxy:
        proxy.answer, chat = answer, Chat(MONGODB_URI=proxy.uri).spawn()
        try:
            async with asyncio.timeout(PATIENCE):
                while not proxy.silent:
                    await asyncio.sleep(0.02)
            assert await chat.end(signal.SIGTERM, 10) == 0 and not chat.printed
        finally:
            chat.kill()


@asynchronous
async def test_stored_but_not_acknowledged(replica_set):
    """An answer gets lost, a majority does not acknowledge in time, or the disk is full."""
    keys = ["lost", "lost as long as it tries", "64", "91", "14031"]  # codes of errors
    times = dict.fromkeys(keys, 1) | {"lost as long as it tries": 10**9}
    async with (
        Proxy(replica_set()) as proxy,
        chat_behind(proxy) as (chat, [person, other]),
    ):
        proxy.answer = faults.not_acknowledging(times)
        for key in keys:
            await person.say(TEXT, key)
            refused = key not in ("lost", "91")  # the driver tries those again by itself
            await person.until(
                lambda refused=refused, key=key: (
                    key in (str(person.errors) if refused else person.own)
                )
            )
            times[key] = 0
            for each in person, other:  # it was stored all the same
                await each.until(lambda e=each, key=key: e.seen and e.seen[-1]["key"] == key)
            del person.own[key]  # only an answer, and no refusal, brings it back
            await send_again(person, {key: TEXT})
        await everything_once(other, keys)
        assert {each["key"] for each in person.errors} == {*keys} - {"lost", "91"}
        for code in " 64\n", " 14031\n":  # one line of the log has it
            await person.until(lambda code=code: chat.log().count(code) == 1)


@asynchronous
@pytest.mark.parametrize("fault", ["refused", "not found"])
async def test_one_message_is_refused(mongo, fault):
    """A message that the database refuses, or cannot look up, does not make others fail."""
    key = "new" if fault == "refused" else "same"
    async with Proxy(mongo()) as proxy, chat_behind(proxy, 4) as (chat, them):
        early, person, honest, late = them
        await person.post(key="same")
        with pymongo.MongoClient(proxy.parts.geturl()) as client:
            rule = {"validator": {"key": {"$ne": "new"}}}
            client.get_default_database().command("collMod", "messages", **rule)
        proxy.delay, proxy.answer = 0.1, faults.finding_nothing_by_key
        await early.say(TEXT)  # while it is stored, the others gather
        await asyncio.sleep(0.05)
        await person.say(TEXT, key)
        for each in honest, late:
            await each.say(TEXT)
        for each in early, honest, late:
            await each.until(lambda each=each: each.own or each.errors)
            assert not each.errors
        await person.until(lambda: [each["key"] for each in person.errors] == [key])
        await person.until(lambda: fault != "refused" or " 121\n" in chat.log())


@asynchronous
async def test_catching_up(mongo):
    """A page of messages that ends early, as after an election, loses nothing."""
    lengths = []
    limits = {"PAGE_SIZE": "10", "RECENT_MAX": "10"}
    async with Proxy(mongo()) as proxy, chat_behind(proxy, 2, limits) as (_, [writer, reader]):
        for number in range(55):
            await writer.say(TEXT, f"{number}")
        await writer.until(lambda: len(writer.seen) == 55)
        proxy.answer = faults.ending_early(lengths)
        for pages in ([7], [0], [10, 3], [1, 0]):
            reader.seen, lengths[:] = writer.seen[:2], pages
            await reader.connect()
            await reader.until(lambda: len(reader.seen) >= 55)
            assert reader.seen == writer.seen and not lengths


@asynchronous
@pytest.mark.parametrize("index", [{"_id": 1}, {"user": 1, "key": 1}], ids=["number", "key"])
async def test_the_change_stream_tells_nothing(replica_set, index):
    """Two processes make one chat all the same, whichever index the database checks first."""
    indexes = [index]
    async with (
        Proxy(replica_set()) as proxy,
        chat_behind(proxy) as (_, [person, other]),
        Chat(MONGODB_URI=proxy.parts.geturl()) as second,
        Person(second, person.login) as elsewhere,
    ):
        proxy.answer = faults.without_news(indexes)
        await elsewhere.form("/login")
        await elsewhere.connect()
        for key in "1", "3", "twice":
            await elsewhere.post(key=key)
            await other.post(key=f"after {key}")  # with a number that is taken
        await person.say(TEXT, "twice")
        await person.until(lambda: [each["key"] for each in person.seen].count("twice") == 2)
        await elsewhere.post(key="last")
        for each in other, elsewhere:
            await each.until(lambda each=each: len(each.seen) == 7, 5)
            keys = "1", "after 1", "3", "after 3", "twice", "after twice", "last"
            await everything_once(each, keys)
        await person.ask("/logout", "POST")
        assert await person.closed() == 1008
        assert not indexes and not person.errors and not other.errors


@asynchronous
async def test_options_are_overruled(replica_set):
    """Nothing in the connection string makes messages less safe, and `admin` is not used."""
    async with Proxy(replica_set()) as proxy:
        uri = proxy.discovered_uri().replace(proxy.parts.path, "/admin")
        uri += "&" if "?" in uri else "?"
        uri += "readPreference=secondaryPreferred&w=0&journal=false&retryWrites=false"
        async with chat_behind(proxy, 1, uri=uri) as (_, [person]):
            await person.post()
            await person.ask("/logout", "POST")
            assert await person.closed() == 1008
    for name, collection, document in proxy.commands:
        if collection in ("messages", "users", "revoked_sessions"):
            assert document["$db"] == "chat"
        assert document.get("$readPreference", {"mode": "primary"})["mode"] == "primary", name
        if name in ("insert", "update", "delete", "createIndexes"):
            assert document["writeConcern"] == {"w": "majority", "j": True}, name
        if name in ("insert", "update"):
            assert document["txnNumber"], name  # so MongoDB carries it out once
        if name == "find":
            assert document["readConcern"]["level"] == "majority"
    asked = {each[:2] for each in proxy.commands}
    assert {("insert", "messages"), ("insert", "users"), ("find", "messages")} <= asked


@asynchronous
@pytest.mark.parametrize("kind", ["standalone", "replica set"])
async def test_without_change_streams(replica_set, tmp_path, kind):
    """Where the database has no change streams, one line says so, once, and one process works."""
    with Mongo(tmp_path, "--standalone") as server:
        async with Proxy(server.uri("chat") if kind == "standalone" else replica_set()) as proxy:
            proxy.answer = None if kind == "standalone" else faults.without_streams
            async with chat_behind(proxy) as (chat, [person, other]):
                await person.post()
                await other.until(lambda: other.seen)
                await other.ask("/logout", "POST")
                assert await other.closed() == 1008
                await person.until(lambda: {"type": "left", "user": other.login} in person.others)
                await asyncio.sleep(1.5)  # would it try again, and say so again?
                [line] = [each for each in chat.printed if not re.search("Running|CTRL", each)]
                assert "change streams" in line and "process" in line


# ---------------------------------------------------------------------------
# Settings, and Heroku
# ---------------------------------------------------------------------------


def ends_with_one_line(chat, hint, seconds=10):
    """The chat ends in time, with status 1 and one line that has the hint and no secret."""
    settings = {name: chat.env[name] for name in parts.SETTINGS & chat.env.keys()}
    try:
        status = chat.spawn().wait(seconds)
    except subprocess.TimeoutExpired:
        status = f"still running after {seconds} s"
    finally:
        chat.kill()
    lines = [each for each in chat.printed if "WT_VERB" not in each]  # WiredTiger's own
    assert status == 1 and len(lines) == 1, (settings, status, lines)
    assert lines[0].startswith("chat.py: ") and hint in lines[0], (settings, lines)
    for hidden in ("traceback", "error", "exception", "secret@", "word@", "fifteen", "hunter2"):
        assert hidden not in lines[0].lower(), lines


UNREACHABLE = "mongodb://127.0.0.1:1/"


def test_settings_that_cannot_work():
    """Each one ends the program in time, with one line that says which one it is."""
    uris = "postgres://localhost", "mongodb://me:pass/word@secret@127.0.0.1/chat"
    names = "bad.name", "bad%20name", "?tls=true&tlsCAFile=/no/such.pem"
    wrong = [("MONGODB_URI", {"MONGODB_URI": each}) for each in uris]
    wrong += [("MONGODB_URI", {"MONGODB_URI": UNREACHABLE + each}) for each in names]
    for name, value, hint in (
        ("PORT", "http", "port http"),
        ("PORT", "70000", "port 70000"),
        ("PORT", "-1", "port -1"),
        ("HOST", "192.0.2.1", "192.0.2.1"),
        ("HOST", "no such host", "no such host"),
        ("HTTPS", "maybe", "HTTPS"),
        ("SECRET_KEY", "fifteen letters", "SECRET_KEY"),
    ):
        wrong.append((hint, {"MONGODB_URI": UNREACHABLE, name: value}))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda each: ends_with_one_line(Chat(**each[1]), each[0]), wrong))


def test_ports_that_do_not_answer(mongo):
    """A database that does not answer is tried for 20 seconds; a port that is in use, once."""
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it accepts, and says nothing
        port = str(silent.getsockname()[1])
        addresses = f"127.0.0.1:{port}/", "127.0.0.1:1/", "u:12/x?hunter2Secret=1@127.0.0.1:1/"
        chats = [Chat(MONGODB_URI="mongodb://" + each) for each in addresses]
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda each: ends_with_one_line(each, "MONGODB_URI", 40), chats))
        ends_with_one_line(Chat(MONGODB_URI=mongo(), PORT=port), f"port {port} is in use")


def test_white_space_and_https(mongo):
    """White space around a setting is taken off, and HTTPS knows several words."""
    for word in "true", "YES", "on":
        settings = {"MONGODB_URI": mongo(), "HOST": "127.0.0.1", "PORT": "0", "HTTPS": word}
        with (
            Chat(**{name: f" {value}\n" for name, value in settings.items()}) as chat,
            urllib.request.urlopen(chat.url + "/login") as answer,
        ):
            assert answer.headers["Strict-Transport-Security"] == "max-age=31536000"


BUGS = "int('x')", "__import__('asyncoi')", "open('no such file')"
BUGS = [f"chat.routes = lambda: {bug}" for bug in BUGS] + ["chat.AsyncIOMotorClient = None"]


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_shows_its_traceback(mongo, bug):
    """A mistake in the program is not taken for a wrong setting."""
    chat = Chat(MONGODB_URI=mongo(), prelude=bug)
    try:
        assert chat.spawn().wait(PATIENCE) != 0
    finally:
        chat.kill()
    assert "Traceback" in chat.log() and "chat.py: " not in chat.log()


@asynchronous
async def test_data(house):
    """data/ is for its owner, and for one chat; others may use that one's database."""
    (house / "data").mkdir(mode=0o755)  # as somebody may have made it
    async with Chat(house, SECRET_KEY="", MONGODB_URI="", HOST="", HTTPS="") as chat:
        uri = (house / "data" / "database-uri").read_text()
        assert chat.printed[0] == f"The local database: {uri}\n"
        for path in (house / "data", *(house / "data").rglob("*")):
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
        await asyncio.to_thread(ends_with_one_line, Chat(house), "another chat uses data/")
        async with (
            people(chat, None, None) as [person, other],
            Chat(house, SECRET_KEY="", MONGODB_URI=uri) as other.chat,
        ):
            await person.connect()
            await other.connect()  # with the same key: the cookie is good there, too
            await other.post()
            await person.until(lambda: person.seen)


def test_data_that_cannot_be_used(house):
    """The line names the folder, the database or the key that is not what it should be."""
    data = house / "data"
    data.write_text("")
    ends_with_one_line(Chat(house), "data/")
    ends_with_one_line(Chat(house, SECRET_KEY="", MONGODB_URI=UNREACHABLE), "data/")
    data.unlink()
    (data / "db").mkdir(parents=True)
    for name in "WiredTiger", "WiredTiger.wt", "WiredTiger.turtle":
        (data / "db" / name).write_text("garbage")
    ends_with_one_line(Chat(house), "data/db")
    for key in b"too short", b"\xff" * 32:
        (data / "secret-key").write_bytes(key)
        ends_with_one_line(Chat(house, SECRET_KEY=""), "data/secret-key")


@asynchronous
async def test_heroku(mongo):
    """The Procfile's own command line works with app.json's settings, behind a router."""
    app = json.loads((HERE / "app.json").read_text())
    settings = {name: each["value"] for name, each in app["env"].items() if "value" in each}
    command = re.fullmatch(r"web: (.*)\n", (HERE / "Procfile").read_text())[1]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    settings |= {"MONGODB_URI": mongo(), "PATH": path, "PORT": str(free_port())}
    async with Chat(command=("sh", "-c", "exec " + command), **settings) as chat:
        assert "http://0.0.0.0:" in chat.log()
        async with Router(chat, "http") as plain, Person(plain) as person:
            answer = await person.ask("/login?x=1")
            secure = plain.url.replace("http:", "https:")
            assert answer.status == 308 and answer.headers["Location"] == secure + "/login?x=1"
        async with (
            Router(chat) as router,
            Router(chat, client="192.0.2.8") as elsewhere,
            Person(router) as person,
        ):
            await secure_cookie(person)
            await ten_wrong_passwords(person, elsewhere)
        assert await chat.end(signal.SIGTERM, 5) == 0


async def secure_cookie(person):
    """The cookie is for HTTPS alone, the browser is told so, and the WebSocket takes it."""
    own = {"Origin": person.chat.url.replace("http:", "https:")}
    answer = await person.form("/signup", headers={"Origin": person.chat.url})
    assert answer.status == 403
    answer = await person.form("/signup", headers=own)
    cookie = answer.headers["Set-Cookie"]
    assert answer.status == 303 and cookie.startswith("__Host-chat=")
    assert "; Secure" in cookie and "Path=/" in cookie and "Domain" not in cookie
    assert answer.headers["Strict-Transport-Security"] == "max-age=31536000"
    async with person.open(headers=own | {"Cookie": cookie.split(";")[0]}) as ws:
        assert (await ws.receive_json())[0]["users"] == [person.login]


async def ten_wrong_passwords(person, elsewhere):
    """They are counted for one address, whatever addresses the client makes up."""
    for number in range(10):
        forged = {"X-Forwarded-For": f"198.51.100.{number}"}
        assert (await person.form("/login", password="x", headers=forged)).status == 401
    assert (await person.form("/login")).status == 429
    person.chat = elsewhere
    assert (await person.form("/login")).status == 303


def test_heroku_files():
    """app.json has what Heroku knows and the chat needs; nothing overrules .python-version."""
    app = json.loads((HERE / "app.json").read_text())
    assert app.keys() <= {"name", "description", "keywords", "repository", "website", "env"}
    for setting in app["env"].values():
        assert setting.keys() <= {"description", "value", "required", "generator"}
        assert setting["description"]
    assert app["env"]["MONGODB_URI"]["required"] is True
    assert app["env"]["SECRET_KEY"]["generator"] == "secret"
    assert int(app["env"]["MOTOR_MAX_WORKERS"]["value"]) >= 20
    assert re.fullmatch(r"3\.1[123]\n", (HERE / ".python-version").read_text())
    assert not (HERE / "runtime.txt").exists()


def test_requirements():
    """They are pinned, and chat.py imports nothing else, except what comes with them."""
    lines = re.findall(r"(?m)^[^#\n]+", (HERE / "requirements.txt").read_text())
    pins = dict(line.split("==") for line in lines)
    imported = set()
    for node in ast.walk(ast.parse((HERE / "chat.py").read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", None) or each.name for each in node.names]
            imported |= {each.partition(".")[0].replace("_", "-") for each in names}
    # Jinja2 comes with aiohttp-jinja2; the local database does not, and the chat says so.
    assert imported - sys.stdlib_module_names - pins.keys() == {"jinja2", "secantus"}
    missing = Chat(prelude="import sys; sys.modules['secantus'] = None")
    ends_with_one_line(missing, "requirements-dev.txt")


# ---------------------------------------------------------------------------
# The page in the browser
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@on_pages
async def test_page_in_every_engine(mongo, chromium, tmp_path, engine):
    """Somebody who has only a keyboard can do everything, in each kind of browser."""
    uri = mongo()
    shown = parts.history_of(uri, 120)
    async with (
        Chat(MONGODB_URI=uri) as chat,
        people(chat, "anna") as [anna],
        parts.page_in(engine, chromium, tmp_path, chat) as page,
    ):
        await anna.connect("new")
        await page.set_viewport_size({"width": 1200, "height": 800})
        await page.goto(chat.url + "/signup")
        await parts.fill_in(page)
        await becomes_true(page, f"{PEOPLE} === 2")
        await walk_writing(page, anna)
        await walk_up(page, anna)
        await walk_lost_connection(page, chat, [*shown, "one\n\n\ntwo", "Hello ben", "news"])
        await walk_out(page, chat)


async def walk_writing(page, anna):
    """Both ways; one's own messages are on the right; Shift+Enter in a box that grows; dark."""
    await press(page, "one")
    height = await page.evaluate(f"{BOX}.offsetHeight")
    await press(page, *["Shift+Enter"] * 3, "two")
    assert await page.evaluate(f"{BOX}.offsetHeight") > height + 40
    await press(page, "Enter")
    await anna.until(lambda: anna.seen and anna.seen[-1]["text"] == "one\n\n\ntwo")
    await anna.say("Hello ben")
    await has(page, 52, f"{BOX}.offsetHeight === {height}")
    lefts = "[...document.querySelectorAll('.bubble')].map(it => it.getBoundingClientRect().left)"
    mine, others = (await page.evaluate(lefts))[-2:]
    assert others < mine - 100
    dark = "getComputedStyle(document.body).backgroundColor === 'rgb(17, 21, 28)'"
    assert await page.evaluate(dark)


async def walk_up(page, anna):
    """A window that becomes narrow stays at the bottom; older messages; what one reads stays."""
    for width in (*range(1200, 480, -60), 360):
        await page.set_viewport_size({"width": width, "height": 700})
        assert await page.evaluate(f"{LOG}.scrollTop > -1"), width
    await becomes_true(page, "document.getElementById('people-button').offsetHeight > 0")
    assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    await page.evaluate(f"{LOG}.scrollTop = -{LOG}.scrollHeight + {LOG}.clientHeight + 100")
    await page.evaluate("window.mark = document.querySelector('#messages li:nth-child(2) .text')")
    top = await page.evaluate(MARK_TOP)
    await has(page, 102)
    await anna.say("news")
    await has(page, 103, f"{JUMP}.textContent === 'New messages (1) ↓' && !{JUMP}.hidden")
    assert abs(await page.evaluate(MARK_TOP) - top) < 3
    await page.evaluate(f"{LOG}.scrollTop = -1e6")
    await has(page, 123, "document.getElementById('older').hidden")
    await page.evaluate(f"{JUMP}.click()")
    await becomes_true(page, f"{JUMP}.hidden && {LOG}.scrollTop > -1")


async def walk_lost_connection(page, chat, shown):
    """kill -9, and back: nothing is lost, nothing doubled, and what was typed goes on."""
    chat.kill()
    await becomes_true(page, "document.getElementById('connection').textContent !== ''", 5)
    await press(page, "waits 0", "Enter", "waits 1", "Enter", "half a sent")
    states = "[...document.querySelectorAll('#unsent .state')].map(each => each.textContent)"
    assert await page.evaluate(states) == ["Sending…"] * 2
    await asyncio.to_thread(chat.start)
    await has(page, len(shown) + 2, "document.getElementById('connection').textContent === ''")
    await becomes_true(page, "document.querySelectorAll('#unsent li').length === 0")
    all_texts = f"[...document.querySelectorAll('{MESSAGES}')].map(each => each.textContent)"
    assert await page.evaluate(all_texts) == [*shown, "waits 0", "waits 1"]
    await page.evaluate("void location.reload()")
    await has(page, 50, f"{BOX}.value === 'half a sent'")


async def walk_out(page, chat):
    """A log-out in another tab, which has the same cookie; then one in this tab."""
    await page.evaluate("void fetch('/logout', { method: 'POST' })")
    await becomes_true(page, "location.search === '?ended' && !!document.forms[0]")
    assert await page.evaluate("document.body.textContent.includes('Your session has ended')")
    await page.goto(chat.url + "/login")
    await parts.fill_in(page)
    await has(page, 50, f"{BOX}.value === 'half a sent'")
    await page.evaluate("document.querySelector('header form button').click()")
    await becomes_true(page, "location.pathname === '/login' && !location.search")


@on_pages
async def test_page_two_people(chat, chromium):
    """Two people see the same messages, with their authors, the day, and the time where they are."""
    async with (
        tab(chromium, chat) as anna,
        tab(chromium, chat, "Боря" + secrets.token_hex(3)) as boris,
    ):
        await expect(anna.locator("#text")).to_be_focused()
        said = ["Hello!", "<b>bold?</b> שלום", "one\n    two"]
        for page, text in zip((anna, anna, boris), said, strict=True):
            await type_in(page, text)
            await shows_last(boris, text)
        for page, classes in (anna, ["mine", "mine same", ""]), (boris, ["", "same", "mine"]):
            await shows_last(page, said[2])
            assert (await texts(page))[-3:] == said
            same = "all => all.slice(-3).map(each => each.className)"
            assert await page.locator("#messages li").evaluate_all(same) == classes
            assert await page.locator(".day:visible").count() == 1
            stamp = page.locator("#messages time").last
            hour = (int((await stamp.get_attribute("datetime"))[11:13]) + 9) % 24  # Tokyo
            assert (await stamp.text_content()).startswith(f"{hour:02}:")
            assert re.match(rf"\w+day,? .* {hour:02}:", await stamp.get_attribute("title"))
            assert await page.locator(".name:not([translate=no])").count() == 0
        await has_no_barriers(boris)


@on_pages
async def test_page_who_comes_and_goes(mongo, chromium):
    """The page says who has come and who has gone, but not that somebody has reloaded it."""
    async with page_of(chromium, mongo()) as (_, page, _):
        await page.clock.install()
        wires, news = await Wires().through(page), page.locator("#news")
        joined, left = ({"type": kind, "user": "boris"} for kind in ("joined", "left"))
        wires.send(joined)
        await expect(news).to_have_text("boris joined")
        await page.evaluate("""window.changes = 0;
            new MutationObserver(() => changes++).observe(
                document.getElementById("news"), { childList: true })""")
        await page.clock.pause_at(datetime.now() + timedelta(seconds=2))
        for event, seconds in ((left, 1), (joined, 5)):
            wires.send(event)
            await page.clock.run_for(seconds * 1000)
        assert await page.evaluate("changes") == 0
        wires.send(left)
        await page.clock.run_for(3_000)
        await expect(news).to_have_text("boris left")


@on_pages
async def test_page_log_out_then_stop(chat, chromium):
    """A page that was not left after all goes on, also when it loses the connection."""
    async with tab(chromium, chat) as page:
        wires = await Wires().through(page)
        # As if somebody pressed the browser's button "Stop":
        stop = "document.forms[0].addEventListener('submit', event => event.preventDefault())"
        await page.evaluate(stop)
        await page.get_by_role("button", name="Log out").click()
        await wires.pairs[-1][0].close()
        await expect(page.locator("#connection")).to_contain_text("Disconnected")
        await type_in(page, f"{page.login} is here")
        await shows_last(page, f"{page.login} is here")


SLOW = """import time
chat.hash_password = lambda it, real=chat.hash_password: time.sleep(1) or real(it)"""


@on_pages
async def test_page_double_click_on_sign_up(mongo, chromium):
    """Who clicks twice on "Sign up" is signed in, and not told that the name is taken."""
    async with (
        Chat(MONGODB_URI=mongo(), prelude=SLOW) as chat,
        tab(chromium, chat, sign_up=False) as page,
    ):
        await page.goto(chat.url + "/signup")
        await page.get_by_label("Username").fill("u" + secrets.token_hex(5))
        await page.get_by_label("Password").fill(PASSWORD)
        button = await page.locator("form button").bounding_box()
        for _ in range(2):
            await page.mouse.click(button["x"] + 9, button["y"] + 9)
            await asyncio.sleep(0.3)
        await page.wait_for_url(chat.url + "/")


@on_pages
async def test_page_forms_and_small_screens(chat, chromium):
    """The forms say what is wrong, and where; all pages fit, and a screen reader can read them."""
    options = {"viewport": {"width": 320, "height": 500}, "device_scale_factor": 2}
    async with tab(chromium, chat, "W" * 14 + secrets.token_hex(3), **options) as page:
        await type_in(page, "w" * 300)
        await shows_last(page, "w" * 300)
        await page.locator("#people-button").click()
        await expect(page.locator("#online")).to_contain_text(page.login)
        await has_no_barriers(page)
        assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        await page.context.clear_cookies()
        for path, login, said, field in (
            ("/nothing", None, None, None),
            ("/signup", "anna\u3164", "3 to 20 letters", "login"),
            ("/login", page.login, "Wrong username or password.", "password"),
        ):
            await page.goto(chat.url + path)
            if login:
                await parts.fill_form(page, login, "wrong password")
                await expect(page.get_by_role("alert")).to_contain_text(said)
                assert await page.locator("[aria-invalid=true]").get_attribute("name") == field
            await has_no_barriers(page)
            assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth"), path


@on_pages
async def test_page_a_message_that_could_not_be_stored(tmp_path, chromium):
    """A message that failed says so, and waits until its writer sends it again or changes it."""
    with Mongo(tmp_path) as mongo:
        async with page_of(chromium, mongo.uri("chat")) as (chat, page, _):
            mongo.kill()
            await type_in(page, "again", "edit")
            refused = page.locator("#unsent .failed .state")
            await expect(refused).to_have_count(2)
            await expect(refused.first).to_contain_text("may not have been")
            await has_no_barriers(page)
            mongo.start()
            chat.kill()
            await asyncio.to_thread(chat.start)  # they are not sent again by themselves
            await expect(page.locator("#connection")).to_have_text("")
            await page.reload()
            await expect(refused).to_have_count(2)
            await page.get_by_role("button", name="Edit").last.click()
            await expect(page.locator("#text")).to_have_value("edit")
            await expect(page.locator("#text")).to_be_focused()
            await page.get_by_role("button", name="Try again").click()
            await shows_last(page, "again")
            await page.locator("#text").press("Enter")
            await shows_last(page, "edit")
            await expect(page.locator("#unsent li")).to_have_count(0)


@on_pages
async def test_page_older_messages_that_do_not_come(mongo, chromium):
    """Older messages that could not be loaded can be asked for again."""
    async with page_of(chromium, mongo(), 150) as (chat, page, wanted):
        await page.goto(chat.url + "/?before=100")  # for readers without JavaScript
        await page.wait_for_url(chat.url + "/")
        await becomes_true(page, f"{PEOPLE} === 1")
        assert await texts(page) == wanted[-50:]
        await page.route("**/messages?*", lambda route: route.abort())
        await page.locator("#older").click()
        await expect(page.get_by_text("could not be loaded")).to_be_visible()
        await page.unroute("**/messages?*")
        await page.locator("#older").press("Enter")
        await expect(page.get_by_text("could not be loaded")).to_be_hidden()
        await expect(page.locator(MESSAGES)).to_have_text(wanted[-100:])


@on_pages
async def test_page_a_long_history(mongo, chromium):
    """All older messages can be reached, and the page lets them go again at the bottom."""
    async with page_of(chromium, mongo(), 400) as (_, page, wanted):
        await page.evaluate(f"""async () => {{
            while (!document.getElementById("older").hidden) {{
                {LOG}.scrollTop = -1e7;
                await new Promise(requestAnimationFrame);
            }}
        }}""")
        assert await texts(page) == wanted
        await page.evaluate(f"{LOG}.scrollTop = 0")
        await expect(page.locator(MESSAGES)).to_have_count(300)
        for key, distance in (("ArrowUp", -20), ("PageUp", -200)):  # only the messages scroll
            await page.locator("#log").press(key)
            await becomes_true(page, f"{LOG}.scrollTop < {distance}")
        await page.evaluate(f"{LOG}.scrollTop = -1e7")
        await expect(page.locator(MESSAGES)).to_have_count(350)
        assert await texts(page) == wanted[50:]


@on_pages
async def test_page_ten_thousand_messages_while_somebody_reads(mongo, chromium):
    """Whatever comes, what somebody reads stays in its place, and the page stays small."""
    async with page_of(chromium, mongo(), 100) as (_, page, _):
        wires = await Wires().through(page)
        await page.evaluate(f"{LOG}.scrollTop = -400")
        await page.evaluate("window.mark = document.querySelector('#messages li:nth-child(9)')")
        top = await page.evaluate(MARK_TOP)
        for first in range(101, 10_101, 200):
            wires.send(*(message(number, f"t {number}") for number in range(first, first + 200)))
        jump = page.get_by_role("button", name="New messages (10000)")
        await expect(jump).to_be_visible()
        assert abs(await page.evaluate(MARK_TOP) - top) < 3
        assert await page.locator("#messages li").count() <= 600
        await jump.click()
        await expect(page.get_by_text("t 10100", exact=True)).to_be_in_viewport()
        await expect(page.locator("#jump")).to_be_hidden()
        await expect(page.locator("#text")).to_be_focused()
        assert await texts(page) == [f"t {number}" for number in range(9_801, 10_101)]
        await expect(page.locator("#older")).to_be_visible()


@on_pages
async def test_page_a_thousand_people_come(chat, chromium):
    """When a thousand people come, the list is drawn a few times, and messages do not wait."""
    async with tab(chromium, chat) as page:
        wires = await Wires().through(page)
        await page.evaluate("""window.drawn = 0, window.start = performance.now();
            new MutationObserver(() => drawn++).observe(
                document.getElementById("online"), { childList: true })""")
        for number in range(1000):
            wires.send({"type": "joined", "user": f"user_{number:04}"})
        wires.send(message(1_000_000, "hello all"))
        await shows_last(page, "hello all")
        await becomes_true(page, f"{PEOPLE} > 1000")
        assert await page.evaluate("drawn <= (performance.now() - start) / 200 + 2")


@pytest.mark.parametrize("silent", [True, False])
@on_pages
async def test_page_a_silent_connection(chat, chromium, silent):
    """A connection is given up when nothing comes any more, and not when an answer takes long."""
    async with tab(chromium, chat) as page, people(chat, None) as [person]:
        await person.connect("new")
        await page.clock.install()
        wires = await Wires().through(page)
        wires.cut()
        if silent:
            await person.post(f"to {page.login}")
            await page.clock.fast_forward(30_000)
            assert await page.locator("#connection").text_content() == ""
            await page.clock.fast_forward(10_000)
            await shows_last(page, f"to {page.login}")
            return
        await type_in(page, f"from {page.login}")
        for number in range(10):
            await page.clock.fast_forward(10_000)
            wires.send(message(10**9 + number, f"sign {number}"))
            await shows_last(page, f"sign {number}")
        await expect(page.locator("#connection")).to_have_text("")
        await expect(page.locator("#unsent .state")).to_have_text("Sending…")


@pytest.mark.parametrize("event", ["visibilitychange", "online", "offline"])
@on_pages
async def test_page_looked_at_again(chat, chromium, event):
    """Who comes back to a page learns within five seconds whether it is connected."""
    look = f"document.dispatchEvent(new Event('{event}', {{ bubbles: true }}))"
    async with tab(chromium, chat) as page:
        await page.clock.install()
        wires, state = await Wires().through(page), page.locator("#connection")
        await page.evaluate(look)
        await type_in(page, f"from {page.login}")
        await shows_last(page, f"from {page.login}")
        await page.clock.fast_forward(5_000)
        assert await state.text_content() == ""
        wires.cut()
        wires.dead = True
        await page.evaluate("""window.said = "", new MutationObserver(() =>
            said += document.getElementById("connection").textContent
        ).observe(document.getElementById("connection"), { childList: true })""")
        await page.evaluate(look)
        await page.clock.fast_forward(5_000)
        assert "Disconnected" in await page.evaluate("said")  # soon it is connected again


@on_pages
async def test_page_deleted_messages(mongo, chromium):
    """Messages that were deleted by hand do not keep the page from the others, old and new."""
    uri = mongo()
    async with page_of(chromium, uri, 260) as (chat, page, wanted):
        with pymongo.MongoClient(uri) as client:
            messages = client.get_default_database("chat").messages
            messages.delete_many({"_id": {"$in": [50, *range(101, 221)]}})
            await page.reload()
            end = f"{LOG}.scrollTop = -1e7, document.getElementById('older').hidden"
            await becomes_true(page, end)
            assert await texts(page) == wanted[:49] + wanted[50:100] + wanted[220:]
            messages.delete_many({"_id": {"$gt": 10}})
        await page.reload()
        await type_in(page, "anybody here?")
        await shows_last(page, "anybody here?")
        # A backup was put back: the open page begins anew, and sends what it has.
        chat.kill()
        await type_in(page, "unsent")
        with pymongo.MongoClient(uri) as client:
            client.get_default_database("chat").messages.delete_many({"_id": {"$gt": 10}})
        await asyncio.to_thread(chat.start)
        await expect(page.locator(MESSAGES)).to_have_text([*wanted[:10], "unsent"])
        await expect(page.locator("#connection")).to_have_text("")


@on_pages
async def test_page_typing(chat, chromium):
    """A text that is too long is refused visibly and kept, except for megabytes."""
    async with tab(chromium, chat) as page:
        box, counter = page.locator("#text"), page.locator("#counter")
        await box.fill("😀" * 2003)
        await expect(counter).to_have_text("Characters left: -3")
        await expect(box).to_have_attribute("aria-invalid", "true")
        await box.press("Enter")
        await page.reload()
        await expect(box).to_have_value("😀" * 2003)
        await box.fill("")
        await page.keyboard.insert_text("some text of a log line\n" * 85_000)
        assert len(await box.input_value()) <= 20_000
        assert await page.evaluate("Object.values(localStorage).join('').length") < 50_000
        await box.fill("one")
        await box.press("Shift+Enter")
        await page.keyboard.type("two")
        await box.dispatch_event("keydown", {"key": "Enter", "isComposing": True})
        await expect(box).to_have_value("one\ntwo")
        await page.get_by_role("button", name="Send").click()
        await shows_last(page, "one\ntwo")
        await expect(box).to_be_focused()


LINKS = {
    "https://en.wikipedia.org/wiki/Python_(programming_language)": None,
    "https://ja.wikipedia.org/wiki/日本?q=[1]&c=2.5#d": None,
    "(see https://example.com/a) “https://example.com/a”, «https://example.com/a»": "",
    "链接：https://example.com/a。好的": "",
    "`https://example.com/a` **https://example.com/a** https://example.com/a… and?": "",
}


@on_pages
async def test_page_links(chat, chromium):
    """A link ends where a reader sees its end, and its page learns nothing of the chat."""
    async with tab(chromium, chat) as page:
        for text, url in LINKS.items():
            await type_in(page, text)
            await shows_last(page, text)
            links = page.locator("#messages li:last-child a")
            assert await links.count() == text.count("https")
            for link in await links.all():
                wanted = text if url is None else "https://example.com/a"
                assert await link.get_attribute("href") == wanted
                assert "noopener" in await link.get_attribute("rel")


@on_pages
async def test_page_accents_stay_in_their_bubble(chat, chromium):
    """A hundred accents on one letter are not painted over the messages of others."""
    async with tab(chromium, chat) as page:
        await type_in(page, "above", "H" + "\u0302" * 60 + "E" + "\u0323" * 60, "below")
        await shows_last(page, "below")
        items = page.locator(MESSAGES)
        index = await items.count() - 2
        with_accents = [await items.nth(index + step).screenshot() for step in (-1, 1)]
        await items.nth(index).evaluate("each => each.textContent = 'HE'")
        assert with_accents == [await items.nth(index + step).screenshot() for step in (-1, 1)]


@on_pages
async def test_page_on_paper(mongo, chromium):
    """The whole conversation is printed, in dark ink, without what one cannot press on paper."""
    async with page_of(chromium, mongo(), 50, color_scheme="dark") as (_, page, _):
        assert len(re.findall(rb"/Type\s*/Page\b", await page.pdf())) > 1
        await page.emulate_media(media="print", color_scheme="dark")
        assert await page.evaluate(f"{LOG}.scrollHeight <= {LOG}.clientHeight")
        assert await page.locator(":is(button, textarea, #people, #hint):visible").count() == 0
        ink = "getComputedStyle(document.querySelector('#messages .text')).color"
        assert await page.evaluate(ink) == "rgb(0, 0, 0)"


LOOK_AWAY = """Object.defineProperty(document, "hidden", { get: () => window.isAway });
window.look = (away) => {
    window.isAway = away;
    document.dispatchEvent(new Event("visibilitychange"));
};"""


@on_pages
async def test_page_title(chat, chromium):
    """The title of a tab that nobody looks at says how many messages came."""
    async with tab(chromium, chat, script=LOOK_AWAY) as page, people(chat, None) as [person]:
        await person.connect("new")
        await page.evaluate("look(true)")
        for text in ("one", "two", "three"):
            await person.post(text)
        await expect(page).to_have_title("(3) Messages · Chat")
        await page.evaluate("look(false)")
        await expect(page).to_have_title("Messages · Chat")


CLOCK_GOES_BACK = "Date.now = ((time) => () => (time -= 60_000))(Date.now())"


@on_pages
async def test_page_order_of_the_outbox(chat, chromium):
    """What was typed offline goes out in the order in which it was typed, whatever the clock says."""
    async with tab(chromium, chat, script=CLOCK_GOES_BACK) as page:
        wires = await Wires().through(page)
        wires.dead = True
        await page.reload()
        typed = [f"waits {number} {page.login}" for number in range(12)]
        await type_in(page, *typed)
        await page.reload()
        await expect(page.locator("#unsent .text")).to_have_text(typed)
        wires.dead = False
        await page.reload()
        await shows_last(page, typed[-1])
        assert (await texts(page))[-12:] == typed


# Here, a message with a link is one that the page cannot show.
NO_LINKS = """Object.defineProperty(HTMLAnchorElement.prototype, "href", {
    set() { throw new Error("broken on purpose") } })"""
FORBIDDEN = """Object.defineProperty(window, "localStorage", {
    get() { throw new Error("broken on purpose") } })"""


@pytest.mark.parametrize("script", [NO_LINKS, FORBIDDEN], ids=["nonsense", "forbidden"])
@on_pages
async def test_page_and_what_is_broken(chat, chromium, script):
    """With nonsense in the storage, or without it, the page works, and loses nothing unasked."""
    async with tab(chromium, chat, script=script) as page:
        for value in ("{", "null", "[]", '{"text": 5}') if script == NO_LINKS else ():
            for path in (f"draft {page.login}", f"unsent {page.login} {value}"):
                await page.evaluate("pair => localStorage.setItem(...pair)", [path, value])
        await page.reload()
        await expect(page.locator("#text")).to_have_value("")
        await type_in(page, "https://example.com", f"from {page.login}")
        await shows_last(page, f"from {page.login}")
        await page.keyboard.type("not sent")
        asked = []

        async def ask(dialog):
            asked.append(dialog.type)
            await dialog.accept()

        page.on("dialog", ask)
        await page.reload()
        # Either it is there again, or the browser has asked before it was lost.
        kept = await page.locator("#text").input_value()
        assert (kept, asked) == (
            ("", ["beforeunload"]) if script == FORBIDDEN else ("not sent", [])
        )


@on_pages
async def test_page_and_somebody_else(mongo, chromium):
    """What one has not sent is not sent, and not shown, under another login."""
    async with (
        page_of(chromium, mongo(), login="anna") as (chat, page, _),
        people(chat, "mallory") as [other],
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
        await shows_last(page, "hello")
        assert "a secret" not in await page.content()
        await page.context.clear_cookies()
        await page.goto(chat.url + "/login")
        await parts.fill_form(page, "anna")
        await expect(page.locator(MESSAGES)).to_have_text(["hello", "a secret"])
        await expect(page.locator("#text")).to_have_value("a draft")


@on_pages
async def test_page_without_javascript(mongo, chromium):
    """Without JavaScript, one can read all messages, and log out."""
    async with page_of(chromium, mongo(), 51, java_script_enabled=False) as (chat, page, wanted):
        assert await texts(page) == wanted[1:]
        await page.locator("#older").click()
        assert await texts(page) == wanted[:1]
        await page.get_by_role("button", name="Log out").click()
        await page.wait_for_url(chat.url + "/login")


@on_pages
async def test_page_weight(mongo, chromium):
    """The page loads 50 KB at most, and the second time only itself."""
    async with page_of(chromium, mongo(), 50) as (chat, first, _):
        state = await first.context.storage_state()
        page = await (await chromium.new_context(storage_state=state)).new_page()
        again = "performance.getEntriesByType('resource').map(each => each.transferSize)"
        await page.goto(chat.url, wait_until="networkidle")
        sizes = await page.evaluate(again)
        assert len(sizes) <= 4 and 1000 < sum(sizes) < 35_000, sizes
        await page.goto(chat.url, wait_until="networkidle")
        assert sum(await page.evaluate(again)) == 0  # from the cache
        assert len(await page.content()) < 35_000
        await page.context.close()
