"""Ann's connection breaks before she hears whether her message has arrived. She sends it again."""

import asyncio
import time

from client import next_events, sign_up


async def main():
    text = f"It is {time.time()}."  # another one each time
    message = {"user": "Ann", "text": text, "key": text}
    seen = 0
    async with sign_up("Ben") as ben, sign_up("Ann") as ann:
        bens_ws = await ben.ws_connect("/ws")
        for _ in range(2):
            async with ann.ws_connect("/ws") as ws:
                await ws.send_json(message)
                await asyncio.sleep(0.5)  # it arrives, but Ann does not read the answer
        try:
            async with asyncio.timeout(1):
                while True:
                    events = await next_events(bens_ws, "message")
                    seen += [event["text"] for event in events].count(text)
        except TimeoutError:
            print("Ann has sent it twice. Ben has seen it", ["never.", "once.", "twice."][seen])


asyncio.run(main())
