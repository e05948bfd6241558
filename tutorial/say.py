"""Say something, say it again with the same key, and then send an invalid message."""

import asyncio

from client import log_in


async def main():
    async with log_in("Ann") as session:
        ws = await session.ws_connect("/ws")
        print(await ws.receive_json())
        for text in ("Hello!", "Hello!", "   "):
            await ws.send_json({"text": text, "key": "1"})
            print(await ws.receive_json())


asyncio.run(main())
