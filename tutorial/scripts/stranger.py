"""Ann is logged in, and visits another site. May a script of that site connect to her chat?"""

import asyncio

import aiohttp
from client import sign_up


async def main():
    async with sign_up("Ann") as session:
        try:
            await session.ws_connect("/ws", origin="http://evil.example")
        except aiohttp.WSServerHandshakeError as error:
            print("Refused:", error.status)
        else:
            print("Connected: evil.example can read the chat, and write in it.")


asyncio.run(main())
