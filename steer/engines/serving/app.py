"""The doors of the server: what comes in is read, what the engine writes goes out, and who goes away is let go."""

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from steer.engines.serving.answers import LAST, Answer, event, refusal
from steer.engines.serving.service import Service
from steer.engines.serving.tickets import Engine, Piece, Refused, Ticket

if TYPE_CHECKING:
    import fastapi

LARGEST = 4 * 2**20  # bytes of a body
_PATIENCE = 60.0  # seconds, for what the engine tells between two tokens
_GONE = 499  # as nginx has it; nobody reads it
Door = Callable[["fastapi.Request"], Awaitable[Any]]


def application(service: Service, engine: Engine, *, api_key: str | None = None) -> "fastapi.FastAPI":
    """The server as an ASGI application."""
    from fastapi import FastAPI

    doors = _Doors(service, engine)
    lost: dict[int | type[Exception], Any] = {404: _lost, 405: _lost}
    app = FastAPI(title="steer serve", openapi_url=None, docs_url=None, redoc_url=None, exception_handlers=lost)
    for path, method, door in (
        ("/v1/chat/completions", "POST", doors.chat),
        ("/v1/completions", "POST", doors.completions),
        ("/v1/models", "GET", doors.models),
        ("/thinksteer/recipes", "GET", doors.recipes),
        ("/thinksteer/fired", "GET", doors.fired),
    ):
        app.add_route(path, _guarded(door, api_key), methods=[method])
    app.add_route("/health", _guarded(doors.health, None), methods=["GET"])
    return app


class _Doors:
    def __init__(self, service: Service, engine: Engine) -> None:
        self.service, self.engine, self.began = service, engine, int(time.time())

    async def chat(self, request: "fastapi.Request") -> Any:
        return await self._asked(request, chat=True)

    async def completions(self, request: "fastapi.Request") -> Any:
        return await self._asked(request, chat=False)

    async def models(self, request: "fastapi.Request") -> Any:  # noqa: ARG002
        model = {"id": self.service.name, "object": "model", "created": self.began, "owned_by": "thinksteer"}
        return _json({"object": "list", "data": [{**model, "max_model_len": self.service.positions}]})

    async def recipes(self, request: "fastapi.Request") -> Any:  # noqa: ARG002
        return _json({"object": "list", "data": self.service.facts})

    async def fired(self, request: "fastapi.Request") -> Any:  # noqa: ARG002
        asked = asyncio.wrap_future(self.engine.touched())
        try:
            told = await asyncio.wait_for(asked, _PATIENCE)
        except TimeoutError:
            raise Refused("The engine is busy with a long prompt. Ask again later.", status=503) from None
        return _json({"recipes": {name: [row.to_dict() for row in rows] for name, rows in told.items()}})

    async def health(self, request: "fastapi.Request") -> Any:  # noqa: ARG002
        return _json({"status": "ok"})

    async def _asked(self, request: "fastapi.Request", *, chat: bool) -> Any:
        from fastapi.responses import StreamingResponse

        raw = await _body(request)
        body, asked = await asyncio.to_thread(self.service.read, raw, chat=chat)
        pieces: asyncio.Queue[Piece] = asyncio.Queue()
        ticket, answer = Ticket(asked, _into(pieces)), Answer(self.service, body, asked)
        self.engine.submit(ticket)
        if body.stream:
            stream = StreamingResponse(_stream(answer, pieces), media_type="text/event-stream")
            return _Leaving(stream, ticket)
        try:
            return await _while_here(request, _whole(answer, pieces))
        finally:
            ticket.leave()


async def _whole(answer: Answer, pieces: "asyncio.Queue[Piece]") -> Any:
    while isinstance(piece := await pieces.get(), int):
        answer.ids.append(piece)
    if isinstance(piece, Refused):
        raise piece
    return _json(answer.whole(piece))


async def _stream(answer: Answer, pieces: "asyncio.Queue[Piece]") -> AsyncIterator[str]:
    yield answer.first()
    reader = answer.reader()
    while isinstance(piece := await pieces.get(), int):
        for chunk in answer.chunks(reader, piece):
            yield chunk
    if isinstance(piece, Refused):
        yield event(refusal(piece))
        yield LAST
        return
    for chunk in answer.last(reader, piece):
        yield chunk


class _Leaving:
    """A response, and whatever becomes of it, its row ends with it."""

    def __init__(self, response: Any, ticket: Ticket) -> None:
        self.response, self.ticket = response, ticket

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await self.response(scope, receive, send)
        finally:
            self.ticket.leave()


async def _while_here(request: "fastapi.Request", work: Awaitable[Any]) -> Any:
    """What comes of it, unless the client goes away first."""
    from fastapi.responses import Response

    done, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({done, gone}, return_when=asyncio.FIRST_COMPLETED)
        return done.result() if done.done() else Response(status_code=_GONE)
    finally:
        done.cancel()
        gone.cancel()


async def _disconnected(request: "fastapi.Request") -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _body(request: "fastapi.Request") -> bytes:
    """Raises Refused for one that is too large, before all of it is read."""
    raw = bytearray()
    async for part in request.stream():
        raw += part
        if len(raw) > LARGEST:
            raise Refused(f"The body has more than {LARGEST:,} bytes, which is all that is read.")
    return bytes(raw)


def _into(pieces: "asyncio.Queue[Piece]") -> Callable[[Piece], None]:
    loop = asyncio.get_running_loop()

    def deliver(piece: Piece) -> None:
        with suppress(RuntimeError):  # the loop has ended, and with it whoever listened
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

    return deliver


def _guarded(door: Door, api_key: str | None) -> Door:
    """A door that asks for the key first, and tells a refusal as what it is."""

    async def guarded(request: "fastapi.Request") -> Any:
        try:
            if api_key is not None:
                _check_key(request, api_key)
            return await door(request)
        except Refused as refused:
            return _json(refusal(refused), refused.status)

    return guarded


def _check_key(request: "fastapi.Request", api_key: str) -> None:
    given = request.headers.get("authorization", "")
    if not hmac.compare_digest(given.encode(), f"Bearer {api_key}".encode()):
        raise Refused("The API key is missing or wrong: send it as Authorization: Bearer KEY.", status=401)


async def _lost(request: "fastapi.Request", error: Any) -> Any:
    status = int(error.status_code)
    why = "There is no" if status == 404 else f"{request.method} is not for"
    return _json(refusal(Refused(f"{why} {request.url.path[:200]} here.", status=status)), status)


def _json(fields: Any, status: int = 200) -> Any:
    from fastapi.responses import Response

    return Response(json.dumps(fields, allow_nan=False), status, media_type="application/json")
