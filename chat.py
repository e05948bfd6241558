"""A realtime chat over WebSockets, in one file. Read it from top to bottom, once.

Start it with ``python chat.py``. Each section is explained in the chapter of ``tutorial/`` with
the same number, and ``grep '^# [0-9]' chat.py`` prints the table of contents.

How a message travels. The numbers (2) to (5) are at the lines that do it::

    (1) the browser     keeps the message until it is stored, and sends {"text", "key"}
    (2) handle_text()   checks it, and waits until it is stored
    (3) Room.store()    numbers all messages of the batch, and stores them with
            |           one insert into MongoDB -------------------------------.
            v                                                                  | change stream
    (4) Room.publish()  wakes the write pumps                                  v
            |                                        watch_messages() of the other processes
            v                                        calls catch_up(), which goes on with (4)
    (5) write_pump()    of each client sends it what it has not seen yet

Nobody sees a message before MongoDB has stored it. Everybody sees all messages in the same
order: the order of their numbers, which are 1, 2, 3, ... (Where a number is missing, somebody
has deleted a message by hand.)
"""

# ---------------------------------------------------------------------------
# 1. Introduction
# ---------------------------------------------------------------------------
# aiohttp is the web server, and Motor is the driver for MongoDB. Motor is deprecated, but many
# programs use it. PyMongo, on which Motor is built, now has an asynchronous client of its own,
# which takes nearly the same calls.

import asyncio
import fcntl
import hashlib
import json
import logging
import os
import re
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import monotonic
from typing import Any, NoReturn
from unicodedata import category, normalize
from urllib.parse import unquote, urlsplit

import aiohttp_jinja2
import jinja2
import pymongo
from aiohttp import WSCloseCode, WSMsgType, http, web
from aiohttp.typedefs import Handler, Middleware
from aiohttp_session import Session, get_session, new_session, session_middleware
from aiohttp_session.cookie_storage import EncryptedCookieStorage
from cryptography.exceptions import InvalidKey
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from motor.motor_asyncio import AsyncIOMotorClient, AsyncIOMotorDatabase
from pymongo.errors import BulkWriteError, DuplicateKeyError, PyMongoError

# ---------------------------------------------------------------------------
# 2. Structure
# ---------------------------------------------------------------------------
# The settings are environment variables (https://12factor.net/config), so the
# same code runs on your computer and on a server, and no password ends up in git.


def setting(name: str, default: str = "") -> str:
    """A setting, or the default if it is unset or empty."""
    return os.environ.get(name, "").strip() or default


MONGODB_URI = setting("MONGODB_URI")  # unset: a local database, kept in data/
SECRET_KEY = setting("SECRET_KEY")  # unset: a random key, kept in data/
HOST = setting("HOST", "127.0.0.1")
PORT = setting("PORT", "8080")
HTTPS = setting("HTTPS", "0").lower() in {"1", "true", "yes", "on"}  # the router handles HTTPS
HERE = Path(__file__).resolve().parent
DATA = HERE / "data"  # git ignores it

# What all handlers share is app[ROOM], a Room (section 6). AppKey tells type checkers its type.
ROOM = web.AppKey["Room"]("ROOM")


def create_app() -> web.Application:
    """Put the application together."""
    # A request passes through the middlewares from first to last, and its response from last to
    # first. So error_pages sees the errors of all others, and authorize can read the session.
    layers = [error_pages, check_origin, session_cookies(), limit_requests, authorize, db_handler]
    app = web.Application(middlewares=layers, client_max_size=BODY_MAX)
    app.add_routes(routes())
    set_up_templates(app)
    # aiohttp calls these functions:
    app.on_response_prepare.append(set_headers)  # just before it sends a response
    app.cleanup_ctx.append(database)  # at the start and at the end of the program
    app.on_shutdown.append(shut_down)  # before the end, while WebSockets are still open
    return app


# ---------------------------------------------------------------------------
# 3. Routes
# ---------------------------------------------------------------------------


def routes() -> list[web.AbstractRouteDef]:
    """Which handler answers which request. Code and templates use the names to make URLs."""
    return [
        web.get("/", chat_page, name="chat"),  # `get` answers HEAD as well
        web.get("/messages", older_messages, name="messages"),
        web.get("/ws", websocket, name="websocket"),
        # Two routes may share a path and a name if their methods differ.
        web.get("/login", show_form, name="login"),
        web.post("/login", log_in, name="login"),
        web.get("/signup", show_form, name="signup"),
        web.post("/signup", sign_up, name="signup"),
        # Not GET: a link on any other site could log people out.
        web.post("/logout", log_out, name="logout"),
        web.static("/static", HERE / "static", name="static", append_version=True),
    ]


# Other routes require a login, even one that somebody adds and forgets here (deny by default).
PUBLIC_ROUTES = {"login", "signup", "static"}

# ---------------------------------------------------------------------------
# 4. Request and response
# ---------------------------------------------------------------------------
# A handler (`async def`) takes a request and returns a response. While it waits at an `await`,
# others run. From one `await` to the next, no other code runs: so changing a list needs no lock.


@aiohttp_jinja2.template("chat.html")
async def chat_page(request: web.Request) -> dict[str, Any]:
    """The newest messages as a page. Without JavaScript, ``?before=`` shows older ones."""
    before = request.query.get("before", str(request.app[ROOM].newest_id + 1))
    messages = await messages_before(request.app[ROOM], parse_number(before))
    # The decorator renders the template with these values.
    return {"user": request["session"]["user"], "messages": messages}


async def older_messages(request: web.Request) -> web.Response:
    """JSON: ``{"messages": [event, ...]}``, up to PAGE_SIZE of them, oldest first."""
    before = parse_number(request.query.get("before", ""))
    messages = await messages_before(request.app[ROOM], before)
    return web.json_response({"messages": messages}, dumps=to_json)


def parse_number(text: str) -> int:
    """The number in a query parameter. A negative one counts as 0. Raise 400 if it is none."""
    if not re.fullmatch("-?[0-9]{1,100}", text):  # int() would also accept " 1_0"
        raise web.HTTPBadRequest(text="The URL needs a valid message number.")
    return max(0, int(text))


# What clients get is a JSON array of events. An event is a dictionary with a type:
# message, online, joined, left or error.
ChatEvent = dict[str, Any]


def to_json(value: Any) -> str:
    """Compact JSON. Letters such as "é" stay as they are: escaped, they would be longer."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


# ------ The WebSocket ------
# Each connection has two loops: read_pump() reads what its client sends, and write_pump() sends
# its client what it has not seen yet. In one loop, everybody would wait for the slowest client.


@dataclass(eq=False, slots=True)  # a client is equal only to itself, so it can be in a set
class Client:
    """One open WebSocket: whose it is, and which messages were sent to it."""

    ws: web.WebSocketResponse
    session: Session
    sent_id: int  # the number of the newest message that was sent to it, or is on its way
    end_id: int = sys.maxsize  # after this message, the connection ends: see Room.end()
    close_code: WSCloseCode = WSCloseCode.TRY_AGAIN_LATER  # this one means "reconnect"


BODY_MAX = 64 * 1024  # bytes of a frame or a form, far more than the longest valid one has
HEARTBEAT = 27  # seconds of silence before a ping; Heroku's router cuts WebSockets after 55
SEND_TIMEOUT = 30  # seconds in which a client must take a frame


async def websocket(request: web.Request) -> web.WebSocketResponse:
    """The live chat: who is online, then every message after number ``?after=``.

    An empty ``?after=`` means 0: from the oldest message. Without it: from the next one stored.
    """
    room = request.app[ROOM]
    # Read the URL first: after the handshake, no error (400) can be sent.
    sent_id = parse_number(request.query.get("after", str(room.newest_id)) or "0")
    ws = web.WebSocketResponse(
        # If the client is silent for so many seconds, send a ping. If it stays silent for half as
        # many, take it for lost: a computer without a network cannot close its connection.
        heartbeat=HEARTBEAT,
        max_msg_size=BODY_MAX + 1,  # aiohttp refuses a frame of exactly this size
        compress=False,  # to compress each frame for each client would halve the speed
        autoping=False,  # aiohttp would answer a flood of pings without letting others run
        writer_limit=0,  # see set_write_buffer_limits() below
    )
    try:
        await ws.prepare(request)  # the handshake (101): from here on, only frames are sent
    except (ConnectionError, ValueError):  # the client is gone, or sent a broken header
        raise web.HTTPBadRequest(text="The handshake could not be completed.") from None
    # writer_limit=0: aiohttp waits for the transport after each frame, not only after each 64 KB.
    # high=0: it waits until the transport's buffer is empty. So send_frame() returns when the
    # operating system has the whole frame.
    transport: Any = request.transport
    transport.set_write_buffer_limits(high=0)
    client = Client(ws, request["session"], sent_id)
    room.enter(client)
    try:
        # A task runs beside this code. If the task or the body of this block raises an exception,
        # the group cancels the other one.
        async with asyncio.TaskGroup() as group:
            writer = group.create_task(write_pump(room, client))
            await read_pump(room, client)
            writer.cancel()  # the client has closed the connection (being cancelled is no failure)
    # A TaskGroup puts the exceptions into a group, and `except*` looks into that group.
    except* (ConnectionError, PyMongoError, TimeoutError):
        pass  # the connection is lost or has to end, or the database does not answer
    finally:
        # Whatever happened: a client that stayed in the room would never be offline.
        room.clients.discard(client)
        # Some clients do not answer the close frame, and at the end of the program (GOING_AWAY),
        # aiohttp reads no answers any more. So after some seconds, cut the connection.
        seconds = 0.5 if client.close_code is WSCloseCode.GOING_AWAY else 20
        asyncio.get_running_loop().call_later(seconds, transport.abort)
        # Send the close frame, whose code tells the reason, and wait for the client's answer.
        # https://www.rfc-editor.org/rfc/rfc6455#section-7.4.1
        await ws.close(code=client.close_code)
    return ws


async def read_pump(room: "Room", client: Client) -> None:
    """Handle what a client sends, one frame after the other, until the connection is closed."""
    async for frame in client.ws:
        # `async for` lets other tasks run only if it has to wait. From a client that sends without
        # pause, the next frame is always there. Without this line, all others would wait.
        await asyncio.sleep(0)
        if frame.type is WSMsgType.TEXT and client.end_id == sys.maxsize:  # not after end()
            reply = await handle_text(room, client, frame.data)
            # The reply is an error (no "id"), or the message stored before under this key. If that
            # message is newer than sent_id, leave it to write_pump(), which keeps the order.
            if reply is not None and reply.get("id", 0) <= client.sent_id:
                await client.ws.send_str(to_json([reply]))
        elif frame.type is WSMsgType.PING:
            await client.ws.pong(frame.data)
        elif frame.type is WSMsgType.BINARY:
            room.end([client], WSCloseCode.UNSUPPORTED_DATA)


async def write_pump(room: "Room", client: Client) -> NoReturn:
    """Send a client who is online, and every message after `sent_id`, as fast as it reads.

    Nothing is kept for a client that reads slowly: the next messages wait in the room and in
    the database, not in a queue. So it delays nobody else.
    """
    online = room.online  # a frozenset: when people come or go, the room has another one
    frame = to_json([{"type": "online", "users": sorted(online)}]).encode()
    while True:
        # (5) This waits for this client alone. If it takes too long for a frame, it is cut off.
        async with asyncio.timeout(SEND_TIMEOUT):
            await client.ws.send_frame(frame, WSMsgType.TEXT)
        if client.sent_id >= client.end_id:
            raise ConnectionError("closed by us")  # so the TaskGroup ends read_pump(), too
        # Between this test and wait() there is no other `await`, so no news can be missed.
        if online is room.online and client.sent_id >= room.newest_id:
            await room.news.wait()
        if online is not room.online:
            frame = to_json(changes(online, room.online)).encode()
            online = room.online
        else:
            frame = await room.next_frame(client)  # if nothing is new, an empty array


def changes(before: frozenset[str], now: frozenset[str]) -> list[ChatEvent]:
    """The events that say who has joined and who has left."""
    joined = [{"type": "joined", "user": user} for user in sorted(now - before)]
    return joined + [{"type": "left", "user": user} for user in sorted(before - now)]


TEXT_MAX = 2_000  # characters of a message
INVALID_MESSAGE = f"Messages must have 1 to {TEXT_MAX:,} characters, and keys 1 to 64."


async def handle_text(room: "Room", client: Client, data: str) -> ChatEvent | None:
    """Store the message that a client sent. Return what only this client is to be told.

    For a new message, this is None: the message comes back to its sender as it comes to everybody,
    and its key says that it is stored.
    """
    # Never trust what comes from outside: all of this may be anything that JSON can
    # express, for example a list where we expect a string.
    try:
        message = json.loads(data)
        key = message.get("key")
        text = message.get("text")
    except (AttributeError, ValueError, RecursionError):  # "[[[[[[..." is nested too deep
        key = text = None
    # len() counts code points. In JavaScript, "😀".length is 2, so chat.js does not use that.
    text_is_valid = is_valid_text(text) and 1 <= len(text.strip()) <= TEXT_MAX
    key_is_valid = key is None or (is_valid_text(key) and 1 <= len(key) <= 64)
    if text_is_valid and key_is_valid:
        # (2) Meanwhile, nothing more is read from this client (backpressure).
        return await room.post(client.session["user"], text.strip(), key)
    error = {"type": "error", "text": INVALID_MESSAGE}
    # The key tells the client which of its messages this is about.
    return error | {"key": key} if is_valid_text(key) else error


def is_valid_text(value: Any) -> bool:
    """Whether it is a string that UTF-8 can encode. (JSON may contain half a character.)"""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


# ---------------------------------------------------------------------------
# 5. Middlewares
# ---------------------------------------------------------------------------
# A middleware is a function around every handler. It may answer the request
# itself, or pass it on, and it sees the response on its way back.


@web.middleware
async def error_pages(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Redirect HTTP to HTTPS, and give every error a page in the site's own style."""
    # As in read_pump(): a client may send many requests without waiting (pipelining).
    await asyncio.sleep(0)
    try:
        if HTTPS and last_forwarded(request, "X-Forwarded-Proto") == "http":
            raise web.HTTPPermanentRedirect(f"https://{request.host}{request.path_qs}")
        if len(request.rel_url.raw_path) > 255:  # open() would fail with such a file name
            raise web.HTTPNotFound
        return await handler(request)
    except web.HTTPException as raised:
        error = raised
    except (PyMongoError, TimeoutError):
        text = "The server or its database is busy. Please try again in a moment."
        error = web.HTTPServiceUnavailable(text=text, headers={"Retry-After": "5"})
    # An HTTPException is a response, too. We put our page into it and raise it
    # again, so it keeps its headers (Allow, Retry-After).
    if error.status >= 400:  # a redirect is an HTTPException as well: it needs no page
        error.text = aiohttp_jinja2.render_string("error.html", request, {"error": error})
        error.content_type = "text/html"
    raise error


def last_forwarded(request: web.Request, name: str) -> str:
    """The last value of a header such as "1.2.3.4, 5.6.7.8".

    The router adds its value at the end. What comes before it may be invented by the client.
    """
    return request.headers.getall(name, [""])[-1].rpartition(",")[2].strip()


@web.middleware
async def check_origin(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse what pages of other sites send: cross-site request forgery (CSRF).

    The WebSocket needs this check most, because a page of any site may open a WebSocket to any
    server. A client that sends no Origin is not a browser.
    """
    own_origin = f"{'https' if HTTPS else 'http'}://{request.host}"
    # By convention, GET only reads. But a WebSocket begins with GET, too.
    may_change = request.method == "POST" or request.match_info.route.name == "websocket"
    if may_change and request.headers.get("Origin", own_origin) != own_origin:
        raise web.HTTPForbidden(text="Refused: this request came from another site.")
    return await handler(request)


@web.middleware
async def limit_requests(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Put the session into the request, and refuse (429) visitors with too many at once."""
    session = request["session"] = await read_session(request)
    visitor = client_address(request) if session is None else session["user"]
    under_way = request.app[ROOM].under_way
    # An open WebSocket is a request, too. Visitors without a session only sign up or log in. That
    # takes long, so the limit is lower.
    if under_way.count(visitor) >= (40 if session is None else 100):
        raise web.HTTPTooManyRequests(text="Too many requests.", headers={"Retry-After": "5"})
    under_way.append(visitor)
    try:
        return await handler(request)
    finally:
        under_way.remove(visitor)


async def read_session(request: web.Request) -> Session | None:
    """The session in the request's cookie, or None. It may have been revoked."""
    with suppress(UnicodeError):  # a cookie that is not UTF-8 is none of ours
        session = await get_session(request)
        # Our JavaScript sends the name of the user whom its page was made for, as
        # ?user=. If somebody else logs in, in another tab, the cookie is another one's.
        if "id" in session and request.query.get("user", session["user"]) == session["user"]:
            return session
    return None


def client_address(request: web.Request) -> str:
    """The IP address that a request came from."""
    return last_forwarded(request, "X-Forwarded-For") if HTTPS else str(request.remote)


@web.middleware
async def authorize(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Let users pass. Without a session, only the public routes are open."""
    name = request.match_info.route.name
    # If no route matches (http_exception), aiohttp's own handler raises 404 or 405.
    if name in PUBLIC_ROUTES or request.match_info.http_exception or await is_logged_in(request):
        return await handler(request)
    if name == "websocket":  # a WebSocket handshake does not follow redirects
        raise web.HTTPUnauthorized(text="Please log in.")
    raise redirect_to(request, "login")


async def is_logged_in(request: web.Request) -> bool:
    """Whether the request has a session, and nobody has logged out of it."""
    session = request["session"]
    revoked_sessions = request.app[ROOM].db.revoked_sessions
    async with asyncio.timeout(DATABASE_TIMEOUT):
        return session is not None and not await revoked_sessions.find_one({"_id": session["id"]})


@web.middleware
async def db_handler(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Put the database into the request, and give the handler 5 s for its answer."""
    request["db"] = request.app[ROOM].db
    # Each operation has a limit of its own (DATABASE_TIMEOUT), but a handler may need several,
    # and may have to wait until passwords of others are hashed. WebSockets have no limit.
    async with asyncio.timeout(None if request.match_info.route.name == "websocket" else 5):
        return await handler(request)


# What each of these prevents, and which values to use:
# https://cheatsheetseries.owasp.org/cheatsheets/HTTP_Headers_Cheat_Sheet.html
SECURITY_HEADERS = {
    # Scripts, styles, images and connections only from here, and nothing
    # inline. Even if a mistake of ours let a user's text become HTML, no script
    # in it would run.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


async def set_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Add headers to every response. For a WebSocket's, a middleware would be too late."""
    response.headers.update(SECURITY_HEADERS)
    response.headers["Cache-Control"] = cache_control(request, response.status)
    # HSTS: for a year, the browser uses only HTTPS for this site.
    if HTTPS:
        response.headers["Strict-Transport-Security"] = "max-age=31536000"


# ---------------------------------------------------------------------------
# 6. Databases
# ---------------------------------------------------------------------------
# The collections, and the fields of their documents:
#   users             _id: the normalized login; login: as signed up; password: its hash
#   messages          _id: 1, 2, 3, ...; user, key, text, time; process_id: who stored it
#   presence          _id: a process; users: who is connected to it; expires_at
#   revoked_sessions  _id: a session that was logged out; expires_at
#   failed_logins     _id: a login and an IP address; count; expires_at

Database = AsyncIOMotorDatabase[dict[str, Any]]
DATABASE_TIMEOUT = 3  # seconds for an operation, or for a batch of messages
PAGE_SIZE = 50  # messages that are read at once, enough for a screen
RECENT_MAX = 2_000  # messages that are kept in memory, so few clients need the database

log = logging.getLogger("chat")


async def database(app: web.Application) -> AsyncIterator[None]:
    """Connect to MongoDB and start the background tasks; stop everything at the end."""
    db = connect(MONGODB_URI or start_local_database())
    # 20 s: the servers may be electing a new primary, see connect(). exit_on(): section 10.
    with exit_on("cannot use MONGODB_URI", PyMongoError), pymongo.timeout(20):
        # A browser that got no answer sends the message again, with the same key.
        # This index ensures that it is stored only once.
        await db.messages.create_index(["user", "key"], unique=True)
        # MongoDB deletes these documents when they have expired (TTL).
        for collection in (db.presence, db.revoked_sessions, db.failed_logins):
            await collection.create_index("expires_at", expireAfterSeconds=0)
        newest = await db.messages.find_one(sort=[("_id", -1)])
    room = app[ROOM] = Room(db, newest["_id"] if newest else 0)
    # These run all the time, beside the handlers.
    steps = (watch_messages, sync_presence, resync, keep_alive)
    tasks = [asyncio.create_task(keep_running(step, room)) for step in steps]
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop)  # section 10
    # aiohttp runs this function up to here, accepts connections, and runs the rest of it
    # when the program ends.
    yield
    for task in tasks:
        task.cancel()
    # Without a limit, close() would wait 30 s for a database that is lost.
    with suppress(PyMongoError), pymongo.timeout(0.5):
        await db.presence.delete_one({"_id": room.process_id})
        db.client.close()


def start_local_database() -> str:
    """Start SecantusDB, which speaks MongoDB's protocol, in this process. Return its URI."""
    hint = "use `uv run --with-requirements requirements-dev.txt chat.py`, or set MONGODB_URI"
    with exit_on(f"the local database is missing: {hint}", ModuleNotFoundError):
        from secantus.server import SecantusDBServer
    # Only one process may use the folder. The operating system releases the lock when
    # the process ends, in whatever way.
    with exit_on("another chat uses data/: stop it, or set MONGODB_URI", BlockingIOError):
        fcntl.flock(os.open(data_folder(), os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    # sync_on_commit: after `kill -9`, no message that was acknowledged may be lost. A MongoDB
    # server is asked for the same by journal=True, in connect().
    with exit_on("cannot open the database in data/db: if it is damaged, delete it", Exception):
        server = SecantusDBServer(storage_path=str(DATA / "db"), sync_on_commit=True)
        server.start()
    print(f"The local database: {server.uri}")
    (DATA / "database-uri").write_text(server.uri)  # for other programs, such as mongosh
    return str(server.uri)


def data_folder() -> Path:
    """The folder ``data/``, which only its owner can read."""
    with exit_on("make data/ writable, or set SECRET_KEY and MONGODB_URI", OSError):
        DATA.mkdir(exist_ok=True)
        DATA.chmod(0o700)
    return DATA


def connect(uri: str) -> Database:
    """The database of a connection string. The client connects when it is first used."""
    with exit_on("cannot use MONGODB_URI: check it", PyMongoError, OSError, ValueError):
        # These arguments take priority over the options in the connection string.
        client: AsyncIOMotorClient[dict[str, Any]] = AsyncIOMotorClient(
            uri,
            # A replica set is several servers with the same data. One of them, the primary, takes
            # the writes. A write is acknowledged when most have it in their journals, on disk
            # (write concern). And we read only what most have (read concern), from the primary.
            w="majority",
            journal=True,
            readConcernLevel="majority",
            readPreference="primary",
            # If the answer to a write is lost, send it again. The server carries it out once.
            retryWrites=True,
            # Give up an operation after this time, with all its retries.
            timeoutMS=DATABASE_TIMEOUT * 1000,
            connectTimeoutMS=DATABASE_TIMEOUT * 1000,
            tz_aware=True,  # times with a time zone, which is UTC
        )
        name = unquote(urlsplit(uri).path[1:])
        # Many connection strings name "admin", which is not for data: it has no change streams.
        return client["chat" if name in {"", "admin"} else name]


async def read_messages(db: Database, first: int, last: int) -> list[ChatEvent]:
    """The events of the stored messages with the numbers `first` to `last`, in order.

    On MongoDB, a range ($gte and $lte) would cost the same. We list the numbers because the
    local database would read its whole collection for a range.
    """
    numbers = list(range(max(first, 1), last + 1))
    documents = await db.messages.find({"_id": {"$in": numbers}}).sort("_id").to_list()
    return [to_event(document) for document in documents]


async def messages_before(room: "Room", end: int) -> list[ChatEvent]:
    """The page of messages just before number `end`."""
    page: list[ChatEvent] = []
    end = min(end, room.newest_id + 1)
    while not page and end > 1:  # a page is empty if all of it was deleted by hand
        page = await read_messages(room.db, end - PAGE_SIZE, end - 1)
        end -= PAGE_SIZE
    return page


def to_event(document: dict[str, Any]) -> ChatEvent:
    """A stored message as clients see it. The time is ISO 8601, in UTC."""
    event = {name: document[name] for name in ("key", "user", "text")}
    time = document["time"].isoformat(timespec="milliseconds")
    return {"type": "message", "id": document["_id"], **event, "time": time}


# ------ The room ------


def to_frame(events: list[ChatEvent]) -> tuple[bytes, int]:
    """As many events as fit into a frame, from the first on, and the last one's number."""
    frame = to_json(events).encode()
    # A client that reads 4 KB/s can take this much within SEND_TIMEOUT.
    if len(frame) > 100_000 and len(events) > 1:
        return to_frame(events[: len(events) // 2])  # the rest comes in the next frame
    return frame, events[-1]["id"]


@dataclass(eq=False)
class Message:
    """A message that waits to be stored, and its sender's reply: an error until it is stored."""

    document: dict[str, Any]
    reply: ChatEvent | None


NOT_STORED = "This message may not have been saved. Please try again."


class Room:
    """The clients of this process, what they may see, and their messages that wait.

    All processes on one database are one chat. Each has a room of its own, which remembers the
    newest messages, and who is online. When one of these changes, the write pumps are woken,
    and each sends what its own client lacks.
    """

    def __init__(self, db: Database, newest_id: int) -> None:
        self.db = db
        self.process_id = os.urandom(16).hex()
        # Who is here:
        self.clients: set[Client] = set()
        self.under_way: list[str] = []  # see limit_requests()
        self.elsewhere: set[str] = set()  # the users who are connected to other processes
        self.online: frozenset[str] = frozenset()  # all users, here and elsewhere
        self.entered = False  # somebody is in `online` for whom no write pump was woken
        # What the clients may see:
        self.newest_id = newest_id
        self.recent: list[ChatEvent] = []  # the newest messages, up to newest_id
        self.frames: dict[int, tuple[bytes, int]] = {}  # by sent_id, see next_frame()
        self.news = asyncio.Event()  # the write pumps wait for it
        # What is not stored yet:
        self.waiting: dict[tuple[str, str], Message] = {}  # by user and key
        self.next_batch: asyncio.Task[None] | None = None  # the task that will store them
        self.lock = asyncio.Lock()  # one batch at a time
        self.retry_at = 0.0  # until then, nothing is stored: see write_batch()

    def enter(self, client: Client) -> None:
        """Add a client. Its own first frame names it; sync_presence() tells the others.

        If they were told at once, a thousand people who come at once would cost a million frames.
        """
        self.clients.add(client)
        self.entered |= client.session["user"] not in self.online  # one more window is no news
        self.online |= {client.session["user"]}

    def end(self, clients: Iterable[Client], code: WSCloseCode) -> None:
        """Close connections, each when its client has got all that there is now."""
        for client in clients:
            client.end_id = min(client.end_id, self.newest_id)
            client.close_code = code
        self.wake()  # a client that lacks nothing is sent an empty array, and then ends

    def wake(self) -> None:
        """Have each write pump look for what its client lacks."""
        self.news.set()  # wakes all that wait now: clear() does not take this back
        self.news.clear()  # those that wait from now on wait for the next news

    async def next_frame(self, client: Client) -> bytes:
        """Take the next messages for a client, and count them as sent. If none: an empty array."""
        if client.sent_id >= self.newest_id:
            return b"[]"
        if not self.recent or client.sent_id + 1 < self.recent[0]["id"]:
            return await self.older_frame(client)
        # Many clients lack the same messages: encode them once for all. (To encode thousands at
        # once would hold up everybody, so take 500.)
        if client.sent_id not in self.frames:
            missing = [event for event in self.recent if event["id"] > client.sent_id]
            self.frames[client.sent_id] = to_frame(missing[:500])
        frame, client.sent_id = self.frames[client.sent_id]
        return frame

    async def older_frame(self, client: Client) -> bytes:
        """The same, from the database."""
        last = min(client.sent_id + PAGE_SIZE, self.newest_id)
        page = await read_messages(self.db, client.sent_id + 1, last)
        if not page:
            # Have all of them been deleted by hand? A primary that was elected just now may
            # show its newest messages only after a moment, so look twice before skipping them.
            await asyncio.sleep(1)
            page = await read_messages(self.db, client.sent_id + 1, last)
        frame, client.sent_id = to_frame(page) if page else (b"[]", last)
        return frame

    async def catch_up(self) -> None:
        """Publish what was stored after the last message that was published."""
        while page := await read_messages(self.db, self.newest_id + 1, self.newest_id + PAGE_SIZE):
            if page[0]["id"] > self.newest_id + 1 or page[-1]["id"] - page[0]["id"] >= len(page):
                # A gap, before the page or in it. A query during an insert may skip numbers, so ask
                # again. What is still missing was deleted by hand.
                page = await read_messages(self.db, self.newest_id + 1, page[-1]["id"])
            self.publish(page)

    def publish(self, events: list[ChatEvent]) -> None:
        """Show stored messages, in their order, to the clients, unless they were shown before."""
        # store() and catch_up() may both bring the same message: one has just stored it,
        # and the other has read it from the database.
        unseen = [event for event in events if event["id"] > self.newest_id]
        if unseen:
            self.recent = (self.recent + unseen)[-RECENT_MAX:]
            self.frames = {}
            self.newest_id = unseen[-1]["id"]
            self.wake()  # (4)

    async def post(self, user: str, text: str, key: str | None) -> ChatEvent | None:
        """Wait until a message is stored and shown. Return None, or what to tell its sender.

        That is an error event, or the stored message if this key was stored before.
        """
        key = key or os.urandom(16).hex()  # the unique index needs one
        document = {"user": user, "key": key, "text": text, "process_id": self.process_id}
        message = Message(document, {"type": "error", "text": NOT_STORED, "key": key})
        # If another connection waits with the same key, wait for its message.
        message = self.waiting.setdefault((user, key), message)
        if self.next_batch is None:
            self.next_batch = asyncio.create_task(self.write_batch())
        # shield(): if this handler is cancelled, the batch is not.
        await asyncio.shield(self.next_batch)
        return message.reply

    async def write_batch(self) -> None:
        """Take all messages that wait, and store them together (group commit)."""
        async with self.lock:
            # First let the other tasks run, so that what has just arrived is still in this batch.
            # (Four turns are measured: fewer turns stored fewer messages, and twelve no more.)
            for _ in range(4):
                await asyncio.sleep(0)
            # No `await` in the next three lines: a message belongs to this batch or to
            # the next one, never to both or to none.
            batch = list(self.waiting.values())
            self.waiting = {}
            self.next_batch = None  # from here on, post() starts a new one
            start = monotonic()
            if start < self.retry_at:
                return  # each message keeps its reply: not stored
            try:
                async with asyncio.timeout(DATABASE_TIMEOUT):
                    await self.store(batch)
            except (PyMongoError, TimeoutError) as error:
                log.error("%d messages are perhaps not stored: %s", len(batch), describe(error))
                # Refuse everything for a second (a circuit breaker).
                self.retry_at = monotonic() + 1
            # This process knows the next free number before the others do, so without a pause it
            # would always take it. Leave them as much time as we took (fairness).
            if self.elsewhere:
                await asyncio.sleep(min(monotonic() - start, 0.5))

    async def store(self, batch: list[Message]) -> None:
        """Store and publish a batch. If a message is refused, go on with the rest.

        No number is reserved before. If another process was faster, MongoDB refuses ours,
        because `_id` is unique (optimistic concurrency).
        """
        while batch:
            for number, message in enumerate(batch, self.newest_id + 1):
                message.document.update(_id=number, time=datetime.now(UTC))
            refusal: dict[str, Any] = {"index": len(batch)}  # unless the insert says otherwise
            try:
                # (3) One insert for all of them. It stops at the first one that is refused.
                await self.db.messages.insert_many([message.document for message in batch])
            except BulkWriteError as error:
                # Inserted, but perhaps on too few servers: it may be lost again, so do not show it.
                if error.details["writeConcernErrors"]:
                    raise
                [refusal] = error.details["writeErrors"]
            # MongoDB has acknowledged these: now they may be seen.
            stored = batch[: refusal["index"]]
            self.publish([to_event(message.document) for message in stored])
            for message in stored:
                message.reply = None
            batch = batch[len(stored) :]
            if not batch:
                return
            if "key" in refusal.get("keyPattern", ()):  # which unique index refused it?
                repeated = batch.pop(0)  # stored before: the sender gets that one
                key = {name: repeated.document[name] for name in ("user", "key")}
                with suppress(PyMongoError):
                    if first := await self.db.messages.find_one(key):
                        repeated.reply = to_event(first)
            elif refusal["code"] == 11000:  # a duplicate: the number is taken
                await self.catch_up()
            else:
                log.error("a message was refused: %s", refusal["code"])
                batch.pop(0)


# ------ The other processes ------


async def watch_messages(room: Room) -> None:
    """Publish what other processes store, as soon as they do (a change stream).

    https://www.mongodb.com/docs/manual/changeStreams/
    """
    # Let MongoDB leave out what this process has stored itself.
    others = {"operationType": "insert", "fullDocument.process_id": {"$ne": room.process_id}}
    try:
        async for change in room.db.messages.watch([{"$match": others}]):
            # One catch_up() brings all messages of a batch, in order.
            if change["documentKey"]["_id"] > room.newest_id:
                await room.catch_up()
    except PyMongoError as error:
        if getattr(error, "code", None) != 40573:  # the server has no change streams
            raise
        print("Warning: this MongoDB server has no change streams, so run only one process.")
        await asyncio.Event().wait()  # nobody sets it: wait until the program ends


PRESENCE_TTL = timedelta(seconds=35)  # a process that was silent for so long is gone


async def sync_presence(room: Room) -> None:
    """Every second: tell the other processes who is here, and ask them the same."""
    now = datetime.now(UTC)
    # A set: a user may have several windows open.
    users = {client.session["user"] for client in room.clients}
    own = {"users": list(users), "expires_at": now + PRESENCE_TTL}
    # upsert: insert the document if there is none yet.
    await room.db.presence.update_one({"_id": room.process_id}, {"$set": own}, upsert=True)
    # The document of a process that was killed stays there, but it expires.
    others = room.db.presence.find({"_id": {"$ne": room.process_id}, "expires_at": {"$gt": now}})
    room.elsewhere = {user async for process in others for user in process["users"]}
    # Look again: somebody may have come or gone while we waited.
    online = frozenset(room.elsewhere | {client.session["user"] for client in room.clients})
    if room.entered or online != room.online:
        room.online = online
        room.entered = False
        room.wake()


async def resync(room: Room) -> None:
    """Every second: see which sessions have ended, and what watch_messages() may have missed."""
    ids = [client.session["id"] for client in room.clients]
    revoked = {doc["_id"] async for doc in room.db.revoked_sessions.find({"_id": {"$in": ids}})}
    await room.catch_up()
    # After catch_up(), and before any other `await`, a client can be ahead only if the database is
    # an older backup. The client's page then shows messages that are gone. That is treated like an
    # ended session: the page goes to the login, and from there to a new page.
    ended = [c for c in room.clients if c.session["id"] in revoked or c.sent_id > room.newest_id]
    if ended:
        room.end(ended, WSCloseCode.POLICY_VIOLATION)


async def keep_alive(room: Room) -> None:
    """Every 26 s, send each client something, so that its page knows that it is connected.

    The pings of the WebSocket tell the server the same, but JavaScript cannot see them.
    """
    await asyncio.sleep(25)  # and keep_running() waits for another second
    room.wake()  # a write pump that has nothing to send sends an empty array


async def keep_running(step: Callable[[Room], Awaitable[None]], room: Room) -> None:
    """Repeat a step, a second after it has ended, until the program ends.

    Without this, an exception would end its task, and nobody would notice.
    """
    logged = ""
    while True:
        try:
            await step(room)
            logged = ""
        # Cancelling, at the end, raises CancelledError. It is not a subclass of
        # Exception, so this `except` does not catch it, and the loop ends.
        except Exception as error:
            if logged != describe(error):  # log it once, not every second
                logged = describe(error)
                is_bug = not isinstance(error, (PyMongoError, TimeoutError))
                log.error("%s will be retried: %s", step.__name__, logged, exc_info=is_bug)
        await asyncio.sleep(1)


def describe(error: Exception) -> str:
    """An error's type and codes. Not its text: the driver puts messages of users into it."""
    codes = re.findall(r"'code': (\d+)", str(getattr(error, "details", "")))
    return " ".join([type(error).__name__, *codes])


# ---------------------------------------------------------------------------
# 7. Templates
# ---------------------------------------------------------------------------


def set_up_templates(app: web.Application) -> None:
    """Render pages with Jinja2: https://aiohttp-jinja2.readthedocs.io

    It escapes whatever a template prints, so what users write never becomes HTML.
    """
    loader = jinja2.FileSystemLoader(HERE / "templates")
    environment = aiohttp_jinja2.setup(app, loader=loader, trim_blocks=True)
    # The templates can also use url(), which makes URLs from the routes' names.
    environment.globals.update(TEXT_MAX=TEXT_MAX)


# ---------------------------------------------------------------------------
# 8. Sessions and authorization
# ---------------------------------------------------------------------------

SESSION_LIFETIME = 7 * 24 * 3600  # seconds from the login, used or not


def session_cookies() -> Middleware:
    """aiohttp-session's middleware. The cookie is the session, encrypted and signed."""
    # A browser accepts a __Host- cookie only over HTTPS, from this very host. It
    # does not send a SameSite=Lax cookie with a form that a page of another site
    # posts: a second defence, beside check_origin().
    name = "__Host-chat" if HTTPS else "chat"
    storage = EncryptedCookieStorage(
        secret_key(), cookie_name=name, max_age=SESSION_LIFETIME, secure=HTTPS, samesite="Lax"
    )
    return session_middleware(storage)


def secret_key() -> bytes:
    """The key for the cookies, 32 bytes: a hash of SECRET_KEY, or of a random key in ``data/``."""
    key = SECRET_KEY
    if not key:
        path = data_folder() / "secret-key"
        with exit_on("cannot use data/secret-key: delete it", OSError, UnicodeError):
            # Anyone who has this key can log in as anybody. main() has set a umask, so
            # only the owner can ever read it.
            if not path.exists():
                path.write_text(os.urandom(32).hex())
            key = path.read_text()
    if len(key) < 16:
        sys.exit("chat.py: SECRET_KEY (or data/secret-key) is too short: it needs 16 characters")
    return hashlib.sha256(os.fsencode(key)).digest()


async def show_form(request: web.Request) -> web.StreamResponse:
    """``GET /login`` and ``/signup``: the empty form, or a redirect for a user."""
    with suppress(PyMongoError, TimeoutError):  # the empty form works without the database
        if await is_logged_in(request):
            raise redirect_to(request, "chat")
    # Our JavaScript goes to /login?ended when the session has ended.
    return render_form(request, ended="ended" in request.query)


FORM_ERRORS = {"login": 400, "password": 400, "wrong": 401, "taken": 409, "throttled": 429}


def render_form(request: web.Request, error: str = "", **values: Any) -> web.Response:
    """login.html or signup.html with these values. They never contain the password."""
    template = f"{request.match_info.route.name}.html"
    status = FORM_ERRORS.get(error, 200)
    context = values | {"error": error}
    return aiohttp_jinja2.render_template(template, request, context, status=status)


async def read_form(request: web.Request) -> tuple[str, str]:
    """The login and the password that were posted, or 400."""
    unreadable = web.HTTPBadRequest(text="The form data could not be read.")
    try:
        form = {"login": "", "password": ""} | dict(await request.post())
    except web.HTTPException:
        raise  # 413: it is too large
    except Exception as error:  # whatever is wrong with a form is the sender's mistake
        raise unreadable from error
    match form:
        case {"login": str(login), "password": str(password)} if is_valid_text(login + password):
            # Phones put a space after a name, and a very long text takes seconds to normalize.
            # NFC: different keyboards make an "é" of one code point or of two.
            # https://www.rfc-editor.org/rfc/rfc8265#section-4.2
            return login[:100].strip(), normalize("NFC", password[:1_000])
    raise unreadable


async def log_in(request: web.Request) -> web.StreamResponse:
    """``POST /login``: check the password, and start a session."""
    login, password = await read_form(request)
    return await authenticate(request, login, password, "wrong")


# Letters and marks that nobody can see: with them, there could be a second "anna".
INVISIBLE = "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\ufe00-\ufe0f\U000e0100-\U000e01ef]"


async def sign_up(request: web.Request) -> web.StreamResponse:
    """``POST /signup``: store a user, and start a session."""
    login, password = await read_form(request)
    name = normalize("NFKC", login)
    # \w means letters, digits and underscores, but not marks (category M), such as the vowel
    # signs of some scripts: allow those, by leaving them out of the check.
    letters = "".join(char for char in name if category(char)[0] != "M")
    if not 3 <= len(name) <= 20 or not re.fullmatch(r"\w+", letters) or re.search(INVISIBLE, name):
        return render_form(request, "login", login=login)
    if not 8 <= len(password) <= 200:
        return render_form(request, "password", login=login)
    password_hash = await in_thread(hash_password, password)
    # "login" is what others see, and "_id" what logins are compared by.
    user = {"_id": normalize_login(login), "login": login, "password": password_hash}
    # The unique `_id` decides whether the login is taken. To ask first would be a race.
    try:
        await request["db"].users.insert_one(user)
    except DuplicateKeyError:
        # With the right password, this is the same form once more: a double click.
        return await authenticate(request, login, password, "taken")
    return await start_session(request, login)


FAILED_LOGINS_WINDOW = timedelta(minutes=5)  # for ten wrong passwords for one login


async def authenticate(request: web.Request, login: str, password: str, error: str) -> web.Response:
    """Start a session if the password is right. Else, show the form with this error."""
    db = request["db"]
    # Count this attempt before the password is checked. A right password takes it back, below.
    # $setOnInsert sets these fields only if the document is new.
    now = datetime.now(UTC)
    attempts = {"_id": f"{normalize_login(login)} {client_address(request)}"}
    # MongoDB itself deletes what has expired only once a minute.
    await db.failed_logins.delete_one(attempts | {"expires_at": {"$lt": now}})
    first = {"$setOnInsert": {"count": 0, "expires_at": now + FAILED_LOGINS_WINDOW}}
    await db.failed_logins.update_one(attempts, first, upsert=True)
    few = attempts | {"count": {"$lt": 10}}  # after ten attempts, this matches nothing
    counted = await db.failed_logins.update_one(few, {"$inc": {"count": 1}})
    if counted.matched_count == 0:
        page = render_form(request, "throttled", login=login)
        page.headers["Retry-After"] = str(int(FAILED_LOGINS_WINDOW.total_seconds()))
        return page
    user = await db.users.find_one({"_id": normalize_login(login)})
    # For an unknown login, check the password against a hash that nothing matches: this takes
    # as long as for a known one.
    password_hash = DUMMY_HASH if user is None else user["password"]
    try:
        await in_thread(Argon2id.verify_phc_encoded, password.encode(), password_hash)
    except InvalidKey:
        return render_form(request, error, login=login)
    await db.failed_logins.update_one(attempts, {"$inc": {"count": -1}})
    return await start_session(request, user["login"])


# A thread beside the event loop, because hashing takes long. Only one, because it takes much
# memory as well: both on purpose, to make guessing expensive.
HASHING = ThreadPoolExecutor(max_workers=1)


async def in_thread(function: Callable[..., Any], *args: Any) -> Any:
    """Wait for a function that hashes a password."""
    return await asyncio.get_running_loop().run_in_executor(HASHING, function, *args)


def redirect_to(request: web.Request, name: str) -> web.HTTPSeeOther:
    """A redirect (303) to the route with this name, to be raised."""
    return web.HTTPSeeOther(request.app.router[name].url_for())


async def start_session(request: web.Request, login: str) -> NoReturn:
    """Start a session, and raise a redirect to the chat: a reload must not post the form again."""
    session = await new_session(request)
    # The middleware encrypts this and puts it into the cookie of the response.
    session.update({"id": os.urandom(16).hex(), "user": login})
    raise redirect_to(request, "chat")


async def log_out(request: web.Request) -> NoReturn:
    """End the session on all processes, and go to the login."""
    session = request["session"]
    # Needed only until the cookie expires.
    revoked = {"$set": {"expires_at": datetime.now(UTC) + timedelta(seconds=SESSION_LIFETIME)}}
    await request["db"].revoked_sessions.update_one({"_id": session["id"]}, revoked, upsert=True)
    # On every process, resync() closes the WebSockets of this session. Here the browser is told
    # to delete the cookie. (Not with session.invalidate(): that leaves out the attribute Secure,
    # without which browsers ignore a __Host- cookie.)
    session.max_age = 0
    session.changed()
    raise redirect_to(request, "login")


def normalize_login(login: str) -> str:
    """The form in which logins are compared: so "STRASSE" and "Straße" are the same login.

    NFKC gives the variants of a letter (such as full-width ones) one form, but not letters of
    different scripts that look alike: https://www.unicode.org/reports/tr15/
    casefold() can bring back some of these variants, so they are removed before and after it.
    """
    return normalize("NFKC", normalize("NFKC", login).casefold())


def hash_password(password: str) -> str:
    """A PHC string (method, parameters, salt, hash): Argon2id, 19 MiB, 2 passes, 1 lane.

    https://cheatsheetseries.owasp.org/cheatsheets/Password_Storage_Cheat_Sheet.html
    """
    argon2 = Argon2id(salt=os.urandom(16), length=32, iterations=2, lanes=1, memory_cost=19_456)
    return argon2.derive_phc_encoded(password.encode())


DUMMY_HASH = "$argon2id$v=19$m=19456,t=2,p=1$" + "A" * 22 + "$" + "A" * 43

# ---------------------------------------------------------------------------
# 9. Static
# ---------------------------------------------------------------------------
# Browsers keep the CSS and the JavaScript for a year, each under a URL that changes with it.


def cache_control(request: web.Request, status: int) -> str:
    """What a browser may keep: https://developer.mozilla.org/docs/Web/HTTP/Guides/Caching"""
    if request.match_info.route.name != "static":
        return "no-store"  # after a log-out, "back" shows nothing
    # url_for() adds the hash of the file that we have. During a deploy, a new page may ask an old
    # process: then the hashes differ, and nobody may keep its old file for a year.
    match = request.match_info
    if status in (200, 304) and request.rel_url == match.route.url_for(filename=match["filename"]):
        return "max-age=31536000, immutable"
    return "no-cache"  # keep it, but ask each time whether it has changed


# ---------------------------------------------------------------------------
# 10. Deploying to Heroku
# ---------------------------------------------------------------------------


@contextmanager
def exit_on(text: str, *expected: type[Exception]) -> Iterator[None]:
    """If one of these exceptions comes, end the program with one line. Others show a traceback.

    The text of an exception is not shown, because it could quote a password.
    """
    try:
        yield
    except expected:
        sys.exit(f"chat.py: {text}")


def main() -> None:
    """Run until SIGTERM or Ctrl-C (exit status 0), or say in one line why not (status 1)."""
    os.umask(0o077)  # only the owner can read the files that we create
    # Each connection is an open file, and the usual limit is 1,024.
    _, files_max = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(files_max, 10_240), files_max))
    # Print each line at once, also where the output goes to a file.
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    # Log what went wrong here, and not what clients do wrong: that would fill the disk.
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.ERROR)
    logging.getLogger("aiohttp.server").addFilter(is_not_bad_http)
    # PyMongo's warnings may quote a password. In the log, their level (WARNING) is below ERROR.
    logging.captureWarnings(True)
    if not re.fullmatch("(?i)1|true|yes|on|0|false|no|off", setting("HTTPS", "0")):
        sys.exit("chat.py: HTTPS must be 1 or 0")
    # Before anything else starts: a wrong port is found at once.
    with exit_on(f"port {PORT} is in use, or wrong for {HOST}", OSError, OverflowError, ValueError):
        sock = socket.create_server((HOST, int(PORT)))
    app = create_app()
    # keepalive_timeout: longer than the 90 s of Heroku's router, or we might close a connection
    # while the router sends a request. shutdown_timeout: for the handlers, after shut_down().
    # auto_decompress: no browser compresses forms, and 64 KB could become megabytes.
    web.run_app(app, sock=sock, keepalive_timeout=95, shutdown_timeout=1, auto_decompress=False)
    os._exit(0)  # do not wait for Motor's threads, which may still wait for the database


def is_not_bad_http(record: logging.LogRecord) -> bool:
    """A filter for the log: leave out the long tracebacks for broken HTTP from clients."""
    return record.exc_info is None or not isinstance(record.exc_info[1], http.HttpProcessingError)


def stop() -> None:
    """End run_app() at the first SIGTERM or Ctrl-C. Another one must not end the shutdown, too."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if not asyncio.get_running_loop().remove_signal_handler(number):
            return  # stop() has run before: two signals came at once
        signal.signal(number, signal.SIG_IGN)
    raise web.GracefulExit  # as aiohttp's own handler of signals does


async def shut_down(app: web.Application) -> None:
    """Graceful shutdown: store what is being stored, then close all WebSockets (code 1001)."""
    # Wait for the batch that is being stored. We keep the lock, so no other one begins: browsers
    # send what is left to the next process.
    await app[ROOM].lock.acquire()
    await asyncio.sleep(0.3)  # for WebSockets that are being opened just now
    app[ROOM].end(app[ROOM].clients, WSCloseCode.GOING_AWAY)
    # aiohttp waits for the handlers, twice shutdown_timeout at most. Then it runs the rest of
    # database().


if __name__ == "__main__":
    main()
