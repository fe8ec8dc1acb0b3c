"""The server, started and ended: an engine by its name, a socket, and what a signal does."""

import asyncio
import signal
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING

from steer.engines.serving.app import application
from steer.engines.serving.batches import Worker
from steer.engines.serving.service import Service
from steer.engines.serving.tickets import Engine

if TYPE_CHECKING:
    import uvicorn

_GRACE, _CLOSING = 0.5, 3  # seconds: for those who ask while it ends, and for connections to close


def _transformers(service: Service, max_batch: int) -> Engine:
    return Worker(service.model, service.recipes, max_batch)


# By the name that --engine has: what makes one, of a service and of how many rows it may write at once.
ENGINES: Mapping[str, Callable[[Service, int], Engine]] = {"transformers": _transformers}


@dataclass(frozen=True)
class Address:
    """Where a server listens, and the key that it wants, if any. Port 0 is one that is free.

    >>> from steer.engines.serving import Address
    >>> Address(port=0)
    Address(host='127.0.0.1', port=0)
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and self.api_key):
            raise ValueError("The API key must be of letters that a header can hold, at least one.")


def missing() -> list[str]:
    """The libraries of a web server that are not installed.

    >>> from steer.engines.serving import missing
    >>> set(missing()) <= {"fastapi", "uvicorn"}
    True
    """
    return [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]


def check_installed() -> None:
    """Raise ImportError where a library of a web server is missing.

    >>> from steer.engines.serving import check_installed
    >>> try:
    ...     check_installed()
    ... except ImportError as error:
    ...     told = str(error)  # Serving needs fastapi and uvicorn: pip install 'thinksteer[serve]'.
    """
    if lost := missing():
        raise ImportError(f"Serving needs {' and '.join(lost)}: pip install 'thinksteer[serve]'.")


def serve(
    service: Service,
    address: Address,
    *,
    engine: str = "transformers",
    max_batch: int = 32,
    ready: Callable[[str], None] = lambda url: None,  # noqa: ARG005
) -> None:
    """Serve until a signal ends it, TERM or INT; `ready` is told the address when it listens.

    Raises ImportError where fastapi or uvicorn is not installed, and ValueError for an engine that is unknown, or an
    address that cannot be listened at.

    >>> from probes import load
    >>> from steer.engines.serving import Address, Service, serve
    >>> model = load("organism")
    >>> serve(Service("organism", model, {}), Address(), engine="vroom")
    Traceback (most recent call last):
        ...
    ValueError: 'vroom' is no engine. Known: transformers.
    """
    if engine not in ENGINES:
        raise ValueError(f"{engine!r} is no engine. Known: {', '.join(ENGINES)}.")
    check_installed()
    with listening(address) as listener:
        made = ENGINES[engine](service, max_batch)
        try:
            server = server_of(service, made, address)
            asyncio.run(_until_told(server, listener, made, ready))
        finally:
            made.close()
            made.join(_CLOSING)


def listening(address: Address) -> socket.socket:
    """A socket at the address. Raises ValueError where there can be none."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        return socket.create_server((address.host, address.port), family=family)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(
            f"Nobody can listen at {address.host}:{address.port} ({why}). Give another --host or --port."
        ) from error


def server_of(service: Service, engine: Engine, address: Address) -> "uvicorn.Server":
    """The web server over an engine, not yet running."""
    import uvicorn

    app = application(service, engine, api_key=address.api_key)
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=_CLOSING,
        )
    )


async def _until_told(
    server: "uvicorn.Server", listener: socket.socket, engine: Engine, ready: Callable[[str], None]
) -> None:
    running, loop = asyncio.ensure_future(server.serve(sockets=[listener])), asyncio.get_running_loop()

    def leave() -> None:
        server.should_exit = True

    def stop() -> None:
        server.force_exit = server.should_exit  # told twice
        engine.close()
        loop.call_later(_GRACE, leave)

    while not (server.started or running.done()):
        await asyncio.sleep(0.01)
    if threading.current_thread() is threading.main_thread():
        for sign in (signal.SIGTERM, signal.SIGINT):
            with suppress(NotImplementedError):  # where a loop takes no signals, the web server does
                loop.add_signal_handler(sign, stop)
    host, port = listener.getsockname()[:2] if listener.fileno() >= 0 else ("", 0)
    ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")
    await running
