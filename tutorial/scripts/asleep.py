"""Carl's computer sleeps: his connection is open, but nobody reads. Can Ann still chat?"""

import asyncio
import socket
import sys
import time

from client import URL, next_events, own_chat, sign_up

TEXT = "💤" * 2000  # long messages fill the buffers sooner


async def chat_beside_a_sleeper(url):
    async with sign_up("Carl", url) as carl, sign_up("Ann", url) as ann:
        sleeper = await carl.ws_connect("/ws")  # from here on, Carl reads nothing
        # Make one of the buffers on the way small: then it is full sooner.
        sleeper.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        ws = await ann.ws_connect("/ws")
        start, seen, slowest, carl_has_left = time.monotonic(), 0, 0, False
        while not carl_has_left:
            sent, texts = time.monotonic(), []
            try:
                async with asyncio.timeout(3):
                    await ws.send_json({"user": "Ann", "text": TEXT})
                    while TEXT not in texts:
                        events = await next_events(ws, "message", "left")
                        texts += [event.get("text") for event in events]
                        carl_has_left |= any(event.get("type") == "left" for event in events)
            except TimeoutError:
                print(f"Ann has seen {seen} messages. Then nothing came for 3 seconds.")
                return
            seen += 1
            if seen == 3000:
                sys.exit("Carl was not disconnected. (Start the naive chat again, and try again.)")
            slowest = max(slowest, time.monotonic() - sent)
            await asyncio.sleep(0.03)
        print(f"Carl was disconnected after {time.monotonic() - start:.0f} seconds.")
        print(f"Ann has seen all of her {seen} messages, the slowest after {slowest:.2f} seconds.")


async def main():
    if len(sys.argv) > 1:  # a port: that of the naive chat, for example
        await chat_beside_a_sleeper(URL)
    else:  # so many messages would be a nuisance in yours
        async with own_chat() as (_, url):
            await chat_beside_a_sleeper(url)


asyncio.run(main())
