"""How the other scripts in this folder reach a chat, and its database.

`python tutorial/say.py` talks to the chat on port 8080 (or PORT, if that is set), and
`python tutorial/say.py 8000` to the one on port 8000.
"""

import os
import sys
from contextlib import asynccontextmanager

import aiohttp
import pymongo

PORT = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("PORT", "8080")
URL = f"http://127.0.0.1:{PORT}"


@asynccontextmanager
async def log_in(user):
    """The HTTP session of a user, who signs up the first time. At its end, connections are cut."""
    jar = aiohttp.CookieJar(unsafe=True)  # "unsafe": accept cookies from an IP address
    form = {"login": user, "password": "long enough"}
    async with aiohttp.ClientSession(URL, cookie_jar=jar) as session:
        try:
            await session.post("/signup", data=form)
        except aiohttp.ClientConnectorError:
            sys.exit(f"Nothing listens on {URL}. Start the chat first.")
        answer = await session.post("/login", data=form)
        if answer.status == 401:
            sys.exit(f"{user} has another password here. Stop the chat, run rm -r data, start it.")
        yield session


async def next_texts(ws):
    """Wait for the next frame that has messages: their texts."""
    texts = []
    while not texts:
        received = await ws.receive_json()
        # The naive chat sends one message in a frame, and chat.py a list of events.
        events = received if isinstance(received, list) else [received]
        for event in events:
            if event.get("type") == "error":
                sys.exit(event["text"])
        texts = [event["text"] for event in events if "user" in event and "text" in event]
    return texts


def database_uri():
    """The URI of the chat's database, which `export DB=...` has set."""
    if "DB" not in os.environ:
        sys.exit(
            "First run: export DB=... with the URL of the database, as the chat has printed it"
        )
    return os.environ["DB"]


def database():
    """The chat's database."""
    mongo = pymongo.MongoClient(database_uri(), serverSelectionTimeoutMS=3000)
    try:
        mongo.admin.command("ping")
    except pymongo.errors.PyMongoError:
        sys.exit(
            f"No database at {database_uri()}. Run export DB=... with the URL of the running one"
        )
    return mongo.get_default_database("chat")
