"""Say something, say it again with the same key, say something else, and send an invalid message."""

import asyncio

from client import log_in


async def main():
    async with log_in("Ann") as session:
        ws = await session.ws_connect("/ws")
        print(await ws.receive_json())
        for key, text in [("1", "Hello!"), ("1", "Hello!"), ("2", "/me waves"), ("3", "   ")]:
            await ws.send_json({"text": text, "key": key})
            print(await ws.receive_json())


asyncio.run(main())
