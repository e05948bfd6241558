"""50 windows send a message each, all within 25 milliseconds. How many come back in a frame?"""

import asyncio
import time

from client import next_events, sign_up


async def say(window, number):
    await asyncio.sleep(number / 2000)
    await window.send_json({"text": f"message {number}"})


async def main():
    async with sign_up("Ann") as session:
        windows = [await session.ws_connect("/ws") for _ in range(50)]
        start = time.monotonic()
        await asyncio.gather(*(say(window, number) for number, window in enumerate(windows)))
        batches = []
        while sum(batches) < 50:
            batches.append(len(await next_events(windows[0], "message")))
        print("batches:", batches)
        print(f"all 50 shown within {1000 * (time.monotonic() - start):.0f} ms")


asyncio.run(main())
