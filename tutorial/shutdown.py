"""Start a second process on the database of the first, connect to it, and send it SIGTERM."""

import asyncio
import os
import re
import sys

import client


async def main():
    settings = {"PORT": "0", "MONGODB_URI": client.database_uri()}
    chat = await asyncio.create_subprocess_exec(
        sys.executable, "chat.py", env=os.environ | settings, stdout=asyncio.subprocess.PIPE
    )
    printed = await chat.stdout.readuntil(b"Press CTRL+C")
    client.URL = re.search("http://[0-9.:]+", printed.decode())[0]
    async with client.log_in("Dora") as session:
        ws = await session.ws_connect("/ws")
        chat.terminate()
        async for _ in ws:
            pass
        print("The connection was closed with code", ws.close_code)
        print("The process has ended with status", await chat.wait())


asyncio.run(main())
