"""What the other scripts share: how they reach a chat, and its database.

`python tutorial/scripts/say.py` talks to the chat on port 8080 (or PORT, if that is set), and
`python tutorial/scripts/say.py 8000` to the one on port 8000.
"""

import asyncio
import os
import re
import secrets
import sys
import tempfile
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pymongo

HERE = Path(__file__).resolve().parents[2]  # the folder of chat.py
PORT = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("PORT") or "8080"
URL = f"http://127.0.0.1:{PORT}"


@asynccontextmanager
async def sign_up(name, url=URL):
    """The HTTP session of a new user. The login gets a random end, so it is not yet taken."""
    jar = aiohttp.CookieJar(unsafe=True)  # "unsafe": accept cookies from an IP address
    form = {"login": f"{name}_{secrets.token_hex(2)}", "password": "long enough"}
    async with aiohttp.ClientSession(url, cookie_jar=jar) as session:
        try:
            await session.post("/signup", data=form)  # the naive chat knows no users: 404
        except aiohttp.ClientConnectorError:
            sys.exit(f"Nothing listens on {url}. Start the chat first.")
        yield session


async def next_events(ws, *types):
    """Wait for the next frame that has events of these types: those events."""
    events = []
    while not events:
        received = await ws.receive_json()
        # chat.py sends a list of events in a frame, and the naive chat one message.
        received = received if isinstance(received, list) else [received]
        events = [event for event in received if event.get("type", "message") in types]
    return events


@asynccontextmanager
async def own_chat():
    """Start a chat on a free port, with its data in a temporary folder: its process, its URL."""
    with tempfile.TemporaryDirectory() as folder:
        code = f"import chat, pathlib; chat.DATA = pathlib.Path({folder!r}); chat.main()"
        settings = {"PORT": "0", "MONGODB_URI": ""}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", code),
            cwd=HERE,
            env=os.environ | settings,
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            printed = await process.stdout.readuntil(b"Press CTRL+C")
            yield process, re.search("http://[0-9.:]+", printed.decode())[0]
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()


def database():
    """The database of the chat that runs beside this folder, or the one that MONGODB_URI names."""
    try:
        uri = os.environ.get("MONGODB_URI") or (HERE / "data" / "database-uri").read_text()
        client = pymongo.MongoClient(uri, serverSelectionTimeoutMS=3000)
        client.admin.command("ping")
    except (OSError, pymongo.errors.PyMongoError):
        sys.exit("The chat's database does not answer. Start the chat first.")
    return client.get_default_database("chat")
