"""A client that hangs up during a call cancels it: the SDK does not look while it prepares a JSON answer."""

from __future__ import annotations

import anyio
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class CancelWhenClientLeaves:
    """An ASGI application whose requests end with their connection."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection event."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        left = anyio.Event()
        all_read = False

        async def watch() -> None:
            # After the body there is only the end of the connection to hear of.
            await receive()
            left.set()
            tasks.cancel_scope.cancel()

        async def watched() -> Message:
            nonlocal all_read
            if all_read:
                await left.wait()
                return {"type": "http.disconnect"}
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body", False):
                all_read = True
                tasks.start_soon(watch)
            return message

        async with anyio.create_task_group() as tasks:
            await self._app(scope, watched, send)
            tasks.cancel_scope.cancel()
