"""Start a chat, connect three people to it, and send it SIGTERM."""

import asyncio
import time
from contextlib import AsyncExitStack

from client import own_chat, sign_up


async def main():
    async with AsyncExitStack() as stack:
        chat, url = await stack.enter_async_context(own_chat())
        connections = []
        for name in ("Ann", "Ben", "Carl"):
            session = await stack.enter_async_context(sign_up(name, url))
            connections.append(await session.ws_connect("/ws"))
        start = time.monotonic()
        chat.terminate()
        for ws in connections:
            async for _ in ws:
                pass  # until it is closed
        print("Ann, Ben and Carl: closed with code", *[ws.close_code for ws in connections])
        status = await chat.wait()
        seconds = time.monotonic() - start
        print(f"The chat has ended with status {status}, after {seconds:.1f} seconds")


asyncio.run(main())
