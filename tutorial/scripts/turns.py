"""Two coroutines take turns."""

import asyncio


async def count(name):
    for number in (1, 2, 3):
        print(name, number)
        await asyncio.sleep(0.1)


async def main():
    task = asyncio.create_task(count("Ben"))
    await count("Ann")
    await task


asyncio.run(main())
