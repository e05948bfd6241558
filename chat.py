"""A realtime chat over WebSockets, in one file. Read it from top to bottom, once.

Run it with ``python chat.py`` and open the URL that it prints. To read it, start with
``tutorial/README.md``: each section of this file is explained in the chapter with the same
number. ``grep '^# [0-9]' chat.py`` prints the table of contents.

How a message travels. The numbers (2) to (5) are at the lines that do it::

    (1) the browser    keeps the message until it is stored, and sends {"text", "key"}
          |
    (2) handle_text()  checks it, waits for Writer.post(), and only then reads the next one
          |
    (3) Writer         numbers ALL waiting messages, and stores them ----> MongoDB
          |            with ONE insert_many                                   |
    (4) Writer         once they are acknowledged: Room.publish()             | change stream
          |                                                                   v
    (5) Room           broadcast(): encoded once,        Reconciler of every other process:
          |            the same bytes for everybody      catch_up(), publish(), broadcast()
          v                                                                   v
        the browsers of this process                     the browsers of that process

Nobody sees a message before MongoDB has acknowledged it. Everybody sees all messages in the
same order: the order of their numbers, which are 1, 2, 3, ... without gaps.

The key is for lost connections. A browser that got no answer cannot know whether its message
was stored. It sends the message again, and the key shows that it is the same one.

All processes that use one database are one chat. One is enough for a start; with several, the
chat can serve more people, and goes on when one of them ends.
"""

# ---------------------------------------------------------------------------
# 1. Introduction
# ---------------------------------------------------------------------------
# First the standard library, then the packages of requirements.txt. aiohttp is
# the web server, aiohttp_jinja2 renders the templates, and aiohttp_session
# remembers who is logged in. cryptography hashes the passwords and encrypts the
# session cookie. Motor is the MongoDB driver. It is built on pymongo, which
# provides the exceptions and some options.

import asyncio
import atexit
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import socket
import sys
import time
import warnings
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import Any, NoReturn
from unicodedata import normalize
from urllib.parse import urlsplit

import aiohttp_jinja2
import jinja2
import pymongo
from aiohttp import WSCloseCode, WSMsgType, web
from aiohttp.http import HttpProcessingError
from aiohttp.typedefs import Handler, Middleware
from aiohttp_session import Session, get_session, new_session, session_middleware
from aiohttp_session.cookie_storage import EncryptedCookieStorage
from bson import ObjectId
from cryptography.exceptions import InvalidKey
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from motor.motor_asyncio import AsyncIOMotorClient, AsyncIOMotorDatabase
from pymongo.errors import BulkWriteError, ConnectionFailure, DuplicateKeyError, PyMongoError
from pymongo.read_concern import ReadConcern

# ---------------------------------------------------------------------------
# 2. Structure
# ---------------------------------------------------------------------------
# The settings, the limits, and create_app(), which puts everything together.
#
# The settings are environment variables (https://12factor.net/config), so the
# same code runs on your computer and on a server, and no password ends up in
# git. An empty variable counts as unset.

HERE = Path(__file__).resolve().parent
DATA = HERE / "data"  # the local database and the secret key; git ignores it
ENVIRONMENT = {name: value for name, value in os.environ.items() if value}
MONGODB_URI = ENVIRONMENT.get("MONGODB_URI")  # unset: the local database
SECRET_KEY = ENVIRONMENT.get("SECRET_KEY")  # unset: a random key, kept in data/
HOST = ENVIRONMENT.get("HOST", "127.0.0.1")
PORT = ENVIRONMENT.get("PORT", "8080")
HTTPS = ENVIRONMENT.get("HTTPS") == "1"  # behind a reverse proxy that handles HTTPS

# The limits. Without them, one careless or hostile client could exhaust what
# everybody shares: memory, the database, or the time of the event loop. That
# loop runs the coroutines (`async def`) of this process in turns: it can switch
# to another one only where one waits at an `await`.

PAGE_SIZE = 50  # messages, at most: in one query, in one page, and in Room.recent
TEXT_MAX = 2_000  # characters of a message
KEY_MAX = 64  # characters of a message's idempotency key
BODY_MAX = 64 * 1024  # bytes of a form, and of a WebSocket message
# Bytes that may wait for one client. A page of the longest messages must fit: a
# control character takes 6 bytes in JSON (\u0001), so 50 * 2,000 * 6 = 600,000.
SEND_BUFFER_MAX = 1_000_000
SEND_TIMEOUT = 60  # seconds in which a client must read something of what was sent
HEARTBEAT = 27  # seconds between two pings; Heroku's router cuts after 55 of silence
DATABASE_TIMEOUT = 3  # seconds for a query, or for a batch of messages
FORM_TIMEOUT = 4  # seconds for a client to send a form
REQUEST_TIMEOUT = 5  # seconds for a handler, except the WebSocket's
START_TIMEOUT = 20  # seconds at the start: a replica set elects a primary in about 10
CLOSE_TIMEOUT = 0.5  # seconds for each wait during the shutdown
RETRY_DELAY = 0.5  # seconds until a task that failed is tried again
SYNC_PAUSE = 0.1  # seconds, at least, between two looks at who is online or logged out
SYNC_INTERVAL = 10  # seconds until a process looks for changes, even if it heard of none
PRESENCE_TTL = timedelta(seconds=35)  # a process that was silent for so long is gone
SESSION_LIFETIME = timedelta(days=7)  # from the login, used or not
FAILED_LOGINS_MAX = 10  # wrong passwords for one login from one IP address
FAILED_LOGINS_WINDOW = timedelta(minutes=5)  # how long each of them counts
HASH_QUEUE_MAX = 10  # people whose passwords may be waiting to be hashed

# What clients get is a JSON array of events: {"type": "message", ...}. The other
# types are online, joined, left and error.
ChatEvent = dict[str, Any]
Database = AsyncIOMotorDatabase[dict[str, Any]]

# Under these keys the application keeps what its handlers share. A string
# would do, but it could clash with a string of some package. An AppKey cannot,
# and it tells an editor the type. (A class that is defined further down can stand
# only in the annotation, in quotes.)
ROOM: web.AppKey["Room"] = web.AppKey("ROOM")
WRITER: web.AppKey["Writer"] = web.AppKey("WRITER")
# They limit the hashing of passwords, see hash_turn().
HASH_SLOTS = web.AppKey("HASH_SLOTS", asyncio.Semaphore)
HASH_LOCK = web.AppKey("HASH_LOCK", asyncio.Lock)

log = logging.getLogger("chat")


class StartupError(Exception):
    """The chat cannot start. The text says in one line why, and what to do."""


@contextmanager
def explain(text: str, *expected: type[Exception]) -> Iterator[None]:
    """Turn the expected exceptions into a StartupError. Any other one is a bug: leave it alone.

    The text of an exception is not shown, because it could quote a password.
    """
    try:
        yield
    except expected as error:
        raise StartupError(f"{type(error).__name__}: {text}") from None


def create_app() -> web.Application:
    """Put the application together. Raise StartupError if a setting is not usable."""
    # A middleware is a function around every handler. A request passes through
    # them from first to last, and its response from last to first. So error_pages
    # sees the errors of all others, and authorize can read the session that the one
    # before it has prepared.
    middlewares: list[Middleware] = [error_pages, redirect_to_https, check_origin]
    middlewares += [create_session_middleware(), authorize, db_handler]
    app = web.Application(middlewares=middlewares, client_max_size=BODY_MAX)
    app.add_routes(routes())
    set_up_templates(app)
    app[HASH_SLOTS] = asyncio.Semaphore(HASH_QUEUE_MAX)
    app[HASH_LOCK] = asyncio.Lock()
    # A signal of aiohttp (not of the operating system) is a list of coroutine
    # functions that it calls at a certain moment. This one is called just before
    # the headers of a response are sent.
    app.on_response_prepare.append(set_headers)
    # A clean-up context runs up to its `yield` before the first request, and
    # the rest of it after the last.
    app.cleanup_ctx.append(database)
    # The clean-up waits for all handlers, and the handler of a WebSocket returns
    # only when its connection is closed. So we close them before, on_shutdown.
    app.on_shutdown.append(shut_down)
    return app


# ---------------------------------------------------------------------------
# 3. Routes
# ---------------------------------------------------------------------------


def routes() -> list[web.AbstractRouteDef]:
    """The routing table. Code and templates use the names to make URLs."""
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
        # append_version: url() adds a hash of the file's content, see chapter 9.
        web.static("/static", HERE / "static", name="static", append_version=True),
    ]


# All other routes require a login, and so does every route that is added later.
PUBLIC_ROUTES = {"login", "signup", "static"}

# ---------------------------------------------------------------------------
# 4. Request and response
# ---------------------------------------------------------------------------
# A handler is a coroutine function that takes a request and returns a response.
# The middlewares of section 5 have put the session and the database into the
# request.


@aiohttp_jinja2.template("chat.html")
async def chat_page(request: web.Request) -> dict[str, Any]:
    """The newest messages as a page. Without JavaScript, ``?before=`` shows older ones."""
    newest = request.app[ROOM].latest_id
    before = request.query.get("before", str(newest + 1))
    messages = await messages_before(request, before)
    # The decorator renders the template with these values.
    return {"user": request["session"]["user"], "messages": messages}


async def older_messages(request: web.Request) -> web.Response:
    """JSON: ``{"messages": [event, ...]}``, up to PAGE_SIZE of them, oldest first."""
    messages = await messages_before(request, request.query.get("before", ""))
    return web.json_response({"messages": messages}, dumps=to_json)


async def messages_before(request: web.Request, before: str) -> list[ChatEvent]:
    """The page of messages just before number `before`, which is text from a URL."""
    room = request.app[ROOM]
    end = parse_number(before)
    if end > room.latest_id + 1:
        await room.catch_up()  # another process has shown the client more than we know
    # A number in a URL may be too large for MongoDB.
    end = min(end, room.latest_id + 1)
    return await read_messages(request["db"], end - PAGE_SIZE, end - 1)


def parse_number(text: str) -> int:
    """The number in a query parameter, or 400. Stricter than int(), which accepts " 1_0"."""
    if not re.fullmatch("-?[0-9]{1,100}", text):
        raise web.HTTPBadRequest(text="The URL needs a valid message number.")
    return int(text)


# The WebSocket. Each connection has a running handler of its own, for as long as
# it is open.


async def websocket(request: web.Request) -> web.WebSocketResponse:
    """The live chat: who is online, then every message after number ``?after=``.

    ``/ws?after=`` starts with the oldest message, ``/ws`` with the next one that is stored.
    """
    room = request.app[ROOM]
    # Check the URL first: an error (400) can be sent only before the handshake.
    after = request.query.get("after", str(room.latest_id))
    after_id = 0 if after == "" else max(parse_number(after), 0)
    ws = web.WebSocketResponse(
        timeout=SEND_TIMEOUT,  # for the client's answer, when we close
        # aiohttp refuses a message of exactly this size, hence the + 1.
        max_msg_size=BODY_MAX + 1,
        # Compressing every frame for every client would halve the speed.
        compress=False,
        # aiohttp would answer pings by itself. A client that sends nothing else would
        # then never pass flush() and sleep(0) below, which protect the others.
        autoping=False,
    )
    # This completes the handshake (101). From here on, there are only frames.
    await ws.prepare(request)
    connection = Connection(request, ws)
    room.enter(connection)
    try:
        # This is the handler's stop switch: end() moves the deadline to now. Then the
        # `await` that is under way in this block is cancelled, and the block raises
        # TimeoutError.
        async with connection.deadline:
            if request.app[WRITER].closing:  # shut_down() did not see this one
                connection.end(WSCloseCode.GOING_AWAY)
            await room.send_missed(connection, after_id)
            while True:
                # Read the next frame only when all that we sent has left this process:
                # otherwise, answers to a client that sends and never reads would pile up.
                await connection.flush()
                # Let the other coroutines run. An `await` whose result is ready goes on
                # at once, so a client that sends without pause would stop everybody.
                await asyncio.sleep(0)
                frame = await ws.receive()
                connection.alive = True
                if frame.type is WSMsgType.TEXT:
                    await handle_text(request, connection, frame.data)
                elif frame.type is WSMsgType.PING:
                    connection.send_frame(to_frame(WSMsgType.PONG, frame.data))
                elif frame.type is WSMsgType.BINARY:
                    connection.end(WSCloseCode.UNSUPPORTED_DATA)
                elif frame.type is not WSMsgType.PONG:
                    break  # the client has closed the connection, or it is lost
    except (PyMongoError, TimeoutError, ConnectionError):
        # If end() was called, it has set the close code. If catching up failed, the code is
        # still TRY_AGAIN_LATER, so the client reconnects.
        pass
    finally:
        # Whatever happened: a connection that stayed in the room would be a user
        # who never leaves.
        room.leave(connection)
        await connection.close()
    return ws


async def handle_text(request: web.Request, connection: "Connection", data: str) -> None:
    """Store the message that a client sent, or tell the client why not.

    We read nothing more from this client until its message is stored. So a client that sends
    faster than the database stores is slowed down and loses nothing (backpressure), and all
    clients get an equal share of each batch.
    """
    try:
        message = json.loads(data)
    except (ValueError, RecursionError):  # "[[[[[[..." nests too deep
        message = None
    # Never trust what comes from outside: all of this may be anything that JSON
    # can express, for example a list where we expect a string.
    fields = message if isinstance(message, dict) else {}
    key: Any = fields.get("key")
    text: Any = fields.get("text")
    # Python counts code points. In JavaScript, "😀".length is 2, so chat.js must
    # not use that.
    text_is_valid = is_valid_text(text) and 1 <= len(text.strip()) <= TEXT_MAX
    key_is_valid = key is None or (is_valid_text(key) and 1 <= len(key) <= KEY_MAX)
    if text_is_valid and key_is_valid:
        # (2) Wait until the message is stored.
        reply = await request.app[WRITER].post(connection.user, text.strip(), key)
    else:
        reply = {"type": "error", "text": INVALID_MESSAGE}
    # Usually there is no reply: the sender sees the message like everybody else.
    if reply is not None:
        if reply["type"] == "error" and is_valid_text(key):
            reply["key"] = key  # which of the client's messages this is about
        connection.send([reply])


# What an error event tells the sender.
INVALID_MESSAGE = f"Messages must have 1 to {TEXT_MAX:,} characters, and keys 1 to {KEY_MAX}."
NOT_STORED = "This message may not have been saved. Please try again."


def is_valid_text(value: Any) -> bool:
    """Whether it is a string that UTF-8 can encode: JSON may contain half a surrogate pair."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


# Letters as they are, not as \u0436: that makes Russian text a third as long.
to_json = partial(json.dumps, ensure_ascii=False, separators=(",", ":"))


def to_frame(opcode: WSMsgType, payload: bytes) -> bytes:
    """Put a payload into a WebSocket frame.

    aiohttp can do this as well, but it would do it again for each client. A server's frames
    are the same for all clients. https://www.rfc-editor.org/rfc/rfc6455#section-5.2
    """
    first_byte = 0x80 | opcode  # 0x80: the message ends with this frame
    # 126 means: the size is in the next 2 bytes. 127: in the next 8 bytes.
    size = len(payload)
    if size < 126:
        return bytes([first_byte, size]) + payload
    if size < 65_536:
        return bytes([first_byte, 126]) + size.to_bytes(2, "big") + payload
    return bytes([first_byte, 127]) + size.to_bytes(8, "big") + payload


class Connection:
    """One open WebSocket: whose it is, and how to send to it.

    websocket() creates it, and is the only one to close it. Others may call end().
    """

    def __init__(self, request: web.Request, ws: web.WebSocketResponse) -> None:
        self.session: Session = request["session"]
        self.user: str = self.session["user"]
        self.ws = ws
        assert request.transport is not None  # for the type checker: prepare() has used it
        # What we send waits in the transport, which is asyncio's end of the connection,
        # and then in the operating system's buffer. A ping waits behind both. A big
        # buffer would delay it until a slow client is taken for a dead one.
        self.transport = request.transport
        raw_socket: socket.socket = self.transport.get_extra_info("socket")
        raw_socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
        # aiohttp must never wait for the client, because it has no time limit for
        # that. Our flush() has one.
        self.transport.set_write_buffer_limits(high=sys.maxsize)
        self.live = False  # True once it has all earlier messages: it gets each new one
        self.alive = True  # False from a ping until the client sends something
        self.deadline = asyncio.timeout(None)  # when its handler stops: never, until end()
        # The client reads it as the reason. This one means "please reconnect".
        self.close_code = WSCloseCode.TRY_AGAIN_LATER

    def send(self, events: list[ChatEvent]) -> None:
        """Send events to this client alone."""
        self.send_frame(to_frame(WSMsgType.TEXT, to_json(events).encode()))

    def send_frame(self, frame: bytes) -> None:
        """Send a frame without waiting for the client.

        If we waited, one client that stops reading would delay all the others. So frames that
        it has not read stay in memory. If they are too many, we disconnect the client, which
        is called a slow consumer. When it reconnects, ``?after=`` says what it has seen.
        """
        if self.transport.get_write_buffer_size() > SEND_BUFFER_MAX:
            self.transport.abort()
        elif not self.ws.closed and not self.transport.is_closing():
            self.transport.write(frame)

    async def flush(self) -> None:
        """Wait until the operating system has taken everything. It takes more as the client reads.

        The client may read as slowly as it likes. If it reads nothing for SEND_TIMEOUT, cut it.
        """
        # The answer to a ping may be stuck behind what waits here. So while we wait, only
        # SEND_TIMEOUT counts, and not what ping_everybody() expects.
        self.alive = True
        before = sys.maxsize  # so the first look below starts the clock
        while (waiting := self.transport.get_write_buffer_size()) > 0:
            self.alive = True
            if waiting < before:  # the client has read something
                give_up_at = time.monotonic() + SEND_TIMEOUT
            elif time.monotonic() > give_up_at:
                self.transport.abort()  # this also empties the buffer, and so ends the loop
            before = waiting
            await asyncio.sleep(0.05)

    def end(self, code: WSCloseCode) -> None:
        """Have the handler close the connection. The first code counts.

        What the codes mean: https://www.rfc-editor.org/rfc/rfc6455#section-7.4.1
        """
        if self.deadline.when() is None:
            self.close_code = code
            self.deadline.reschedule(0)  # a time in the past: now

    async def close(self) -> None:
        """Send the close frame, after all that was sent before, and wait for the client's.

        Only the handler may do this, because ws.close() reads until the client has answered,
        and only one task may read. If we left something unread, the operating system would
        throw away what we have sent (a TCP reset).
        """
        await self.ws.close(code=self.close_code)
        await self.flush()


# ---------------------------------------------------------------------------
# 5. Middlewares
# ---------------------------------------------------------------------------
# Here is the code that every page needs, so no handler can forget it. A
# middleware may answer the request itself, or pass it on, and it sees the
# response on its way back.


@web.middleware
async def error_pages(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give every error a page in the site's own style. Bugs (500) are left to aiohttp's log."""
    error: web.HTTPException
    try:
        return await handler(request)
    except web.HTTPException as raised:
        error = raised
    except (ConnectionError, web.RequestPayloadError, HttpProcessingError):
        request.content.feed_eof()  # the rest is unreadable: aiohttp must not wait for it
        error = web.HTTPBadRequest(text="The request body could not be read.")
    except (PyMongoError, TimeoutError) as failure:
        log.warning("%s: 503 after %s", request.match_info.route.name, describe(failure))
        text = "The database is not responding. Please try again in a moment."
        error = web.HTTPServiceUnavailable(text=text, headers={"Retry-After": "5"})
    except OSError as failure:
        if failure.errno != errno.ENAMETOOLONG:
            raise
        error = web.HTTPNotFound()  # no static file has such a long name
    # An HTTPException is a response, too. We put our page into it and raise it
    # again, so it keeps its headers (Allow, Retry-After).
    if error.status >= 400:  # a redirect is an HTTPException as well: it needs no page
        error.text = aiohttp_jinja2.render_string("error.html", request, {"error": error})
        error.content_type = "text/html"
    raise error


@web.middleware
async def redirect_to_https(request: web.Request, handler: Handler) -> web.StreamResponse:
    """With HTTPS=1, redirect requests that reached the reverse proxy as plain HTTP."""
    if HTTPS and last_forwarded(request, "X-Forwarded-Proto") == "http":
        location = f"https://{request.host}{request.path_qs}"
        return web.Response(status=308, headers={"Location": location})
    return await handler(request)


def last_forwarded(request: web.Request, name: str) -> str:
    """The last value of a header, which our reverse proxy added. Earlier ones may be invented."""
    return request.headers.getall(name, [""])[-1].rpartition(",")[2].strip()


@web.middleware
async def check_origin(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse what pages of other sites send: cross-site request forgery (CSRF).

    The browser may send our cookie with such a request. Only the Origin header shows which
    site's page made it. The WebSocket needs this check most, because a page of any site may
    open a WebSocket to any server. A client that sends no Origin is not a browser.
    """
    own_origin = f"{'https' if HTTPS else 'http'}://{request.host}"
    is_websocket = request.match_info.route.name == "websocket"
    # By convention, GET and HEAD only read. So they need no check.
    changes_something = is_websocket or request.method not in {"GET", "HEAD"}
    if changes_something and request.headers.get("Origin", own_origin) != own_origin:
        raise web.HTTPForbidden(text="Refused: this request came from another site.")
    return await handler(request)


@web.middleware
async def authorize(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Find the user's session. Without one, only the public routes are open."""
    name = request.match_info.route.name
    # The set names what is public, not what is private: a route that somebody
    # adds and forgets here is closed, not open (deny by default). Errors (404,
    # 405) are the same for everybody.
    if name in PUBLIC_ROUTES or request.match_info.http_exception is not None:
        return await handler(request)
    request["session"] = await current_session(request)
    if request["session"] is None:
        if name == "websocket":  # a WebSocket handshake does not follow redirects
            raise web.HTTPUnauthorized(text="Please log in.")
        raise redirect_to(request, "login")
    return await handler(request)


async def current_session(request: web.Request) -> Session | None:
    """The session of the request's cookie, or None. Raise if the database does not answer."""
    try:
        session = await get_session(request)
    except UnicodeError:
        return None  # a cookie that is not ASCII is none of ours
    if "id" not in session:
        return None
    # Our JavaScript sends the name of the user whom its page was made for, as
    # ?user=. Suppose Ann's page is open, and Ben logs in in another tab. Now the
    # cookie is Ben's. What Ann's page sends must not appear as his.
    if request.query.get("user", session["user"]) != session["user"]:
        return None
    # Anyone with a copy of the cookie has the session, and deleting the cookie
    # in one browser leaves the copies valid. So a log-out is stored (revocation).
    # db_handler comes later: so here are a database and a time limit of our own.
    revoked_sessions = request.app[ROOM].db.revoked_sessions
    async with asyncio.timeout(DATABASE_TIMEOUT):
        revoked = await revoked_sessions.find_one({"_id": session["id"]})
    return None if revoked else session


@web.middleware
async def db_handler(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Put the database into the request, and stop a handler that takes too long."""
    request["db"] = request.app[ROOM].db
    # Motor limits each operation, see timeoutMS in connect(). But a handler may
    # need several, and may first have to wait for one of Motor's threads.
    is_websocket = request.match_info.route.name == "websocket"  # it runs while the client stays
    async with asyncio.timeout(None if is_websocket else REQUEST_TIMEOUT):
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
    """Add headers to every response. A middleware would see a WebSocket's 101 too late."""
    response.headers.update(SECURITY_HEADERS)
    response.headers["Cache-Control"] = cache_control(request, response.status)
    # HSTS: for a year, the browser uses only HTTPS for this site.
    if HTTPS:
        response.headers["Strict-Transport-Security"] = "max-age=31536000"


# ---------------------------------------------------------------------------
# 6. Databases
# ---------------------------------------------------------------------------
# MongoDB stores documents, which are like dictionaries, in collections:
#   users             _id: the normalized login; login: as signed up; password: its hash
#   messages          _id: 1, 2, 3, ...; user, key, text, time; process_id
#   presence          _id: a process; users: who is connected to it; expires_at; process_id
#   revoked_sessions  _id: a session that was logged out; expires_at; process_id
#   failed_logins     attempt: a login and an IP address; expires_at
# process_id is the process that wrote the document: it need not hear of that.

# When one of these collections changes, every other process reads the change.
SHARED_STATE = ["messages", "presence", "revoked_sessions"]


async def database(app: web.Application) -> AsyncIterator[None]:
    """Connect to MongoDB and start the background tasks; stop everything at the end."""
    uri = MONGODB_URI or start_local_database()
    hint = "cannot use MONGODB_URI: check it, and that the database is running"
    with explain(hint, PyMongoError, OSError, ValueError):
        db, has_change_streams = await connect(uri)
        room = app[ROOM] = Room(db)
        # Fill the room's cache with the newest page. Nobody is connected yet.
        with pymongo.timeout(START_TIMEOUT):
            newest = await db.messages.find_one(sort=[("_id", pymongo.DESCENDING)])
        if newest is not None:
            room.publish(await read_messages(db, newest["_id"] - PAGE_SIZE + 1, newest["_id"]))
    writer = app[WRITER] = Writer(room)
    reconciler = Reconciler(room, writer)
    # These run all the time, together with the handlers. Each is a task: a
    # coroutine that the event loop runs although nobody awaits it.
    steps = [room.ping_everybody, reconciler.sync_messages]
    steps += [reconciler.sync_presence, reconciler.sync_sessions]
    if has_change_streams:
        steps.append(reconciler.watch_changes)
    else:
        print("Warning: this MongoDB server has no change streams, so run only one process.")
    tasks = [asyncio.create_task(keep_running(room, step)) for step in steps]
    # Here aiohttp starts to accept connections. It comes back when the program ends.
    yield
    # All handlers have returned. A task that is cancelled may need a moment.
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    # connect() allows 3 s for this. At the end, that is too long.
    with suppress(PyMongoError), pymongo.timeout(CLOSE_TIMEOUT):
        await db.presence.delete_one({"_id": room.process_id})
    # close() makes pending queries fail. Nobody waits for them, so do not log it.
    # And without a limit, it waits 30 s for a database that is lost.
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
    with pymongo.timeout(CLOSE_TIMEOUT):
        db.client.close()


def start_local_database() -> str:
    """Start SecantusDB, which speaks MongoDB's protocol, in this process. Return its URI."""
    hint = "install requirements-dev.txt with Python 3.11 to 3.13, or set MONGODB_URI"
    with explain(f"the local database is missing: {hint}", ModuleNotFoundError):
        from secantus.server import SecantusDBServer
    # Only one process may use the folder. We check that ourselves, because the
    # database's own error is hard to read. The operating system releases the
    # lock when the process ends, in whatever way.
    folder = os.open(data_folder(), os.O_RDONLY)
    with explain("another chat uses data/: stop it, or set MONGODB_URI", BlockingIOError):
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    # sync_on_commit has the same purpose as journal=True in connect(): `kill -9` must
    # not lose a message that was acknowledged.
    server = SecantusDBServer(storage_path=str(DATA / "db"), sync_on_commit=True)
    server.start()
    # Stop it last of all, when nothing in this process uses it any more.
    atexit.register(server.stop)
    print(f"The local database: {server.uri}")
    return str(server.uri)


def data_folder() -> Path:
    """The folder ``data/``, which only its owner can read."""
    with explain("make data/ writable, or set SECRET_KEY and MONGODB_URI", OSError):
        DATA.mkdir(exist_ok=True)
        # Also if it was there before: the messages and the key are nobody else's.
        DATA.chmod(0o700)
    return DATA


async def connect(uri: str) -> tuple[Database, bool]:
    """Open the database of a connection string; also say whether it is a replica set's."""
    # These arguments take priority over the options in the connection string.
    # The client connects when it is first used, and again when a connection is
    # lost. It keeps several connections, so that queries can run side by side.
    client: AsyncIOMotorClient[dict[str, Any]] = AsyncIOMotorClient(
        uri,
        # A write is acknowledged when a majority of the servers of the replica
        # set have it in the journals on their disks (write concern).
        w="majority",
        journal=True,
        # Read from the server that has the newest data (read preference). The next two
        # undo what a connection string may say about other servers.
        readPreference="primary",
        readPreferenceTags="",
        maxStalenessSeconds=-1,
        # Send a write again if its answer is lost. It is carried out once.
        retryWrites=True,
        # Give up an operation after this time, with all its retries.
        timeoutMS=DATABASE_TIMEOUT * 1000,
        connectTimeoutMS=DATABASE_TIMEOUT * 1000,
        tz_aware=True,  # times with a time zone, which is UTC
    )
    if "." in urlsplit(uri).path:  # PyMongo would take what follows for a collection
        raise ValueError("not the name of a database")
    name = client.get_default_database("chat").name
    if name == "admin":  # many providers' strings name it, but it has no change streams
        name = "chat"
    # Ask what kind of server it is. A replica set may have no primary just now, so
    # try again for a while. Many short tries, because the end of the program, if it
    # is stopped now, must wait for the current one.
    hello = None
    async with asyncio.timeout(START_TIMEOUT):
        while hello is None:
            with suppress(ConnectionFailure):
                hello = await client[name].command("hello")
            # If each server accepts connections and never answers, waiting is useless.
            servers = client.delegate.topology_description.server_descriptions().values()
            if all(isinstance(server.error, pymongo.errors.NetworkTimeout) for server in servers):
                raise TimeoutError
    # A replica set tells its name. In front of a cluster of several replica sets
    # there is a server called mongos, which says "msg" instead.
    has_change_streams = "setName" in hello or "msg" in hello
    # Read only what a majority has stored (read concern). A single server cannot.
    level = "majority" if has_change_streams else "local"
    db = client.get_database(name, read_concern=ReadConcern(level))
    # A browser that got no answer sends the message again, with the same key. This
    # index ensures that it is stored only once.
    await db.messages.create_index(["user", "key"], unique=True)
    await db.failed_logins.create_index("attempt")
    # MongoDB deletes these documents when they have expired (TTL).
    for collection in (db.presence, db.revoked_sessions, db.failed_logins):
        await collection.create_index("expires_at", expireAfterSeconds=0)
    return db, has_change_streams


async def read_messages(db: Database, first: int, last: int) -> list[ChatEvent]:
    """The events of the stored messages with the numbers `first` to `last`, in order.

    This one query serves the history, clients that catch up, and news of other processes. On
    MongoDB, a range ($gte and $lte) would cost the same. We list the numbers because the local
    database would read its whole collection for a range.
    """
    numbers = list(range(max(first, 1), last + 1))
    async with asyncio.timeout(DATABASE_TIMEOUT):
        documents = await db.messages.find({"_id": {"$in": numbers}}).sort("_id").to_list()
    return [to_event(document) for document in documents]


def to_event(document: dict[str, Any]) -> ChatEvent:
    """A stored message as clients see it. The time is ISO 8601, in UTC."""
    return {
        "type": "message",
        "id": document["_id"],
        "key": document["key"],
        "user": document["user"],
        "text": document["text"],
        "time": document["time"].isoformat(timespec="milliseconds"),
    }


class Room:
    """The connections of this process, and what was published to them.

    All processes on one database are one chat. Each has a room of its own, which remembers
    what its clients have been shown: the newest messages, and who is online. The handlers, the
    Writer and the Reconciler use it.
    """

    def __init__(self, db: Database) -> None:
        self.db = db
        self.process_id = token_hex(8)
        self.connections: set[Connection] = set()
        self.latest_id = 0  # the number of the newest message that was published
        self.recent: deque[ChatEvent] = deque(maxlen=PAGE_SIZE)  # the newest ones, up to latest_id
        self.online: set[str] = set()  # the users whom the clients have been told of
        self.has_peers = False  # whether users are connected to other processes, too
        # Set when a collection has changed, or may have: the Reconciler reads it again.
        self.changed = {name: asyncio.Event() for name in SHARED_STATE}

    def wake(self, *collections: str) -> None:
        """Have the Reconciler read these collections again."""
        for name in collections:
            self.changed[name].set()

    def enter(self, connection: Connection) -> None:
        """Add a connection, tell it who is online, and tell the others if a user has joined."""
        # First tell the others, then add it: so it gets no "joined" of its own.
        self.show_online(self.online | {connection.user})
        self.connections.add(connection)
        connection.send([{"type": "online", "users": sorted(self.online)}])
        # The session may have been revoked since authorize() looked.
        self.wake("presence", "revoked_sessions")

    def leave(self, connection: Connection) -> None:
        """Remove a connection. The Reconciler finds out whether its user has left."""
        self.connections.discard(connection)
        self.wake("presence")

    async def send_missed(self, connection: Connection, after_id: int) -> None:
        """Send a client every message after number `after_id`; from then on, it is live.

        Raise PyMongoError, TimeoutError or ConnectionError if that fails half-way.
        """
        if after_id > self.latest_id:
            await self.catch_up()  # another process has shown the client more than we know
        # Older messages than the recent ones come from the database. We wait for
        # this client after each page. That delays nobody else.
        while self.recent and after_id + 1 < self.recent[0]["id"]:
            page = await read_messages(self.db, after_id + 1, after_id + PAGE_SIZE)
            # If the primary has just failed, the new one may not have the newest yet.
            if not page or connection.transport.is_closing():
                raise ConnectionError("The client cannot catch up now.")
            connection.send(page)
            await connection.flush()
            # For the same reason, a page may end early. So go on from what came.
            after_id = page[-1]["id"]
        # No `await` from here on, so no new message can come between the last
        # page and the first live one.
        missed = [event for event in self.recent if event["id"] > after_id]
        if missed:
            connection.send(missed)
        connection.live = True

    def publish(self, events: list[ChatEvent]) -> None:
        """Show stored messages to the clients, unless they were shown before.

        `events` must be in order, and there must be no gap between `latest_id` and the first
        (except at the start, when nobody is connected).
        """
        # The Writer and the Reconciler may both bring the same message: one has just
        # stored it, and the other has read it from the database.
        news = [event for event in events if event["id"] > self.latest_id]
        if news:
            self.latest_id = news[-1]["id"]
            self.recent.extend(news)
            # A client that is still catching up must get older messages first.
            self.broadcast(news, [each for each in self.connections if each.live])

    def broadcast(self, events: list[ChatEvent], connections: Iterable[Connection]) -> None:
        """Send events to many clients: encoded once, and in one frame.

        It has no `await`, so nothing else runs meanwhile: all clients get the same frames in
        the same order.
        """
        frame = to_frame(WSMsgType.TEXT, to_json(events).encode())
        for connection in connections:
            connection.send_frame(frame)  # (5)

    async def catch_up(self) -> None:
        """Publish what was stored after the last message that was published."""
        while True:
            first = self.latest_id + 1
            page = await read_messages(self.db, first, first + PAGE_SIZE - 1)
            # Stop at the first gap: the query may have missed a message that was stored
            # while it ran.
            self.publish([each for number, each in enumerate(page, first) if each["id"] == number])
            if len(page) < PAGE_SIZE:
                return

    async def ping_everybody(self) -> None:
        """Every HEARTBEAT seconds: cut those who did not answer the last ping, and ping the others.

        aiohttp can do this as well (``heartbeat=``). But if a client's answer waits behind many
        messages that we have not read yet, aiohttp would think that the client is dead.
        """
        await asyncio.sleep(HEARTBEAT)
        ping = to_frame(WSMsgType.PING, b"")
        for connection in self.connections:
            # If a client's computer has lost its network, nothing tells us. We only notice
            # that the answer to our ping stays away.
            if not connection.alive:
                connection.transport.abort()
            connection.alive = False
            connection.send_frame(ping)  # does nothing after abort()

    def show_online(self, users: set[str]) -> None:
        """Tell all clients who has joined and who has left: from now on, `users` are online."""
        events = [{"type": "joined", "user": user} for user in sorted(users - self.online)]
        events += [{"type": "left", "user": user} for user in sorted(self.online - users)]
        self.online = users
        if events:
            self.broadcast(events, self.connections)


@dataclass(eq=False)  # a message is equal only to itself, so batch.remove() finds this one
class Message:
    """A message that waits to be stored, and what only its sender will be told."""

    document: dict[str, Any]
    # An error, as long as the message is not known to be stored.
    reply: ChatEvent | None = field(default_factory=lambda: {"type": "error", "text": NOT_STORED})


class Writer:
    """Stores the messages of this process's clients. All that are waiting go into one insert.

    It owns these messages. Each handler calls post() and waits for it, so at most one message
    of each connection is waiting.
    """

    def __init__(self, room: Room) -> None:
        self.room = room
        self.waiting: dict[tuple[str, str], Message] = {}  # by user and key
        self.next_batch: asyncio.Task[None] | None = None  # the task that will store them
        self.lock = asyncio.Lock()  # one batch at a time
        self.pause_until = 0.0  # a time.monotonic(), see write_batch()
        self.closing = False  # shut_down() sets it: refuse new messages
        # True after a batch has failed. Then refuse every message immediately, until
        # sync_presence() has written to the database. Otherwise each message would wait
        # for the same error, one after the other (fail fast, a circuit breaker).
        self.failing = False

    async def post(self, user: str, text: str, key: str | None) -> ChatEvent | None:
        """Wait until a message is stored and shown. Return None, or what to tell its sender.

        That is an error event, or the stored event if this key was stored before.
        """
        if self.closing:
            return {"type": "error", "text": "Not stored: the server is shutting down."}
        # The unique index needs a key in each message. An ObjectId is unique.
        key = key or str(ObjectId())
        message = Message({"user": user, "text": text, "key": key})
        # If another connection waits with the same key, wait for its message.
        message = self.waiting.setdefault((user, key), message)
        if self.next_batch is None:
            self.next_batch = asyncio.create_task(self.write_batch())
        # shield(): if this handler is cancelled, the batch is not.
        await asyncio.shield(self.next_batch)
        return message.reply

    async def write_batch(self) -> None:
        """Take all messages that wait, and store them together (group commit).

        While one batch is being stored, the next messages gather. So the batches grow when many
        people write, and a single message is stored right away.
        """
        async with self.lock:
            # We know the next free number before the other processes do, so we would
            # always be the first to use it. So pause for as long as our last batch
            # took (fairness). But shut_down() waits for this, too: hence CLOSE_TIMEOUT.
            if self.room.has_peers:
                await asyncio.sleep(self.pause_until - time.monotonic())
            # Let the event loop run four times. One turn reads the sockets, the next one
            # wakes the handlers, and those call post(). Otherwise, when many people answer
            # the same message, the first few answers would make a batch of their own, and
            # all others would have to wait for it. That would be twice as many inserts.
            for _ in range(4):
                await asyncio.sleep(0)
            # No `await` in the next three lines: a message belongs to this batch or to
            # the next one, never to both or to none.
            batch = list(self.waiting.values())
            self.waiting = {}
            self.next_batch = None  # from here on, post() starts a new one
            if self.failing:
                return  # with the reply that each message had from the beginning
            start = time.monotonic()
            try:
                async with asyncio.timeout(DATABASE_TIMEOUT):
                    await self.store(batch)
            except (PyMongoError, TimeoutError) as error:
                log.warning("%d messages may not be stored: %s", len(batch), describe(error))
                self.failing = True
                self.room.wake("messages", "presence")
                return
            now = time.monotonic()
            self.pause_until = now + min(now - start, CLOSE_TIMEOUT)

    async def store(self, batch: list[Message]) -> None:
        """Store and publish a batch. If a number or a key is taken, try again with the rest.

        No number is reserved before. If another process was faster, MongoDB refuses ours,
        because `_id` is unique. Then we read what is new, and take the next numbers (optimistic
        concurrency). So this index is the only lock between the processes.
        """
        while batch:
            now = datetime.now(UTC)
            for number, message in enumerate(batch, self.room.latest_id + 1):
                message.document.update(_id=number, time=now, process_id=self.room.process_id)
            # (3) One insert for all of them.
            duplicate = await self.insert([message.document for message in batch])
            # What came before the duplicate is stored. The rest stays in the batch.
            stored = batch.copy() if duplicate is None else batch[: duplicate["index"]]
            # (4) MongoDB has acknowledged these: now they may be seen.
            self.room.publish([to_event(message.document) for message in stored])
            for message in stored:
                message.reply = None
            del batch[: len(stored)]
            if duplicate is not None:
                newest = self.room.latest_id
                await self.room.catch_up()
                if "key" in duplicate["keyPattern"]:
                    await self.answer_repeated(batch)
                elif self.room.latest_id == newest:  # taken, but not yet acknowledged
                    await asyncio.sleep(0.02)

    async def insert(self, documents: list[dict[str, Any]]) -> Any:
        """Insert in order, and stop at the first duplicate. Return its error, or None."""
        try:
            await self.room.db.messages.insert_many(documents)
        except BulkWriteError as error:
            # The details say at which document the insert stopped ("index"), and
            # which unique index refused it ("keyPattern"). 11000 is MongoDB's code
            # for a duplicate. A majority must have the documents before it, too, so
            # there may be no write concern error.
            match error.details:
                case {"writeErrors": [{"code": 11000} as duplicate], "writeConcernErrors": []}:
                    return duplicate
            raise  # anything else: it is not known whether the documents are safe

    async def answer_repeated(self, batch: list[Message]) -> None:
        """Remove the messages whose keys are already stored. Their senders get the stored ones."""
        # A query for each, all at once. One query with "$or" would take seconds
        # on the local database.
        find_one = self.room.db.messages.find_one
        sent = [message.document for message in batch]
        queries = [find_one({"user": each["user"], "key": each["key"]}) for each in sent]
        found = await asyncio.gather(*queries, return_exceptions=True)
        for message, document in zip(batch.copy(), found, strict=True):
            # Only what was published here: a newer one would reach its sender too early.
            if isinstance(document, dict) and document["_id"] <= self.room.latest_id:
                message.reply = to_event(document)
                batch.remove(message)
        if isinstance(found[0], BaseException):
            del batch[0]  # this is the one that was refused: its sender gets NOT_STORED


class Reconciler:
    """Keeps the room up to date with the shared state in the database.

    It is only told that a collection may have changed, never what is new. It reads that, and
    shows the difference. So an extra wake-up does no harm, and if one is lost, the next comes
    after SYNC_INTERVAL. This is called level-triggered reconciliation.
    """

    def __init__(self, room: Room, writer: Writer) -> None:
        self.room = room
        self.writer = writer
        self.stored_users: list[str] | None = None  # what our presence document says

    async def watch_changes(self) -> None:
        """Call wake() when another process has changed something (a change stream).

        https://www.mongodb.com/docs/manual/changeStreams/
        """
        # MongoDB filters the changes: our own are no news, and neither are signs
        # of life, see sync_presence(). It sends us only the collection's name.
        others = {
            "fullDocument.process_id": {"$ne": self.room.process_id},
            "operationType": {"$ne": "update"},
            "ns.coll": {"$in": SHARED_STATE},
        }
        async with self.room.db.watch([{"$match": others}, {"$project": {"ns": 1}}]) as stream:
            self.room.wake(*SHARED_STATE)  # for all that happened before
            async for change in stream:
                self.room.wake(change["ns"]["coll"])

    async def wait_for_change(self, name: str) -> None:
        """Wait for a wake-up, but not longer than SYNC_INTERVAL (a resync)."""
        with suppress(TimeoutError):
            async with asyncio.timeout(SYNC_INTERVAL):
                await self.room.changed[name].wait()
        # Clear it before we read: a change that comes while we read sets it again.
        self.room.changed[name].clear()

    async def sync_messages(self) -> None:
        """Publish what other processes have stored."""
        await self.wait_for_change("messages")
        await self.room.catch_up()

    async def sync_presence(self) -> None:
        """Write down who is here, read who is elsewhere, and announce the difference."""
        await self.wait_for_change("presence")
        presence = self.room.db.presence
        own_id = self.room.process_id
        now = datetime.now(UTC)
        # A user may have several windows open, so these are fewer than the connections.
        # A list, because MongoDB has no sets. Sorted, because it is compared below.
        users = sorted({connection.user for connection in self.room.connections})
        own = {"process_id": own_id, "users": users, "expires_at": now + PRESENCE_TTL}
        # upsert: insert the document if there is none yet.
        if users != self.stored_users:
            await presence.replace_one({"_id": own_id}, own, upsert=True)
            self.stored_users = users
        else:  # only a sign of life: watch_changes() ignores updates
            await presence.update_one({"_id": own_id}, {"$set": own}, upsert=True)
        # The database has stored this, so the Writer may try again.
        self.writer.failing = False
        # A process that was killed cannot sign off, but its document expires.
        others = presence.find({"_id": {"$ne": own_id}, "expires_at": {"$gt": now}})
        elsewhere = {user async for process in others for user in process["users"]}
        # Once more: somebody may have come or gone while we waited.
        self.room.show_online(elsewhere | {each.user for each in self.room.connections})
        self.room.has_peers = len(elsewhere) > 0
        # When a thousand people connect in a second, ten looks are enough.
        await asyncio.sleep(SYNC_PAUSE)

    async def sync_sessions(self) -> None:
        """Close (code 1008) the WebSockets of sessions that were logged out, or have expired."""
        await self.wait_for_change("revoked_sessions")
        # Only the sessions that are connected here: others are authorize()'s task.
        ids = [connection.session["id"] for connection in self.room.connections]
        # find() asks nothing yet: the documents are read, one batch after the other,
        # by `async for`.
        found = self.room.db.revoked_sessions.find({"_id": {"$in": ids}})
        revoked = {session["_id"] async for session in found}
        oldest = time.time() - SESSION_LIFETIME.total_seconds()
        for connection in list(self.room.connections):
            session = connection.session
            if session["id"] in revoked or session.created < oldest:
                self.room.connections.discard(connection)  # it gets nothing new
                connection.end(WSCloseCode.POLICY_VIOLATION)
        await asyncio.sleep(SYNC_PAUSE)


async def keep_running(room: Room, step: Callable[[], Awaitable[None]]) -> None:
    """Repeat a step. Without this, an exception would end its task, and nobody would notice."""
    while True:
        try:
            await step()
        # Cancelling, at the end, raises CancelledError. It is not a subclass of
        # Exception, so it passes through here and ends the loop.
        except Exception as error:
            is_bug = not isinstance(error, (PyMongoError, TimeoutError))
            log.warning("%s will be retried: %s", step.__name__, describe(error), exc_info=is_bug)
            await asyncio.sleep(RETRY_DELAY)
            # wait_for_change() has cleared its event, but nothing was read.
            room.wake(*SHARED_STATE)


def describe(error: Exception) -> str:
    """An error's type and code. Not its text: the driver puts messages of users into it."""
    return f"{type(error).__name__} {getattr(error, 'code', '')}".strip()


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
    environment.globals.update(TEXT_MAX=TEXT_MAX, PAGE_SIZE=PAGE_SIZE)


# ---------------------------------------------------------------------------
# 8. Sessions and authorization
# ---------------------------------------------------------------------------


def create_session_middleware() -> Middleware:
    """aiohttp-session's middleware. The cookie is the session, encrypted and signed."""
    # A browser accepts a __Host- cookie only over HTTPS, from this very host. It
    # does not send a SameSite=Lax cookie with a form that a page of another site
    # posts: a second defence, beside check_origin().
    name = "__Host-chat" if HTTPS else "chat"
    seconds = int(SESSION_LIFETIME.total_seconds())
    storage = EncryptedCookieStorage(
        secret_key(), cookie_name=name, max_age=seconds, secure=HTTPS, samesite="Lax"
    )
    return session_middleware(storage)


def secret_key() -> bytes:
    """The key for the cookies, 32 bytes: a hash of SECRET_KEY, or of a random key in ``data/``."""
    key = SECRET_KEY
    if key is None:
        path = data_folder() / "secret-key"
        with explain("cannot use data/secret-key: delete it", OSError, UnicodeError):
            # Anyone who has this key can log in as anybody. main() has set a umask,
            # so only the owner can ever read it. "x" fails if the file exists.
            with suppress(FileExistsError), open(path, "x") as file:
                file.write(token_hex(32))
            key = path.read_text()
    if len(key) < 16:
        raise StartupError("SECRET_KEY (or data/secret-key) is too short: it needs 16 characters")
    return hashlib.sha256(os.fsencode(key)).digest()


async def show_form(request: web.Request) -> web.StreamResponse:
    """``GET /login`` and ``/signup``: the empty form, or a redirect for a user."""
    with suppress(PyMongoError, TimeoutError):  # the empty form works without the database
        if await current_session(request) is not None:
            raise redirect_to(request, "chat")
    # Our JavaScript goes to /login?ended when the session has ended.
    return render_form(request, 200, ended="ended" in request.query)


def render_form(request: web.Request, status: int, **context: Any) -> web.Response:
    """login.html or signup.html with these values. It never contains the password."""
    template = f"{request.match_info.route.name}.html"
    return aiohttp_jinja2.render_template(template, request, context, status=status)


async def read_form(request: web.Request) -> tuple[str, str]:
    """The login and the password that were posted, or 400."""
    # An unknown charset, a truncated body, a file in place of a text: these are
    # the sender's mistakes (400), not ours (500).
    with suppress(LookupError, RuntimeError, TimeoutError, TypeError, ValueError):
        async with asyncio.timeout(FORM_TIMEOUT):
            form: Mapping[str, Any] = await request.post()
        login = form.get("login", "")
        password = form.get("password", "")
        if is_valid_text(login) and is_valid_text(password):
            # No login is longer, and normalizing a very long one takes seconds.
            return login[:100], password
    raise web.HTTPBadRequest(text="The form data could not be read.")


async def log_in(request: web.Request) -> web.StreamResponse:
    """``POST /login``: check the password, and start a session."""
    login, password = await read_form(request)
    db = request["db"]
    user_id = normalize_login(login)
    address = last_forwarded(request, "X-Forwarded-For") if HTTPS else request.remote
    attempt = f"{user_id} {address}"
    # One at a time: otherwise, a hundred guesses that are sent together would all
    # find the same number of failed logins.
    async with hash_turn(request.app):
        seconds = await retry_after(db, attempt)
        if seconds > 0:
            minutes = -(-seconds // 60)  # rounded up
            page = render_form(request, 429, login=login, error="throttled", minutes=minutes)
            page.headers["Retry-After"] = str(seconds)
            return page
        user = await db.users.find_one({"_id": user_id})
        # Check an unknown login, too, against a hash that nothing matches. A
        # faster answer would tell which logins exist (a timing attack).
        password_hash = DUMMY_HASH if user is None else user["password"]
        verify = Argon2id.verify_phc_encoded
        try:
            await asyncio.to_thread(verify, password.encode(), password_hash)
        except InvalidKey:
            expires_at = datetime.now(UTC) + FAILED_LOGINS_WINDOW
            await db.failed_logins.insert_one({"attempt": attempt, "expires_at": expires_at})
            return render_form(request, 401, login=login, error="wrong")
    return await start_session(request, user["login"])


async def sign_up(request: web.Request) -> web.StreamResponse:
    """``POST /signup``: store a user, and start a session."""
    login, password = await read_form(request)
    # \w: letters, digits and underscores of any script. NFKC makes one letter
    # of an "e" and the accent that follows it.
    if not re.fullmatch(r"\w{3,20}", normalize("NFKC", login)):
        return render_form(request, 400, login=login, error="login")
    if not 8 <= len(password) <= 200:
        return render_form(request, 400, login=login, error="password")
    # Only the hash is stored. A thief of the database must still guess each
    # password, and each guess takes as long as this call.
    async with hash_turn(request.app):
        password_hash = await asyncio.to_thread(hash_password, password)
    # "login" is what others see, and "_id" what logins are compared by.
    user = {"_id": normalize_login(login), "login": login, "password": password_hash}
    # Checking first would be a race: somebody may take the login before our
    # insert. The unique `_id` decides.
    try:
        await request["db"].users.insert_one(user)
    except DuplicateKeyError:
        return render_form(request, 409, login=login, error="taken")
    return await start_session(request, login)


def redirect_to(request: web.Request, name: str) -> web.HTTPSeeOther:
    """A redirect (303) to a route, to be raised."""
    return web.HTTPSeeOther(request.app.router[name].url_for())


async def start_session(request: web.Request, login: str) -> NoReturn:
    """Start a session, and go to the chat: a redirect, so that a reload posts nothing again."""
    # Always a new session. If an attacker had planted one in the browser, that
    # one would now be logged in (session fixation).
    session = await new_session(request)
    # The middleware encrypts this and puts it into the cookie of the response.
    session.update({"id": token_hex(16), "user": login})
    raise redirect_to(request, "chat")


async def log_out(request: web.Request) -> NoReturn:
    """End the session on all processes, and go to the login."""
    await request.read()  # the body has nothing of interest, but may be too large (413)
    room = request.app[ROOM]
    session = request["session"]
    # Needed only until the cookie expires.
    expires_at = datetime.now(UTC) + SESSION_LIFETIME
    revoked = {"_id": session["id"], "process_id": room.process_id, "expires_at": expires_at}
    with suppress(DuplicateKeyError):  # another tab has logged out, too
        await request["db"].revoked_sessions.insert_one(revoked)
    # Here, sync_sessions() closes the WebSockets of this session. The change stream
    # wakes it in the other processes.
    room.wake("revoked_sessions")
    session.invalidate()
    raise redirect_to(request, "login")


def normalize_login(login: str) -> str:
    """The form in which logins are compared: so "STRASSE" and "Straße" are the same login.

    NFKC gives the variants of a letter (such as full-width ones) one form, but not letters of
    different scripts that look alike: https://www.unicode.org/reports/tr15/
    casefold() can undo that for some letters, hence twice.
    """
    return normalize("NFKC", normalize("NFKC", login).casefold())


def hash_password(password: str) -> str:
    """A PHC string (method, parameters, salt, hash): Argon2id, 19 MiB, 2 passes, 1 lane.

    https://cheatsheetseries.owasp.org/cheatsheets/Password_Storage_Cheat_Sheet.html
    """
    argon2 = Argon2id(salt=os.urandom(16), length=32, iterations=2, lanes=1, memory_cost=19_456)
    return argon2.derive_phc_encoded(password.encode())


# A hash that no password matches. To check it takes as long as to check a real one.
DUMMY_HASH = "$argon2id$v=19$m=19456,t=2,p=1$" + "A" * 22 + "$" + "A" * 43


@asynccontextmanager
async def hash_turn(app: web.Application) -> AsyncIterator[None]:
    """Wait for one's turn to have a password hashed. If too many wait already, answer 503.

    Hashing is slow and takes much memory, on purpose. So it is done in a thread, beside the
    event loop, and one at a time (the lock). The slots limit how many people wait for it.
    """
    # Locked means that all slots are taken.
    if app[HASH_SLOTS].locked():
        text = "Too many people are logging in. Please try again in a moment."
        raise web.HTTPServiceUnavailable(text=text, headers={"Retry-After": "2"})
    async with app[HASH_SLOTS], app[HASH_LOCK]:
        yield


async def retry_after(db: Database, attempt: str) -> int:
    """Seconds until this login may be tried again from this IP address; usually 0.

    The failed logins are stored, so that all processes count together (rate limiting).
    """
    # MongoDB deletes expired documents only once a minute, so check the time.
    now = datetime.now(UTC)
    recent = db.failed_logins.find({"attempt": attempt, "expires_at": {"$gt": now}})
    failures = await recent.sort("expires_at").to_list()
    if len(failures) < FAILED_LOGINS_MAX:
        return 0
    # When this entry expires, fewer than FAILED_LOGINS_MAX are left.
    oldest = failures[-FAILED_LOGINS_MAX]
    return int((oldest["expires_at"] - now).total_seconds()) + 1


# ---------------------------------------------------------------------------
# 9. Static
# ---------------------------------------------------------------------------
# Browsers keep the CSS and the JavaScript for a year. When the content of a
# file changes, so does its URL (cache busting).


def cache_control(request: web.Request, status: int) -> str:
    """What a browser may keep: https://developer.mozilla.org/docs/Web/HTTP/Guides/Caching"""
    if request.match_info.route.name != "static":
        return "no-store"  # after a log-out, "back" shows nothing
    # Only if the URL has the hash of the file that we have. During a deploy, an
    # old process may be asked for the new version of a file. Its answer is the
    # old one, and must not be kept for a year.
    name = request.match_info["filename"]
    if status < 400 and request.rel_url == request.app.router["static"].url_for(filename=name):
        return "max-age=31536000, immutable"
    return "no-cache"  # keep it, but ask each time whether it has changed


# ---------------------------------------------------------------------------
# 10. Deploying to Heroku
# ---------------------------------------------------------------------------


def main() -> None:
    """Run until SIGTERM or Ctrl-C (exit status 0), or say in one line why not (status 1)."""
    os.umask(0o077)  # only the owner can read the files that we create
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("aiohttp.server").addFilter(is_not_bad_http)
    # PyMongo's warnings quote unknown options, which may be part of a password.
    warnings.filterwarnings("ignore", module="pymongo")
    # Print each line at once, also where the output is a log and no terminal.
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    try:
        # Open the socket before anything else starts: a wrong port is found at once.
        listening = create_socket()
        app = create_app()
        # Heroku's router keeps idle connections for 90 s, so we keep them longer.
        # If we closed one first, the router could just be sending a request.
        web.run_app(app, sock=listening, keepalive_timeout=95, shutdown_timeout=CLOSE_TIMEOUT)
    except StartupError as error:
        sys.exit(f"chat.py: {error}")


def is_not_bad_http(record: logging.LogRecord) -> bool:
    """A filter for the log: leave out the long tracebacks for broken HTTP from clients."""
    return record.exc_info is None or not isinstance(record.exc_info[1], HttpProcessingError)


def create_socket() -> socket.socket:
    """The socket on which we listen. Raise StartupError if that is not possible."""
    # We create the socket, and not aiohttp: so an OSError here can only mean that
    # HOST or PORT is wrong. Only IPv6 addresses contain colons.
    family = socket.AF_INET6 if ":" in HOST else socket.AF_INET
    hint = f"cannot listen on {HOST}, port {PORT}: check HOST and PORT"
    with explain(hint, OSError, OverflowError, TypeError, ValueError):
        return socket.create_server((HOST, int(PORT)), family=family)


async def shut_down(app: web.Application) -> None:
    """Graceful shutdown: store or answer what clients have sent, then close (code 1001)."""
    # First, refuse new messages. Otherwise, a client that sends without pause
    # could delay the end as long as it likes.
    writer = app[WRITER]
    writer.closing = True
    while writer.waiting or writer.lock.locked():
        await asyncio.sleep(0.01)
    # Clients may have sent more while their last message was being stored. Let
    # their handlers answer that, too.
    await asyncio.sleep(CLOSE_TIMEOUT)
    for connection in list(app[ROOM].connections):
        connection.end(WSCloseCode.GOING_AWAY)
    # aiohttp waits for the handlers, see shutdown_timeout in main(). Then it runs the rest
    # of database().


if __name__ == "__main__":
    main()
