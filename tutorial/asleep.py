"""Carl's computer sleeps: his connection is open, but nobody reads. Can Ann still chat?"""

import asyncio
import socket

from client import log_in, next_texts

TEXT = "💤" * 2000  # long messages fill the buffers sooner


async def main():
    async with log_in("Carl") as carl, log_in("Ann") as ann:
        sleeper = await carl.ws_connect("/ws")
        # Make one of the buffers on the way small: then it is full sooner.
        sleeper.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        ws = await ann.ws_connect("/ws")
        seen = 0
        try:
            while seen < 300:
                async with asyncio.timeout(3):
                    await ws.send_json({"user": "Ann", "text": TEXT})
                    while TEXT not in await next_texts(ws):
                        pass
                seen += 1
        except TimeoutError:
            print("Nothing has come for 3 seconds.")
        print(f"Ann has seen {seen} of 300 messages.")


asyncio.run(main())
