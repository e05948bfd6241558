"""The chat that everybody writes first. Chapter 1 breaks it, and the other chapters repair it."""

import sys

from aiohttp import web

PAGE = """<!DOCTYPE html>
<title>A naive chat</title>
<form>
    <input id="user" placeholder="Your name">
    <input id="text" placeholder="Your message">
    <button>Send</button>
</form>
<div id="messages"></div>
<script>
    const socket = new WebSocket(`ws://${location.host}/ws`);
    socket.onmessage = (event) => {
        const message = JSON.parse(event.data);
        messages.innerHTML += `<p><b>${message.user}</b>: ${message.text}</p>`;
    };
    document.forms[0].onsubmit = () => {
        socket.send(JSON.stringify({user: user.value, text: text.value}));
        text.value = "";
        return false;
    };
</script>
"""

clients = []
history = []


async def page(request):
    return web.Response(text=PAGE, content_type="text/html")


async def websocket(request):
    ws = web.WebSocketResponse()
    await ws.prepare(request)
    for message in history:
        await ws.send_json(message)
    clients.append(ws)
    try:
        async for frame in ws:
            message = frame.json()
            history.append(message)
            for client in clients:
                await client.send_json(message)
    finally:
        clients.remove(ws)
    return ws


app = web.Application()
app.add_routes([web.get("/", page), web.get("/ws", websocket)])

if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8000
    # Without shutdown_timeout, Ctrl-C would wait until nobody is connected any more.
    web.run_app(app, host="127.0.0.1", port=port, shutdown_timeout=0.1)
