"""A page on this machine that asks a model before and after an update, in two columns.

The server listens on the loopback address alone and keeps and logs nothing: the page sends the conversation along with
each question. One question is answered at a time; others wait.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib import resources
from typing import TYPE_CHECKING, Any

from markupsafe import Markup
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from forgetlearn.errors import ConfigError, check_installed
from forgetlearn.facts.touched import stands
from forgetlearn.products.side_by_side import Answer, SideBySide
from forgetlearn.report.render import render

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from uvicorn import Server

HOST, NAMES = "127.0.0.1", ("127.0.0.1", "localhost")
MOST_BYTES = 1 << 20  # of a question with its conversation
Event = Mapping[str, object]  # a line of the answer's stream
Message = MutableMapping[str, Any]
SAFE = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class Asked(BaseModel):
    """What the page sends: a question, and each side's turns before it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    question: str = Field(min_length=1)
    turns: dict[str, list[str]] = {}

    @field_validator("turns")
    @classmethod
    def _of_both_sides(cls, turns: dict[str, list[str]], info: ValidationInfo) -> dict[str, list[str]]:
        sides = (info.context or {})["sides"]
        if not set(turns) <= set(sides) or any(len(own) % 2 for own in turns.values()):
            raise ValueError(f"must be questions, each with its answer, of {' and '.join(sides)}")
        return turns


def check_extra() -> None:
    """Raise MissingExtraError unless what `serve` needs is installed."""
    for package in ("starlette", "uvicorn"):
        check_installed(package, "serve", "serve")


def bind(port: int) -> socket.socket:
    """Return a socket that listens on a port of the loopback address, 0 for a free one; raise ConfigError if taken."""
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((HOST, port))
        listening.listen()  # else another process could still take the port
    except OSError as error:
        listening.close()
        raise ConfigError(f"--port {port}: {error.strerror}. Give another, or 0 for a free one.") from error
    return listening


def serve(pair: SideBySide, listening: socket.socket, ready: Callable[[str], None]) -> None:
    """Serve the page on such a socket until Ctrl-C or SIGTERM; `ready` gets its address."""
    port = listening.getsockname()[1]
    server = server_of(pair, port)
    ready(f"http://{HOST}:{port}/")
    with listening, suppress(KeyboardInterrupt):  # uvicorn has ended cleanly and raises it again
        server.run(sockets=[listening])


def server_of(pair: SideBySide, port: int) -> Server:
    """Return the server of a page, which logs nothing."""
    import uvicorn

    config = uvicorn.Config(
        application(pair, port, ending=lambda: server.should_exit),
        http="h11",
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=10,  # an answer that is being written ends at its next token
    )
    server = uvicorn.Server(config)
    return server


def application(pair: SideBySide, port: int, ending: Callable[[], bool]) -> Starlette:
    """Return the application: the page at `/`, and at `/answer` a stream of events, a JSON object a line.

    Requests under another name than this machine's (DNS rebinding), or from another page, are refused. Answers stop
    when `ending` says that the server ends.
    """
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.responses import HTMLResponse, JSONResponse, StreamingResponse
    from starlette.routing import Route

    html, policy = page(pair)
    desk = Desk(pair, ending)

    async def show(_request: Request) -> Response:
        return HTMLResponse(html, headers={"Content-Security-Policy": policy})

    async def answer(request: Request) -> Response:
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return JSONResponse({"error": "Send JSON."}, 415)  # a form of another page could send anything else
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > MOST_BYTES:
                return JSONResponse({"error": f"The conversation has more than {MOST_BYTES} bytes. Clear it."}, 413)
        try:
            asked = Asked.model_validate_json(bytes(body), context={"sides": pair.sides})
        except ValidationError as error:
            first = error.errors()[0]
            return JSONResponse({"error": f"{'.'.join(map(str, first['loc']))}: {first['msg']}"}, 400)
        return StreamingResponse(desk.answer(asked), media_type="application/x-ndjson")

    routes = [Route("/", show), Route("/answer", answer, methods=["POST"])]
    return Starlette(routes=routes, middleware=[Middleware(Guard, port=port)])


def page(pair: SideBySide) -> tuple[str, str]:
    """Return the page, with its style and script inlined, and the policy that forbids everything else."""
    templates = resources.files("forgetlearn.report") / "templates"
    texts = {name: templates.joinpath(name).read_text("utf-8") for name in ("page.css", "chat.css", "chat.js")}
    style, script = texts["page.css"] + texts["chat.css"], texts["chat.js"]
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    policy = (
        f"default-src 'none'; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    # Style and script are the package's own files, so they are not escaped.
    inlined = {"style": Markup(style), "script": Markup(script)}
    return render("chat.html.j2", {"pair": pair, **inlined}), policy


class Guard:
    """Refuses requests under another name or from another page, and adds the headers of SAFE to every response."""

    def __init__(self, app: Callable[..., Any], port: int) -> None:
        self.app = app
        self.hosts = {f"{name}:{port}" for name in NAMES}
        self.origins = {f"http://{host}" for host in self.hosts}

    async def __call__(self, scope: Message, receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        """Answer a request, or pass it on."""
        from starlette.datastructures import Headers, MutableHeaders
        from starlette.responses import PlainTextResponse

        async def safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(SAFE)
            await send(message)

        headers = Headers(scope=scope)
        host, origin = headers.get("host"), headers.get("origin")
        foreign = host not in self.hosts or (origin is not None and origin not in self.origins)
        respond = PlainTextResponse("This page answers on this machine only.", 403) if foreign else self.app
        await respond(scope, receive, safely)


class Desk:
    """Answers one question at a time, in a thread of its own."""

    def __init__(self, pair: SideBySide, ending: Callable[[], bool]) -> None:
        self.pair, self.ending = pair, ending
        self._thread = ThreadPoolExecutor(1, "answers")
        self._n_open = 0  # questions that are answered or wait

    async def answer(self, asked: Asked) -> AsyncIterator[str]:
        """Yield the events of an answer, a line each. It stops if nobody listens any more."""
        queue: asyncio.Queue[Event | None] = asyncio.Queue()
        unheard = threading.Event()
        loop = asyncio.get_running_loop()

        def put(event: Event | None) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, event)

        self._n_open += 1
        if self._n_open > 1:
            put({"waiting": True})
        self._thread.submit(self._work, asked, put, lambda: unheard.is_set() or self.ending())
        try:
            while (event := await queue.get()) is not None:
                yield json.dumps(event) + "\n"
        finally:
            unheard.set()
            self._n_open -= 1

    def _work(self, asked: Asked, put: Callable[[Event | None], None], stopped: Callable[[], bool]) -> None:
        """Ask both sides and say which facts the question touches; put None at the end."""
        with suppress(RuntimeError):  # the loop is closed: the server ended meanwhile
            try:
                answers = {side: self._ask(side, asked, put, stopped) for side in self.pair.sides if not stopped()}
                if len(answers) == len(self.pair.sides):
                    put({"facts": self._facts(asked.question, answers)})
            except Exception as error:  # whatever it is, the page says so, and the next question is answered
                put({"error": f"{type(error).__name__}: {error}"})
            put(None)

    def _ask(self, side: str, asked: Asked, put: Callable[[Event | None], None], stopped: Callable[[], bool]) -> Answer:
        turns = [*asked.turns.get(side, []), asked.question]
        found = self.pair.answer(side, turns, lambda piece: put({"side": side, "text": piece}), stopped)
        put({"side": side, "ending": found.ending, "note": found.note})
        return found

    def _facts(self, question: str, answers: Mapping[str, Answer]) -> list[Event]:
        return [
            {
                "prompt": fact.prompt,
                "old": fact.ground_truth,
                "new": fact.target_new,
                "says": {side: stands(answer.text, fact) for side, answer in answers.items()},
            }
            for fact in self.pair.touched(question)
        ]
