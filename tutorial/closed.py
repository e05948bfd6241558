"""Connect, and wait until the server closes the connection. Which code does it give?"""

import asyncio

from client import log_in


async def main():
    async with log_in("Ann") as session:
        ws = await session.ws_connect("/ws")
        async for _ in ws:
            pass
        print("The server has closed the connection with code", ws.close_code)


asyncio.run(main())
