"""Mallory sends nonsense without pause, four times. Can Ann chat? (With a chat of its own.)"""

import asyncio
import time

from client import next_events, own_chat, sign_up


async def flood(ws):
    while True:
        for _ in range(1000):
            await ws.send_str("")
        await asyncio.sleep(0)  # let the tasks of this script run, too


async def read(ws):
    async for _ in ws:
        pass


async def main():
    async with (
        own_chat() as (_, url),
        sign_up("Mallory", url) as mallory,
        sign_up("Ann", url) as ann,
    ):
        ws = await ann.ws_connect("/ws")
        floods = [await mallory.ws_connect("/ws") for _ in range(4)]
        tasks = [asyncio.create_task(each(ws)) for ws in floods for each in (flood, read)]
        seen, slowest = 0, 0.0
        try:
            while seen < 20:
                start = time.monotonic()
                async with asyncio.timeout(5):
                    await ws.send_json({"text": "Hello!"})
                    await next_events(ws, "message")
                seen += 1
                slowest = max(slowest, time.monotonic() - start)
            print(
                f"Ann has seen all of her {seen} messages, the slowest after {slowest:.2f} seconds."
            )
        except TimeoutError:
            print(f"Ann has seen {seen} messages. Then nothing came for 5 seconds.")
        for task in tasks:
            task.cancel()


asyncio.run(main())
