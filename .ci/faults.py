"""What breaks things for the tests: a database that can be killed, a proxy before a database that
can be cut, silent or slow, a router that adds headers, and clients that misbehave.
"""

import asyncio
import contextlib
import json
import re
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import bson

# Seconds. Every wait has a limit, and this one is far longer than any wait should take.
PATIENCE = 30


def free_port():
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        return it.getsockname()[1]


class Mongo:
    """A SecantusDB in a process of its own, to be killed and started again."""

    def __init__(self, folder, *options):
        self.port, self.folder, self.options = free_port(), folder, options

    def start(self):
        command = [sys.executable, "-m", "secantus", "--port", str(self.port), "--sync-on-commit"]
        command += ["--storage-path", self.folder, *self.options]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return self
            time.sleep(0.05)
        raise AssertionError("the database did not start")

    def kill(self, *_):
        self.process.kill()
        self.process.wait()

    __enter__, __exit__ = start, kill

    def uri(self, name):
        return f"mongodb://127.0.0.1:{self.port}/{name}?directConnection=true"


class Relay:
    """A TCP server that passes everything on to another one, which listens at `target`."""

    def __init__(self, target):
        self.target, self.port, self.connections = target, 0, []

    async def open(self):
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", self.port)
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    async def cut(self, *_):
        self.server.close()
        for each in self.connections:
            each.cancel()
        await asyncio.sleep(0.05)

    __aenter__, __aexit__ = open, cut

    async def serve(self, reader, writer):
        """Serve one connection until one of its two ends is closed."""
        self.connections.append(asyncio.current_task())
        asked = {}  # for Proxy: what has no answer yet, by its number
        with contextlib.closing(writer):
            try:
                there, here = await asyncio.open_connection(*self.target)
                with contextlib.closing(here):
                    async with asyncio.TaskGroup() as group:
                        group.create_task(self.ask(reader, here, asked))
                        group.create_task(self.reply(there, writer, asked))
            except* (OSError, EOFError):
                pass

    async def reply(self, reader, writer, asked):
        while data := await reader.read(65536):
            writer.write(data)
        raise EOFError


class Router(Relay):
    """What Heroku's router does, in small: it adds the X-Forwarded headers to what came."""

    def __init__(self, chat, scheme="https", client="192.0.2.7"):
        super().__init__(address(chat))
        self.chat, self.scheme, self.client = chat, scheme, client

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    async def ask(self, reader, writer, asked):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        forged = re.findall(r"(?im)^X-Forwarded-For: (.*)\r$", head)
        head = re.sub(r"(?im)^X-Forwarded-.*\r\n", "", head)
        addresses = ", ".join([*forged, self.client])
        added = f"X-Forwarded-For: {addresses}\r\nX-Forwarded-Proto: {self.scheme}\r\n"
        added += "Connection: close\r\n" if "Upgrade" not in head else ""
        writer.write((head[:-2] + added + "\r\n").encode())
        await self.reply(reader, writer, asked)


# What the chat asks the database: `insert`, `messages`, and all of it.
Command = namedtuple("Command", "name collection document")


class Proxy(Relay):
    """A proxy before a real MongoDB. It can be cut, opened again, silent and slow.

    It understands MongoDB's wire protocol: `commands` has all that was asked, and a function
    `answer(command, reply)` may return another reply; or None: the reply is lost, and with it
    the connection. https://www.mongodb.com/docs/manual/reference/mongodb-wire-protocol/
    """

    HEADER = struct.Struct("<iiii")  # length, number, the number that it answers, kind
    REPLY, QUERY, MESSAGE, MORE_TO_COME = 1, 2004, 2013, 2

    def __init__(self, uri):
        self.parts = urlsplit(uri)
        super().__init__((self.parts.hostname, self.parts.port or 27017))
        self.delay, self.silent, self.answer = 0, False, None  # seconds for each message
        self.commands = []

    @property
    def uri(self):
        user, at, _ = self.parts.netloc.rpartition("@")
        return self.parts._replace(netloc=f"{user}{at}127.0.0.1:{self.port}").geturl()

    def discovered_uri(self):
        """The same for a driver that asks who the members of the replica set are."""
        return self.uri.replace("directConnection=true", "directConnection=false")

    async def read(self, reader):
        """The next message: what its header says, and the rest of it."""
        length, *header = self.HEADER.unpack(await reader.readexactly(16))
        return *header, await reader.readexactly(length - 16)

    async def write(self, writer, number, answered, kind, body):
        await asyncio.sleep(self.delay)
        while self.silent:  # what waits meanwhile goes on later, as in a real network
            await asyncio.sleep(0.05)
        writer.write(self.HEADER.pack(16 + len(body), number, answered, kind) + body)

    async def ask(self, reader, writer, asked):
        """Pass on what the chat asks."""
        while True:
            number, answered, kind, body = await self.read(reader)
            asked[number] = self.parse(kind, body)
            self.commands.append(asked[number])
            await self.write(writer, number, answered, kind, body)

    async def reply(self, reader, writer, asked):
        """Pass on what the database answers."""
        while True:
            number, answered, kind, body = await self.read(reader)
            command = asked.pop(answered)
            if kind == self.MESSAGE and body[0] & self.MORE_TO_COME:
                asked[number] = command  # what comes next will answer this one
            start = 20 if kind == self.REPLY else 5  # there the document begins
            if (reply := self.change(command, bson.decode(body[start:]))) is None:
                raise EOFError
            await self.write(writer, number, answered, kind, body[:start] + bson.encode(reply))

    def parse(self, kind, body):
        """The command in a message: a document, and lists of documents that belong into it."""
        if kind == self.QUERY:  # only the very first question still has this form
            return Command("hello", "", {})
        document, at = {}, 4
        while at < len(body):
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


async def switch(fault, proxy, server, works):
    """Let the database fail, or work again."""
    if fault == "cut":
        await (proxy.open() if works else proxy.cut())
    elif fault == "silent":
        proxy.silent = not works
    elif fault == "election":
        proxy.answer = None if works else electing
    else:
        await asyncio.to_thread(server.start if works else server.kill)


# What a database that has a fault answers:


def electing(command, reply):
    """What a member of a replica set answers while the set elects a primary."""
    if "ismaster" in reply:
        reply = {name: reply[name] for name in reply.keys() - {"primary", "topologyVersion"}}
        return reply | {"isWritablePrimary": False, "ismaster": False, "secondary": True}
    # What was asked for may have happened all the same.
    labels = ["RetryableWriteError"]
    return {"ok": 0.0, "errmsg": "election", "code": 11602, "errorLabels": labels}


def not_acknowledging(times):
    """It stores the messages with these keys, and so many times it does not say so."""

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
        labels = ["RetryableWriteError"] if key == "91" else []  # the primary shuts down
        return reply | {"writeConcernError": error, "errorLabels": labels}

    return answer


def finding_nothing_by_key(command, reply):
    """It does not find out whether a message was stored before."""
    by_key = command.name == "find" and "'key':" in str(command.document["filter"])
    return {"ok": 0.0, "errmsg": "", "code": 50} if by_key else reply


def ending_early(lengths):
    """Its next pages of messages have so many, as after an election."""

    def answer(command, reply):
        if command[:2] == ("find", "messages") and lengths and reply["cursor"]["firstBatch"]:
            del reply["cursor"]["firstBatch"][lengths.pop(0) :]
        return reply

    return answer


def without_news(indexes):
    """Its change stream tells nothing; it checks this index first, for a message sent "twice"."""

    def answer(command, reply):
        if command.name == "getMore":
            reply["cursor"]["nextBatch"] = []
        for error in reply.get("writeErrors", ()):
            if command.document["documents"][error["index"]]["key"] == "twice" and indexes:
                error |= {"keyPattern": indexes.pop()}
        return reply

    return answer


def without_streams(command, reply):
    """It has no change streams, as Amazon DocumentDB can be set up."""
    refused = "$changeStream" in str(command.document.get("pipeline"))
    return {"ok": 0.0, "errmsg": "", "code": 40573} if refused else reply


# The kinds of WebSocket frames: https://www.rfc-editor.org/rfc/rfc6455#section-5.2
TEXT_FRAME, CLOSE_FRAME, PING_FRAME, PONG_FRAME = 1, 8, 9, 10


def handshake(person, query=""):
    """The request that opens a WebSocket."""
    lines = f"""GET /ws{query} HTTP/1.1
Host: 127.0.0.1
Cookie: {person.cookie()}
Connection: Upgrade
Upgrade: websocket
Sec-WebSocket-Version: 13
Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==

"""
    return lines.replace("\n", "\r\n").encode()


def client_frame(content, kind=TEXT_FRAME):
    """A short frame. Clients have to mask theirs; a mask of zeros leaves the content as it is."""
    assert len(content) < 126
    return bytes([0x80 | kind, 0x80 | len(content)]) + bytes(4) + content


def address(chat):
    """Where a chat listens."""
    return "127.0.0.1", urlsplit(chat.url).port


class RawClient:
    """A WebSocket made of a plain socket: it reads when a test tells it to, and at no other time.

    With `small` the kernel keeps little for it, so that what it leaves unread waits in the chat.
    """

    def __init__(self, person, after="new", small=False):
        self.socket, self.rate = socket.socket(), None
        self.socket.settimeout(PATIENCE)
        if small:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            with contextlib.suppress(OSError):  # macOS accepts it only later
                self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
        self.socket.connect(address(person.chat))
        self.socket.sendall(handshake(person, "" if after == "new" else f"?after={after}"))
        self.stream = self.socket.makefile("rb", 4096)
        status, *lines = [line.decode() for line in iter(self.stream.readline, b"\r\n")]
        assert status.startswith("HTTP/1.1 101 "), status
        self.headers = dict(line.strip().split(": ", 1) for line in lines)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stream.close()
        self.socket.close()

    def take(self, size):
        """The next bytes, at `rate` bytes a second if one is set."""
        taken = b""
        while len(taken) < size:
            piece = self.stream.read1(min(size - len(taken), 4096))
            if not piece:
                raise EOFError
            time.sleep(len(piece) / self.rate if self.rate else 0)
            taken += piece
        return taken

    def events(self):
        """The events that come until the connection is closed. Pings are among them."""
        kind = None
        while kind != CLOSE_FRAME:
            first, size = self.take(2)
            if size > 125:
                size = int.from_bytes(self.take(2 if size == 126 else 8), "big")
            kind, content = first & 15, self.take(size)
            if kind == TEXT_FRAME:
                yield from json.loads(content)
            elif kind == PING_FRAME:
                self.socket.sendall(client_frame(content, PONG_FRAME))
                yield {"type": "ping"}
        self.close_code = int.from_bytes(content[:2], "big")


def request(method, path, header="Accept: */*", body=b""):
    """A request as bytes."""
    head = f"{method} {path} HTTP/1.1\nHost: x\nContent-Length: {len(body)}\n{header}\n\n"
    return head.replace("\n", "\r\n").encode("latin-1") + body


async def first_line(chat, content):
    """The first line of the answer to bytes that no HTTP client would send."""
    reader, writer = await asyncio.open_connection(*address(chat))
    writer.write(content)
    with contextlib.closing(writer):
        return await asyncio.wait_for(reader.readline(), PATIENCE)


def open_connection(person):
    return socket.create_connection(address(person.chat), PATIENCE)


def open_websocket(person):
    return RawClient(person).socket


def ask_and_hang_up(person):
    """Ask for old messages, and do not wait for them: ten of these, a thousand times a second."""
    time.sleep(0.01)
    client = open_connection(person)
    client.sendall(request("GET", "/messages?before=99999", f"Cookie: {person.cookie()}"))
    client.shutdown(socket.SHUT_RDWR)
    return client


@contextlib.contextmanager
def flooding(connect, content, reads=True, connections=10):
    """Send the same again and again, as fast as the chat takes it, from other threads.

    `connect()` returns a connected socket. What was cut off connects again.
    """
    content *= max(65536 // len(content), 1)
    ended, sent = threading.Event(), Counter()

    def flood():
        while not ended.is_set():
            with contextlib.suppress(OSError, EOFError), connect() as client:
                client.setblocking(False)
                rest = content
                sent["times"] += 1
                while not ended.is_set():
                    can_read, can_write, _ = select.select([client] * reads, [client], [], 0.1)
                    if can_read and not client.recv(2**20):
                        break
                    if can_write:
                        size = client.send(rest)
                        rest = rest[size:] or content
                        sent["times"] += 1

    with ThreadPoolExecutor(connections) as pool:
        floods = [pool.submit(flood) for _ in range(connections)]
        try:
            yield
        finally:
            ended.set()
    for each in floods:
        each.result()
    assert sent["times"] > connections  # otherwise it was no flood
