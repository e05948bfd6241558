"""Ann's connection breaks before she hears whether her message has arrived. She sends it again."""

import asyncio
import time

from client import log_in, next_texts


async def main():
    text = f"It is {time.time()}."  # another one each time
    message = {"user": "Ann", "text": text, "key": text}
    seen = 0
    async with log_in("Ben") as ben:
        bens_ws = await ben.ws_connect("/ws")
        for _ in range(2):
            async with log_in("Ann") as ann:
                ws = await ann.ws_connect("/ws")
                await ws.send_json(message)
                await asyncio.sleep(0.5)  # the message arrives, but Ann hears of nothing
        try:
            async with asyncio.timeout(1):
                while True:
                    seen += (await next_texts(bens_ws)).count(text)
        except TimeoutError:
            print("Ann has sent it twice. Ben has seen it", ["never.", "once.", "twice."][seen])


asyncio.run(main())
