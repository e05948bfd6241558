"""Say something, again with the same key, then without a key, and send an invalid message."""

import asyncio

from client import next_events, sign_up


async def main():
    async with sign_up("Ann") as session:
        ws = await session.ws_connect("/ws")
        print(await next_events(ws, "online"))
        for key, text in [("1", "Hello!"), ("1", "Hello!"), (None, "/me waves"), ("2", "   ")]:
            await ws.send_json({"text": text, "key": key})
            print(await next_events(ws, "message", "error"))


asyncio.run(main())
