"""Send a script as a message, and look at the page that the others get."""

import asyncio

from client import next_events, sign_up


async def main():
    async with sign_up("Mallory") as session:
        ws = await session.ws_connect("/ws")
        await ws.send_json({"text": "<script>alert('hi')</script>"})
        await next_events(ws, "message")
        page = await (await session.get("/")).text()
        print([line.strip() for line in page.splitlines() if "alert(" in line][-1])


asyncio.run(main())
