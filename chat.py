"""A chat over WebSockets in one file. Read it from top to bottom, once.

Run it with ``python chat.py``, open the address that it prints, and read on with
``tutorial/README.md`` beside you. The sections have the order of the tutorial's chapters;
``grep '^# [0-9]' chat.py`` prints them.

The way of a message::

    browser --ws--> websocket() --> inbox --> Room.write(): ONE insert_many for all that wait
                                                 |                     |
                                                 | stored           MongoDB
                                                 v                     | "something has changed"
    browser <--ws-- one frame, the same  <-- Room.hear()               v (change stream)
                    for everybody                ^---- Room.read_on() in all other processes

Nobody sees a message before MongoDB has acknowledged it. Everybody sees all messages in one
order: that of their numbers, 1, 2, 3, ... without a gap. In this file, `websocket()` stands in
section 4, and `Room` in section 6; the passwords are in section 8.
"""

# ---------------------------------------------------------------------------
# 1. Introduction
# ---------------------------------------------------------------------------
# First what Python brings along. Then the five packages of requirements.txt:
# aiohttp is the web server, aiohttp_jinja2 makes pages from templates,
# aiohttp_session remembers who is who, cryptography hashes the passwords (and
# encrypts what aiohttp_session keeps), and Motor speaks with MongoDB. Motor
# brings along pymongo, whose exceptions we have to name.

import asyncio
import fcntl
import hashlib
import json
import logging
import os
import re
import socket
import sys
import warnings
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from secrets import token_hex
from unicodedata import normalize

import aiohttp_jinja2
import jinja2
from aiohttp import WSCloseCode, WSMsgType, web
from aiohttp.http import HttpProcessingError
from aiohttp_session import get_session, new_session, session_middleware
from aiohttp_session.cookie_storage import EncryptedCookieStorage
from cryptography.exceptions import InvalidKey
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from motor.motor_asyncio import AsyncIOMotorClient
from pymongo.errors import BulkWriteError, DuplicateKeyError, PyMongoError
from pymongo.read_concern import ReadConcern

# ---------------------------------------------------------------------------
# 2. Structure
# ---------------------------------------------------------------------------
# The settings come from the environment (https://12factor.net/config): so the
# same file runs here and on a server, and no password is ever in git. An empty
# setting is an unset one.

HERE = Path(__file__).resolve().parent
DATA = HERE / "data"  # the local database and the secret key; git ignores it
ENV = {name: value for name, value in os.environ.items() if value}
MONGODB_URI = ENV.get("MONGODB_URI")  # none: the local database
HOST, PORT = ENV.get("HOST", "127.0.0.1"), ENV.get("PORT", "8080")
HTTPS = ENV.get("HTTPS") == "1"  # behind a router that speaks HTTPS for us

# The limits. Without them, one careless or hostile client could use up what all
# need.

PAGE, RECENT_MAX = 50, 200  # messages: in a page or a query; in memory, for who comes back
TEXT_MAX, KEY_MAX = 2_000, 64  # characters: of a message; of a client's own name for it
BODY_MAX = 64 * 1024  # bytes of a form, or of a WebSocket frame
INBOX_MAX = 200  # messages that wait to be stored by one insert; then their senders wait
UNREAD_MAX = 1_000_000  # bytes that wait for one client, before we cut it off
HEARTBEAT = 27  # seconds between pings; Heroku's router cuts after 55 of silence
DATABASE_SECONDS, CLOSE_SECONDS = 3, 1  # for the database to answer; for a client to close
PULSE_SECONDS, ONLINE_SECONDS = 10, 35  # between signs of life; without one, users have left
SESSION = timedelta(days=7)  # from the login, used or not
WRONG_MAX, WRONG_TIME = 10, timedelta(minutes=5)  # wrong passwords; how long they count

# The key under which handlers find the room in `request.app`. A string would
# do, but could clash with some package's string; an AppKey cannot, and tells an
# editor the type.
ROOM = web.AppKey("ROOM", "Room")


def create_app():
    """The whole application, on one screen."""
    # An onion: a request passes these from left to right, its response from
    # right to left.
    middlewares = [error_pages, protect, sessions(), authorize, db_handler]
    app = web.Application(middlewares=middlewares, client_max_size=BODY_MAX)
    app.add_routes(routes())
    set_up_templates(app)
    # A signal is a list of coroutines that aiohttp calls at a certain moment:
    # this one just before a response is sent.
    app.on_response_prepare.append(add_headers)
    # It runs up to its `yield` before the first request, and on from there
    # after the last.
    app.cleanup_ctx.append(database)
    # Not in the clean-up: that begins when all handlers have ended, and the
    # WebSockets' handlers never end by themselves.
    app.on_shutdown.append(say_goodbye)
    return app


# ---------------------------------------------------------------------------
# 3. Routes
# ---------------------------------------------------------------------------


def routes():
    """The table of all addresses. The names are for `url()` in the templates."""
    return [
        web.get("/", chat_page, name="chat"),  # `get` answers HEAD as well
        web.get("/messages", older_messages, name="messages"),
        web.get("/ws", websocket, name="websocket"),
        web.view("/login", Login, name="login"),
        web.view("/signup", Signup, name="signup"),
        # Not GET: a link on any other site would log people out.
        web.post("/logout", logout, name="logout"),
        web.static("/static", HERE / "static", name="static"),
    ]


# ---------------------------------------------------------------------------
# 4. Request and response
# ---------------------------------------------------------------------------
# A handler is a coroutine that takes a request and returns a response. First
# the pages:


@aiohttp_jinja2.template("chat.html")
async def chat_page(request):
    """The newest messages as a page; or those before ``?before=``, without JavaScript."""
    newest = str(request.app[ROOM].last + 1)
    # The decorator renders the template with what we return.
    return {"user": request["user"], "messages": await messages_before(request, newest)}


async def older_messages(request):
    """JSON: ``{"messages": [event, ...]}``, see event()."""
    return web.json_response({"messages": await messages_before(request)}, dumps=encode)


async def messages_before(request, default=""):
    """The PAGE events just before number ``?before=``, oldest first."""
    # What stands behind the "?" of an address is text, whatever it looks like.
    before = number(request.query.get("before", default))
    before = min(before, request.app[ROOM].last + 1)  # MongoDB's integers have an end
    return await read_messages(request["db"], max(before - PAGE, 1), before - 1)


def number(text):
    """A number from a query, or 400. `int` alone takes " 1_0", and chokes on "9" * 5000."""
    if not re.fullmatch("-?[0-9]{1,100}", text):
        raise web.HTTPBadRequest(text="This address lacks the number of a message.")
    return int(text)


# Then the WebSocket. Its handler runs as long as the connection is open.


async def websocket(request):
    """The live chat. Room.join() tells what comes first.

    ``/ws?after=ID`` begins with what came after that number, ``/ws?after=``
    with the very first message, and ``/ws`` with what is new.
    """
    room = request.app[ROOM]
    after = number(request.query.get("after", str(room.last)) or "0")
    # Larger frames are refused (1009). Nothing is deflated: that would be done
    # for each client anew, and halve the speed. And nothing is sent behind our
    # back (pongs), or waits for a client (writer_limit): Connection.send()
    # tells why.
    limits = {"max_msg_size": BODY_MAX + 1, "writer_limit": sys.maxsize}
    ws = web.WebSocketResponse(heartbeat=HEARTBEAT, autoping=False, compress=False, **limits)
    # This answers the handshake (101). Before it we speak HTTP, afterwards
    # frames.
    writer = await ws.prepare(request)
    connection = Connection(ws, request)
    try:
        await room.join(connection, max(after, 0), writer)
        async for frame in ws:
            if frame.type is WSMsgType.BINARY:
                await connection.close(WSCloseCode.UNSUPPORTED_DATA)
            elif frame.type is WSMsgType.PING:
                await connection.send(frame.data, ws.pong)
            elif frame.type is WSMsgType.TEXT:
                text, key = read_post(frame.data)
                if text and not room.closing:
                    post = {"user": connection.user, "key": key or token_hex(16), "text": text}
                    # While the inbox is full, this waits, so we read nothing
                    # more, so the client cannot send: one that is too fast is
                    # slowed down, and loses nothing.
                    await room.inbox.put((connection, key, post))
                else:
                    await connection.refuse(key, GOODBYE if text else NO_MESSAGE)
                    await asyncio.sleep(0)  # let others run: nothing else slows down nonsense
    except (PyMongoError, TimeoutError, ConnectionError):  # it missed something: come again!
        await connection.close(WSCloseCode.TRY_AGAIN_LATER)
    finally:  # however it ended; the bell: have a look at who is still here
        room.connections.discard(connection)
        room.bell.set()
    return ws


# What a client is told whose message is not stored.
NO_MESSAGE = f"A message has 1 to {TEXT_MAX:,} characters, and a key of at most {KEY_MAX}."
GOODBYE = "This message was not stored: the chat is just ending."


def read_post(data):
    """What a client sent: its text, stripped, or "" if it cannot be taken; its key or None."""
    try:
        post = json.loads(data)
        text, key = post.get("text"), post.get("key")
    except (ValueError, AttributeError, RecursionError):  # "[[[[[[..." goes too deep
        return "", None
    # A string may be longer for JavaScript, which counts UTF-16: "😀" is 1 here,
    # 2 there.
    good = is_text(text) and len(text.strip()) <= TEXT_MAX
    good = good and (key is None or is_text(key) and 1 <= len(key) <= KEY_MAX)
    return text.strip() if good else "", key


def is_text(value):
    """Whether it is a string that UTF-8 can hold: JSON can spell half characters, too."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


# Letters as they are, not as \u0436: that makes a Russian message a third as
# long.
encode = partial(json.dumps, ensure_ascii=False, separators=(",", ":"))


class Connection:
    """An open WebSocket: whose it is, and how to send to it."""

    def __init__(self, ws, request):
        # The transport is asyncio's end of the line. It knows how much waits to
        # be sent.
        self.ws, self.transport = ws, request.transport
        self.user, self.session = request["user"], request["session"]
        self.until = datetime.fromtimestamp(self.session.created, UTC) + SESSION
        self.live = False  # it has caught up, and is shown what comes

    async def send(self, frame, send=None):
        """Send a frame (a string, or with `ws.pong` bytes), without waiting for the client.

        If we waited, one client that stops reading would hold up all the
        others. So what it leaves unread waits in memory, and when that is too
        much, we cut it off: the page connects again, and says what it has seen.
        """
        if self.transport.get_write_buffer_size() > UNREAD_MAX:
            self.transport.abort()
        with suppress(ConnectionError):  # it is closing anyway
            await (send or self.ws.send_str)(frame)

    async def refuse(self, key, reason):
        """Tell this client alone that one of its messages is not stored."""
        named = {"key": key} if is_text(key) else {}
        await self.send(encode([{"type": "error", "text": reason, **named}]))

    async def close(self, code):
        """Close it politely, or with force if it does not even read our "close".

        The codes: https://www.rfc-editor.org/rfc/rfc6455#section-7.4.1
        """
        with suppress(TimeoutError):
            await asyncio.wait_for(self.ws.close(code=code), CLOSE_SECONDS)
        self.transport.abort()


# At last the forms. A view is a class with a method for each method of HTTP.


class Form(web.View):
    """What both forms have in common."""

    async def get(self):
        """The empty form, for those who are not signed in."""
        if self.request["user"]:
            raise web.HTTPSeeOther("/")
        return self.page(200)

    head = get  # for HTTP, HEAD is a GET of which only the headers are sent

    def page(self, status, **context):
        """The form with the `login` that was typed and its `fault`; never the password."""
        template = f"{self.request.match_info.route.name}.html"
        return aiohttp_jinja2.render_template(template, self.request, context, status=status)

    async def fields(self):
        """The login and the password that were posted."""
        # An unknown charset, bytes that are not of it, a torn body, a file for
        # a text: all that is the sender's fault (400), not ours (500).
        with suppress(LookupError, RuntimeError, TypeError, ValueError):
            form = await self.request.post()
            # Nobody has a login this long, and to normalize a very long one
            # takes seconds.
            fields = form.get("login", "")[:100], form.get("password", "")
            if all(map(is_text, fields)):
                return fields
        raise web.HTTPBadRequest(text="This form cannot be read.")


class Login(Form):
    """``/login``."""

    async def post(self):
        """Check the password, and begin a session."""
        login, password = await self.fields()
        # For Heroku's router the visitor's address is in a header; without a
        # router that header is whatever the visitor likes.
        address = forwarded(self.request, "X-Forwarded-For") if HTTPS else self.request.remote
        who = folded(login), address
        user = await in_time(self.request["db"].users.find_one({"_id": folded(login)}))
        async with HASHING:
            if seconds := seconds_to_wait(who):
                raise web.HTTPTooManyRequests(headers={"Retry-After": str(seconds)})
            # An unknown login is checked, too, against a hash that nothing
            # matches: else it would be answered faster, and so tell which
            # logins there are.
            hashed = user["password"] if user else NOBODYS_HASH
            try:
                await asyncio.to_thread(Argon2id.verify_phc_encoded, password.encode(), hashed)
            except InvalidKey:
                WRONG.append((datetime.now(UTC), who))
                return self.page(401, login=login, fault="wrong")
        return await log_in(self.request, user["login"])


class Signup(Form):
    """``/signup``."""

    async def post(self):
        """Store a user, and begin a session."""
        login, password = await self.fields()
        # \w: letters, digits and underscores of any script. NFKC first, which
        # makes one letter of an "e" and the accent that follows it.
        named = re.fullmatch(r"\w{3,20}", normalize("NFKC", login))
        if not named or not 8 <= len(password) <= 200:
            return self.page(400, login=login, fault="password" if named else "login")
        async with HASHING:
            hashed = await asyncio.to_thread(hash_password, password)
        user = {"_id": folded(login), "login": login, "password": hashed}
        # To look first whether the login is free would not help: another one
        # may take it between the look and the insert. The unique `_id` decides.
        try:
            await in_time(self.request["db"].users.insert_one(user))
        except DuplicateKeyError:
            return self.page(409, login=login, fault="taken")
        return await log_in(self.request, login)


# ---------------------------------------------------------------------------
# 5. Middlewares
# ---------------------------------------------------------------------------
# A middleware stands between the server and all handlers. It may answer by
# itself, or hand the request on, and it sees the response on its way back.


@web.middleware
async def error_pages(request, handler):
    """Answer every error with a page of this site's own. It is the outermost one."""
    try:
        return await handler(request)
    except web.HTTPException as raised:
        error = raised
    except (web.RequestPayloadError, HttpProcessingError):  # a body that cannot be unpacked
        error = web.HTTPBadRequest()
    except (PyMongoError, TimeoutError):
        error = web.HTTPServiceUnavailable(text="The database does not answer. Try again soon.")
    # An HTTPException is a response as well. We put our page into it and raise
    # the same one again, so that it keeps its headers (Allow, Retry-After).
    if error.status >= 400:  # redirects are raised, too
        error.text = aiohttp_jinja2.render_string("error.html", request, {"error": error})
        error.content_type = "text/html"
    raise error


@web.middleware
async def protect(request, handler):
    """HTTPS only, where that is set; and no orders from other sites (CSRF)."""
    if HTTPS and forwarded(request, "X-Forwarded-Proto") == "http":
        target = {"Location": f"https://{request.host}{request.path_qs}"}
        return web.Response(status=308, headers=target)
    # A browser may add the cookie to what a page of another site makes it send.
    # Only the Origin tells which site that was; a client that sends none is no
    # browser. The WebSocket needs it most: browsers let every site open one to
    # every other.
    own = f"{'https' if HTTPS else 'http'}://{request.host}"
    order = request.method not in {"GET", "HEAD"} or request.path == "/ws"
    if order and request.headers.get("Origin", own) != own:
        raise web.HTTPForbidden(text="This was sent from another site.")
    return await handler(request)


def forwarded(request, name):
    """The last value of a header: the router's own. What precedes it, anyone may have sent."""
    return request.headers.getall(name, [""])[-1].rpartition(",")[2].strip()


@web.middleware
async def authorize(request, handler):
    """Find out who asks, and show strangers to the login."""
    name = request.match_info.route.name  # None: there is no such page (404, 405)
    private = name in {"chat", "messages", "websocket", "logout"}
    request["user"] = request["session"] = None
    # A cookie that is not ASCII is none of ours. And the forms need no
    # database.
    harmless = (UnicodeError,) if private else (UnicodeError, PyMongoError, TimeoutError)
    with suppress(*harmless):
        session = await get_session(request)
        if "id" in session and name != "static":
            # The cookie is the session: who has a copy of it stays signed in
            # after a log-out, unless we remember that this session has ended.
            ended = request.app[ROOM].db.ended.find_one({"_id": session["id"]})
            # And a page says whose it is: another one may have logged in at
            # this browser since, and what it sends must not be sent in their
            # name.
            same = request.query.get("user", session["user"]) == session["user"]
            if same and not await in_time(ended):
                request["user"], request["session"] = session["user"], session
    if private and not request["user"]:  # a script cannot see where a redirect leads
        raise web.HTTPUnauthorized() if name == "websocket" else web.HTTPSeeOther("/login")
    return await handler(request)


@web.middleware
async def db_handler(request, handler):
    """Hand the database to the handler, which then needs to know of nothing else."""
    request["db"] = request.app[ROOM].db
    return await handler(request)


async def add_headers(request, response):
    """A signal, not a middleware: it sees every response, a WebSocket's (101) included."""
    response.headers.update(HEADERS)
    response.headers["Cache-Control"] = caching(request)
    if HTTPS:  # for a year, come by HTTPS only
        response.headers["Strict-Transport-Security"] = "max-age=31536000"


# What each of them prevents, and what to write:
# https://cheatsheetseries.owasp.org/cheatsheets/HTTP_Headers_Cheat_Sheet.html
HEADERS = {
    # Scripts, styles, images, connections: from here only, and nothing inline.
    # So even if somebody's text became HTML by a mistake of ours, it could not
    # run.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}

# ---------------------------------------------------------------------------
# 6. Databases
# ---------------------------------------------------------------------------
# Four collections of documents:
#   users     _id: the folded login; login: as it was signed up; password: its hash
#   messages  _id: 1, 2, 3, ...; user, key, text, time (UTC); process: who stored it
#   online    _id, process: the process; users: its users; until: its last sign of life + 35 s
#   ended     _id: a session that was logged out; process; until: when its cookie is void


async def database(app):
    """Connect to MongoDB, keep the room's tasks running, and stop all that in the end."""
    local = None if MONGODB_URI else start_local_database()
    uri, limit = MONGODB_URI or local.uri, DATABASE_SECONDS * 1000
    # "Acknowledged" shall mean: by most servers of the replica set, in the
    # journals on their disks. And what we read shall be acknowledged, too. Only
    # a replica set (setName), or a cluster of them (msg), can do that, and tell
    # what has changed.
    client = AsyncIOMotorClient(uri, timeoutMS=limit, tz_aware=True, w="majority", journal=True)
    shared = {"setName", "msg"} & (await client.admin.command("hello")).keys()
    if not shared:
        print("This MongoDB has no change streams: run a single process only.")
    level = ReadConcern("majority" if shared else "local")
    db = client.get_default_database("chat", read_concern=level)
    # Unique: a message that is sent again is refused. "Expire": MongoDB itself
    # deletes documents when their time is up. An index that exists already is
    # left alone.
    await db.messages.create_index(["user", "key"], unique=True)
    for collection in (db.online, db.ended):
        await collection.create_index("until", expireAfterSeconds=0)
    app[ROOM] = room = Room(db)
    room.last = max(await last_number(db) - RECENT_MAX, 0)
    await room.look()
    # Three things go on all the time, beside the handlers. Each one is a task:
    # a coroutine that the event loop runs by itself, not because somebody
    # awaits it.
    steps = [room.write, room.follow] + ([room.listen] if shared else [])
    tasks = [asyncio.create_task(forever(step)) for step in steps]
    yield
    # From here on, the server is about to end: all handlers have returned.
    for task in tasks:
        task.cancel()
    with suppress(PyMongoError, TimeoutError):  # tell the others that nobody is here any more
        await asyncio.wait_for(room.look_who_is_online(), CLOSE_SECONDS)
    client.close()
    if local:
        local.stop()


def start_local_database():
    """Start SecantusDB, which speaks MongoDB's protocol, as a part of this process."""
    from secantus.server import SecantusDBServer  # on Heroku there is none

    DATA.mkdir(exist_ok=True)
    # A lock of our own, because the database's prints lines of its own. The
    # file stays open, so the lock lasts until this process ends, however it
    # ends.
    fcntl.flock(os.open(DATA, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    # Without it (and without `journal` above), `kill -9` loses what was
    # acknowledged last.
    local = SecantusDBServer(storage_path=str(DATA / "db"), sync_on_commit=True)
    local.start()
    print(f"The local database: {local.uri}")
    return local


# Every query is given DATABASE_SECONDS, then it raises TimeoutError. The driver
# has the same limit, but it waits in threads, and has few of them: when all
# wait for a silent database, the next query would wait for a thread first.
in_time = partial(asyncio.wait_for, timeout=DATABASE_SECONDS)


async def read_messages(db, first, last):
    """The events of the messages with the numbers from `first` to `last`, in order.

    The one query for messages: for pages, for catching up, for what other
    processes stored. To ask for each number by name costs the same in a history
    of any length. Sorting, or a range, may cost a look at all of it.
    """
    numbers = {"_id": {"$in": list(range(first, last + 1))}}
    found = await in_time(db.messages.find(numbers).sort("_id").to_list())
    # Only up to the first gap: what is just being inserted may become visible
    # in any order.
    return [event(each) for number, each in enumerate(found, first) if each["_id"] == number]


async def last_number(db):
    """The number of the newest message, or 0.

    As the numbers have no gaps, we can find it digit by digit (in base 64), the
    highest first, with one small query for each digit.
    """
    last, step = 0, 64**7
    while step:
        guesses = {"_id": {"$in": [last + step * digit for digit in range(1, 64)]}}
        found = await in_time(db.messages.find(guesses).to_list())
        last, step = max([last, *(each["_id"] for each in found)]), step // 64
    return last


def event(document):
    """A stored message as the clients see it; `time` is ISO 8601, to the millisecond."""
    fields = {name: document[name] for name in ("key", "user", "text")}
    moment = document["time"].isoformat(timespec="milliseconds")
    return {"type": "message", "id": document["_id"], **fields, "time": moment}


async def forever(step):
    """Repeat a step for ever. An exception in a task would end it, and nobody would notice."""
    while True:
        try:
            await step()
        except Exception as error:  # noqa: BLE001 - any: that is the point
            logging.getLogger("chat").warning("%s goes on after %r", step.__name__, error)
            await asyncio.sleep(0.5)


async def say_goodbye(app):
    """Store what was received, then close all WebSockets, all at once (1001)."""
    # What comes from now on is refused: else those who send without pause would
    # keep us for ever.
    app[ROOM].closing = True
    await asyncio.sleep(CLOSE_SECONDS / 2)  # for what has come, but was not looked at
    with suppress(TimeoutError):
        await asyncio.wait_for(app[ROOM].inbox.join(), 2 * DATABASE_SECONDS)
    await asyncio.gather(*(each.close(WSCloseCode.GOING_AWAY) for each in app[ROOM].connections))


class Room:
    """Who is here, what was said last, and the way of every message.

    All processes on one database make one chat. Each keeps a picture of what is
    stored there: messages, who is online, which sessions have ended. Whatever
    may have changed it rings the bell, and look() takes the picture anew. So a
    ring too many does no harm, and one that got lost is made up for by the
    next.
    """

    def __init__(self, db):
        # Each document says which process wrote it: so none listens to itself.
        self.db, self.process = db, token_hex(4)
        # The inbox has (connection, the client's key or None, what to store).
        self.connections, self.inbox = set(), asyncio.Queue(INBOX_MAX)
        self.last = 0  # the number of the last message that was shown
        self.recent = []  # the newest events, up to `last`
        self.online, self.elsewhere = set(), set()  # logins: all; those of other processes
        self.bell, self.closing = asyncio.Event(), False
        self.told = [], datetime.now(UTC)  # what we last wrote to `online`; when to write it again

    async def join(self, connection, after, writer):
        """Say who is online, then every message `after` that number, then go live."""
        # The others first: newcomers get no "joined" of their own.
        if connection.user not in self.online:
            self.online.add(connection.user)
            await self.show([{"type": "joined", "user": connection.user}])
        self.connections.add(connection)
        self.bell.set()
        await connection.send(encode([{"type": "online", "users": sorted(self.online)}]))
        if after > self.last:  # it was told by another process what we have not heard yet
            await self.read_on()
        while after < self.last - len(self.recent):
            await connection.send(encode(await read_messages(self.db, after + 1, after + PAGE)))
            # Here we do wait for the client, as nobody else has to; but not for
            # ever.
            await asyncio.wait_for(writer.drain(), HEARTBEAT)
            after += PAGE
        # From here on nothing waits, so no new message can fall between the
        # two.
        if missed := [each for each in self.recent if each["id"] > after]:
            await connection.send(encode(missed))
        connection.live = True

    async def show(self, events):
        """Send events to all: encoded once, in one frame, the same for everybody.

        No `await` in here really waits (see Connection.send), so nothing else
        runs meanwhile, and every client is sent the same frames in the same
        order.
        """
        frame = encode(events)
        for connection in list(self.connections):
            if connection.live or events[0]["type"] != "message":  # else older ones come first
                await connection.send(frame)

    async def write(self):
        """Store all that waits in the inbox, with one insert (group commit).

        Meanwhile the next batch gathers. So the load itself makes the batches:
        few messages are stored at once, many together, and nobody waits for a
        timer.
        """
        batch = [await self.inbox.get()]
        while not self.inbox.empty():
            batch.append(self.inbox.get_nowait())
        rest, start = batch.copy(), asyncio.get_running_loop().time()
        try:
            await in_time(self.store(rest))
        finally:  # whatever happened, each one whose message may not be stored is told so
            for connection, key, _ in rest:
                await connection.refuse(key, "This message could not be stored.")
            if rest:  # it may be stored all the same: look
                self.bell.set()
            for _ in batch:
                self.inbox.task_done()
        # Who wrote last knows the next number first. So where there are other
        # processes, we rest as long as we worked: that is their turn.
        if self.elsewhere:
            await asyncio.sleep(asyncio.get_running_loop().time() - start)

    async def store(self, batch):
        """Store and show the messages of a batch, and take them out of it.

        The insert itself takes the numbers. Where another process was faster,
        the unique `_id` refuses ours, and we number the rest anew: the index is
        the only lock that we need.
        """
        while batch:
            refused, stamp = None, {"time": datetime.now(UTC), "process": self.process}
            # The first number is the one after the last that we know of. (A
            # comprehension in a dict: `**` puts another one's entries in.)
            documents = [
                {"_id": number, **post, **stamp}
                for number, (_, _, post) in enumerate(batch, self.last + 1)
            ]
            try:
                await self.db.messages.insert_many(documents)
            except BulkWriteError as error:
                refused = error.details["writeErrors"][0]  # it stops at the first one
                # 11000 is "duplicate key". Anything else means that the
                # database is unwell.
                if refused["code"] != 11000 or error.details["writeConcernErrors"]:
                    raise
                documents = documents[: refused["index"]]
            # What stood before the refused one is stored. The rest is for the
            # next round.
            del batch[: len(documents)]
            await self.hear([event(each) for each in documents])
            if refused:  # its number is taken, or its sender has sent this key before
                await self.read_on()
                if "key" in refused["keyPattern"]:
                    sender, _, post = batch[0]
                    same = {"user": post["user"], "key": post["key"]}
                    stored = await self.db.messages.find_one(same)
                    await sender.send(encode([event(stored)]))
                    del batch[0]  # not before: until then it may still have to be refused

    async def hear(self, events):
        """Show messages that are stored, if another task has not shown them yet."""
        if news := [each for each in events if each["id"] > self.last]:
            self.last = news[-1]["id"]
            self.recent = (self.recent + news)[-RECENT_MAX:]
            await self.show(news)

    async def read_on(self):
        """Show what is stored after the last message that was shown."""
        # An empty page is false, and ends the loop.
        while page := await read_messages(self.db, self.last + 1, self.last + PAGE):
            await self.hear(page)

    async def listen(self):
        """Ring the bell when another process has written something (a change stream).

        https://www.mongodb.com/docs/manual/changeStreams/
        """
        # We ring ourselves for what we write. The filter runs in the database.
        others = {"$match": {"fullDocument.process": {"$ne": self.process}}}
        async with self.db.watch([others]) as stream:
            await stream.try_next()  # only this opens it
            self.bell.set()  # for what happened before
            async for _ in stream:
                self.bell.set()

    async def follow(self):
        """Look when the bell rings, and now and then all the same."""
        await self.look()
        with suppress(TimeoutError):
            await asyncio.wait_for(self.bell.wait(), PULSE_SECONDS)

    async def look(self):
        """Take the picture anew, and tell the clients what has changed."""
        self.bell.clear()  # first: a ring while we look is for the next look
        await self.read_on()
        await self.look_who_is_online()
        await self.close_ended_sessions()

    async def look_who_is_online(self):
        """Tell the other processes who is here, and our clients who is elsewhere."""
        now, users = datetime.now(UTC), sorted({each.user for each in self.connections})
        # Only if that is news, or the last sign of life is too old: each write
        # rings the bell of all other processes, and theirs ring ours.
        if users != self.told[0] or now > self.told[1]:
            until = now + timedelta(seconds=ONLINE_SECONDS)
            mine = {"users": users, "until": until, "process": self.process}
            await in_time(self.db.online.replace_one({"_id": self.process}, mine, upsert=True))
            self.told = users, now + timedelta(seconds=PULSE_SECONDS)
        # A process that was killed cannot say so: its time runs out.
        others = self.db.online.find({"_id": {"$ne": self.process}, "until": {"$gt": now}})
        found = await in_time(others.to_list())
        self.elsewhere = {user for each in found for user in each["users"]}
        before, self.online = self.online, self.elsewhere | {each.user for each in self.connections}
        for user in self.online ^ before:  # those who are in one of the two sets only
            await self.show([{"type": "joined" if user in self.online else "left", "user": user}])

    async def close_ended_sessions(self):
        """Close (1008) the WebSockets of sessions that were logged out, or are too old."""
        now = datetime.now(UTC)
        # The cookie of a session that ended just now would be void in seven
        # days. An hour is much longer than any process can have missed a ring.
        lately = {"until": {"$gt": now + SESSION - timedelta(hours=1)}}
        ended = {each["_id"] for each in await in_time(self.db.ended.find(lately).to_list())}
        gone = {c for c in self.connections if c.session["id"] in ended or c.until < now}
        self.connections -= gone  # they hear nothing from now on
        # We do not wait for them, but they need a name: asyncio itself holds
        # tasks only weakly.
        self.farewells = asyncio.gather(
            *(each.close(WSCloseCode.POLICY_VIOLATION) for each in gone)
        )


# ---------------------------------------------------------------------------
# 7. Templates
# ---------------------------------------------------------------------------


def set_up_templates(app):
    """Have Jinja2 render the pages: https://aiohttp-jinja2.readthedocs.io

    It escapes whatever a template prints: what people write never becomes HTML.
    """
    loader = jinja2.FileSystemLoader(HERE / "templates")
    environment = aiohttp_jinja2.setup(app, loader=loader, trim_blocks=True)
    # It brings `url`, which makes a route's address from its name, and a
    # `static` that knows nothing of versions; ours does.
    environment.globals.update(static=static_url, TEXT_MAX=TEXT_MAX, PAGE=PAGE)


# ---------------------------------------------------------------------------
# 8. Sessions and authorization
# ---------------------------------------------------------------------------


def sessions():
    """The middleware of aiohttp-session. The cookie holds the session, encrypted and signed."""
    # A browser takes a __Host- cookie over HTTPS and from this very host only.
    # A Lax one does not come along when another site's page sends us something.
    name, seconds = "__Host-chat" if HTTPS else "chat", int(SESSION.total_seconds())
    storage = EncryptedCookieStorage(
        secret_key(), cookie_name=name, max_age=seconds, secure=HTTPS, samesite="Lax"
    )
    return session_middleware(storage)


def secret_key():
    """The 32 bytes that encrypt, made from SECRET_KEY or from a random key kept in data/."""
    key, path = ENV.get("SECRET_KEY"), DATA / "secret-key"
    if not key:
        DATA.mkdir(exist_ok=True)
        # "x": only if it is not there yet. The file is its owner's alone from
        # the beginning; a chmod would leave a moment in which everybody on this
        # machine could read it.
        private = partial(os.open, mode=0o600)
        with suppress(FileExistsError), open(path, "x", opener=private) as file:
            file.write(token_hex(32))
        key = path.read_text()
    if len(key) < 16:
        sys.exit(f"chat.py: SECRET_KEY (or {path}) is too short: use 16 characters or more")
    return hashlib.sha256(os.fsencode(key)).digest()


async def log_in(request, login):
    """Begin a new session, and go to the chat: 303, because what was posted is done."""
    # A new one: if somebody had slipped an old one in, it would be that one's
    # session, too.
    session = await new_session(request)
    session.update(id=token_hex(16), user=login)  # aiohttp_session makes a cookie of that
    raise web.HTTPSeeOther("/")


async def logout(request):
    """End the session on all processes, and go to the login."""
    await request.read()  # nothing of interest; but too much of it is a 413
    session = request["session"]
    note = {"until": datetime.now(UTC) + SESSION, "process": request.app[ROOM].process}
    ended = request["db"].ended.update_one({"_id": session["id"]}, {"$set": note}, upsert=True)
    await in_time(ended)
    request.app[ROOM].bell.set()
    session.invalidate()
    raise web.HTTPSeeOther("/login")


def folded(login):
    """The form in which logins are compared: "STRASSE" is "Straße", "ａｎｎａ" is "Anna".

    Who looks alike to people should not be two:
    https://www.unicode.org/reports/tr15/
    """
    return normalize("NFKC", normalize("NFKC", login).casefold())


def hash_password(password):
    """A PHC string (method, settings, salt, hash): Argon2id, 19 MiB, 2 passes, 1 lane.

    https://cheatsheetseries.owasp.org/cheatsheets/Password_Storage_Cheat_Sheet.html
    """
    argon2 = Argon2id(salt=os.urandom(16), length=32, iterations=2, lanes=1, memory_cost=19456)
    return argon2.derive_phc_encoded(password.encode())


# Hashing is slow on purpose, and uses memory on purpose. So it runs in a
# thread, where the event loop does not wait for it, and one at a time: that
# leaves the other cores to the chat, and a hundred guesses that are sent at
# once are counted one by one.
HASHING = asyncio.Lock()
NOBODYS_HASH = hash_password(token_hex(16))
WRONG = []  # (when, who): the wrong passwords; `who` is a folded login and an address


def seconds_to_wait(who):
    """How long `who` may not try to log in; 0 if it may. Forgets what is too old to count."""
    # One list for all: it cannot grow for ever, since each entry costs its
    # maker the time of a hash, and is gone after five minutes.
    start = datetime.now(UTC) - WRONG_TIME
    WRONG[:] = [each for each in WRONG if each[0] > start]
    times = [when for when, each in WRONG if each == who]
    return int((times[0] - start).total_seconds()) + 1 if len(times) >= WRONG_MAX else 0


# ---------------------------------------------------------------------------
# 9. Static
# ---------------------------------------------------------------------------
# The best request is the one that nobody has to make: a browser keeps the CSS
# and the JavaScript for a year. When a file changes, so does its address.


def version(name):
    """A hash of a static file's content. It is read each time, so it is never out of date."""
    return hashlib.sha256((HERE / "static" / name).read_bytes()).hexdigest()[:12]


def static_url(name):
    """The address of a static file, for the templates: ``/static/chat.css?v=...``."""
    return f"/static/{name}?v={version(name)}"


def caching(request):
    """What a browser may keep: https://developer.mozilla.org/docs/Web/HTTP/Guides/Caching"""
    if request.match_info.route.name != "static":
        return "no-store"  # after a log-out, "back" shows nothing
    # It must be our version: during a deploy, an old process may be asked for
    # the new one, and the browser would keep the old file under the new address
    # for a year. And it must be one of our files: anybody may ask for
    # "/static//dev/zero", which has no end.
    name = request.match_info["filename"]
    if name in os.listdir(HERE / "static") and request.query.get("v") == version(name):
        return "max-age=31536000, immutable"
    return "no-cache"  # keep it, but ask each time whether it has changed


# ---------------------------------------------------------------------------
# 10. Deploying to Heroku
# ---------------------------------------------------------------------------


def main():
    """Run until SIGTERM or Ctrl-C (status 0); or say in one line why not (status 1)."""
    # Each line at once, also where the output is a log and no terminal. And
    # none of the driver's warnings: they may quote parts of a mistyped
    # password.
    sys.stdout.reconfigure(line_buffering=True)
    warnings.simplefilter("ignore", UserWarning)
    try:
        family = socket.AF_INET6 if ":" in HOST else socket.AF_INET
        listening = socket.create_server((HOST, int(PORT)), family=family)
    except (OSError, OverflowError, ValueError) as error:
        sys.exit(f"chat.py: {error}: check HOST and PORT")
    try:
        # Heroku's router keeps connections for 90 s. If we closed them sooner,
        # it would sometimes send a request into a closing one.
        web.run_app(create_app(), sock=listening, keepalive_timeout=95, shutdown_timeout=1)
        os._exit(0)  # while the database is silent, the driver's threads would not let us go
    except ImportError:
        fault = "no local database here: it needs requirements-dev.txt and Python 3.11 to 3.13;"
        fault += " or set MONGODB_URI"
    except BlockingIOError:
        fault = f"another chat is using {DATA}: stop it, or set MONGODB_URI to its database"
    except (PyMongoError, TimeoutError, ValueError) as error:
        # Without the error's text, for the same reason.
        fault = f"MONGODB_URI does not work ({type(error).__name__}): check it and the database"
    except OSError as error:
        fault = f"{error}: make {DATA} writable, or set SECRET_KEY and MONGODB_URI"
    sys.exit(f"chat.py: {fault}")


if __name__ == "__main__":
    main()
