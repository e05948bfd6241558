"""Say something, again with the same key, then without a key, and send an invalid message."""

import asyncio

from client import log_in


async def main():
    async with log_in("Ann") as session:
        ws = await session.ws_connect("/ws")
        print(await ws.receive_json())
        for key, text in [("1", "Hello!"), ("1", "Hello!"), (None, "/me waves"), ("2", "   ")]:
            await ws.send_json({"text": text, "key": key})
            print(await ws.receive_json())


asyncio.run(main())
