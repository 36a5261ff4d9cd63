"""The web server: the chat page, its streaming protocol, and OpenAI's chat completions, over engines in other processes."""

import asyncio
import base64
import hashlib
import re
import secrets
import socket
import time
import uuid
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import uvicorn
from fastapi import FastAPI, Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException

from nanochat import api
from nanochat.answer import join_pieces
from nanochat.common import UserError
from nanochat.engine import Request, prompt_limit
from nanochat.replica import Replica
from nanochat.service import Guard, Refusal, Service, Settings, log, prometheus, refusal_response

PAGE = Path(__file__).with_name("ui.html")
NO_BUFFER = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # also for proxies in between
FAILURES = ("error", "shutdown")  # ends that the only piece of the event explains
FINISH_REASONS = {"stop": "stop", "length": "length", "context": "length"}  # ours -> OpenAI's


class Exchange:
    """One HTTP request for an answer, or several: its prompt, its tickets, and what is logged of it."""

    def __init__(self, service: Service, http: HttpRequest, body: api.Conversation, max_tokens: int | None, n: int,
                 may_forget: bool):
        settings, tokenizer = service.settings, service.tokenizer
        self.service, self.http, self.body = service, http, body
        turns = body.turns()
        max_tokens = max_tokens or settings.max_tokens
        limit = prompt_limit(service.context, max_tokens) if may_forget else service.context - 1
        self.prompt, kept, tokens = tokenizer.fit_conversation(turns, limit)
        if not may_forget and (len(kept) < len(turns) or tokens > limit):
            raise Refusal(400, f"the conversation does not fit into the context of {service.context} tokens: shorten it, or "
                               "leave out its oldest messages", "messages", "context_length_exceeded")
        self.forgotten, self.cut = (len(turns) - len(kept)) // 2, max(0, tokens - limit)
        seed = secrets.randbits(48) if body.seed is None else body.seed

        def default(value, otherwise):
            return otherwise if value is None else value

        requests = [Request(self.prompt, max_tokens, float(default(body.temperature, settings.temperature)),
                            default(body.top_k, settings.top_k) or None, float(default(body.top_p, settings.top_p)),
                            f"{seed}-{i}" if i else seed, body.stops, text=True) for i in range(n)]
        self._events: asyncio.Queue = asyncio.Queue()
        self.tickets = service.submit(requests, body.messages[0].characters, self._events)
        self.device = service.replicas.index(self.tickets[0].replica)
        self.pieces: list[list[tuple[str, str]]] = [[] for _ in self.tickets]
        self._watcher = asyncio.create_task(self._cancel_when_gone())

    async def _cancel_when_gone(self) -> None:
        while (await self.http.receive())["type"] != "http.disconnect":
            pass
        for ticket in self.tickets:
            ticket.end("cancelled")

    async def events(self):
        """Yields (choice, event), what has piled up of a choice as one; however it ends, no slot stays occupied."""
        try:
            left = len(self.tickets)
            while left:
                ticket, event = await self._events.get()
                latest = {ticket: event}
                while not self._events.empty():
                    ticket, event = self._events.get_nowait()
                    if ticket in latest and event.finish_reason not in FAILURES:
                        event.pieces[:0] = latest[ticket].pieces
                    latest[ticket] = event
                for ticket, event in latest.items():
                    choice = self.tickets.index(ticket)
                    self.pieces[choice] += event.pieces if event.finish_reason not in FAILURES else []
                    left -= event.finish_reason is not None
                    yield choice, event
        finally:
            self._watcher.cancel()
            for ticket in self.tickets:
                ticket.end("cancelled")
                self.service.finished(ticket)
            self._log()

    def speed(self) -> float:
        """Tokens/s of all choices together, after the first."""
        return sum(ticket.tokens_per_s for ticket in self.tickets)

    def usage(self) -> dict:
        return api.usage(len(self.prompt), self.tickets[0].reused, sum(ticket.tokens for ticket in self.tickets))

    def _log(self) -> None:
        first = self.tickets[0].first_token_s
        log(self.http.scope, f"{'/'.join(t.finish_reason for t in self.tickets)} | prompt {len(self.prompt)} "
            f"({self.tickets[0].reused} cached) | answer {sum(t.tokens for t in self.tickets)} tokens"
            + (f" | first after {1e3 * first:.0f} ms | {self.speed():.0f} tok/s" if first else "") + f" | device {self.device}")
        if self.service.settings.log_content:
            print(f"  asked: {self.body.messages[-1].characters!r}\n  answered: "
                  + " / ".join(repr("".join(text for _, text in pieces)) for pieces in self.pieces), flush=True)


# --- the chat page's protocol -----------------------------------------------------------------------------------------


async def page_events(exchange: Exchange):
    async for _, event in exchange.events():
        if event.finish_reason in FAILURES:
            yield api.event({"error": event.pieces[-1][1], "gpu": exchange.device})
        for kind, text in event.pieces if event.finish_reason not in FAILURES else ():
            part = {} if kind == "text" and text else {"part": kind}  # the kind where it is not text, and where a part begins
            yield api.event({"token": text, "gpu": exchange.device} | part)
        if event.finish_reason:
            yield api.event({"done": True, "finish_reason": event.finish_reason, "forgotten": exchange.forgotten,
                             "cut_tokens": exchange.cut, "tokens_per_s": round(exchange.speed(), 1)} | exchange.usage())


# --- OpenAI's protocol ------------------------------------------------------------------------------------------------


async def completion_chunks(exchange: Exchange, head: dict, include_usage: bool):
    def chunk(choice, delta, finish_reason=None):
        more = {"usage": None} if include_usage else {}
        return api.event(head | {"object": "chat.completion.chunk", "choices": [
            {"index": choice, "delta": delta, "logprobs": None, "finish_reason": finish_reason}]} | more)

    for choice in range(len(exchange.tickets)):
        yield chunk(choice, {"role": "assistant", "content": ""})
    async for choice, event in exchange.events():
        if event.finish_reason in FAILURES:
            yield api.event({"error": {"message": event.pieces[-1][1], "type": "server_error", "param": None, "code": None}})
            return
        for kind, text in event.pieces:
            if kind == "text" and text:
                yield chunk(choice, {"content": text})
            elif kind != "text":
                yield chunk(choice, {"content": "", "part": {"type": kind, "text": text}})
        if event.finish_reason:
            yield chunk(choice, {}, FINISH_REASONS.get(event.finish_reason, "stop"))
    if include_usage:
        yield api.event(head | {"object": "chat.completion.chunk", "choices": [], "usage": exchange.usage()})
    yield api.event("[DONE]")


async def whole_completion(exchange: Exchange, head: dict) -> dict:
    async for _, event in exchange.events():
        if event.finish_reason in FAILURES:
            raise Refusal(503, event.pieces[-1][1])
    choices = [{"index": i, "logprobs": None, "finish_reason": FINISH_REASONS.get(ticket.finish_reason, "stop"),
                "message": {"role": "assistant", "content": api.text_of(pieces), "refusal": None,
                            "parts": join_pieces(pieces)}}
               for i, (ticket, pieces) in enumerate(zip(exchange.tickets, exchange.pieces))]
    return head | {"object": "chat.completion", "choices": choices, "usage": exchange.usage()}


# --- the application ----------------------------------------------------------------------------------------------------


def page() -> tuple[str, dict]:
    """The chat page, and headers that let nothing run but the script in it."""
    html = PAGE.read_text()
    hashes = {kind: " ".join("'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"
                             for text in re.findall(rf"<{kind}>(.*?)</{kind}>", html, re.DOTALL))
              for kind in ("script", "style")}
    policy = (f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; connect-src 'self'; "
              "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
    return html, {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
                  "Cache-Control": "no-cache"}


def create_app(service: Service) -> FastAPI:
    """The routes over a service whose replicas are ready."""
    settings = service.settings
    created = int(service.started)
    problems = {code: {"description": text} for code, text in (
        (400, "the request is wrong; the answer says how"), (401, "an API key is wanted"), (404, "no such model"),
        (408, "the body came too slowly"), (413, "the body is too big"), (503, "busy or shutting down; see Retry-After"))}
    app = FastAPI(title="nanochat", docs_url=None, redoc_url=None, responses=problems)
    app.add_middleware(Guard, settings=settings)
    if settings.cors_origins:
        app.add_middleware(CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=["*"], allow_headers=["*"])

    @app.exception_handler(Refusal)
    async def refused(http: HttpRequest, refusal: Refusal):
        log(http.scope, f"{refusal.status} {refusal.message}")
        return refusal_response(http.url.path, refusal)

    @app.exception_handler(RequestValidationError)
    async def invalid(http: HttpRequest, error: RequestValidationError):
        place, text = api.reason(error.errors())
        return await refused(http, Refusal(400, f"{place}: {text}" if place else text, place or None))

    @app.exception_handler(HTTPException)
    async def other(http: HttpRequest, error: HTTPException):
        known = {404: "no such page; there are /, /chat/completions, /v1/chat/completions, /v1/models, /health, /stats, /metrics",
                 400: api.NOT_JSON}
        response = await refused(http, Refusal(error.status_code, known.get(error.status_code, error.detail)))
        response.headers.update(error.headers or {})
        return response

    html, page_headers = page()

    @app.head("/", include_in_schema=False)
    @app.get("/", response_class=HTMLResponse)
    async def chat_page():
        return HTMLResponse(html, headers=page_headers)

    @app.post("/chat/completions")
    async def chat(body: api.ChatRequest, http: HttpRequest):
        exchange = Exchange(service, http, body, body.max_tokens, 1, may_forget=True)
        return StreamingResponse(page_events(exchange), media_type="text/event-stream", headers=NO_BUFFER)

    @app.post("/v1/chat/completions")
    async def completions(body: api.CompletionRequest, http: HttpRequest):
        known_model(body.model)
        exchange = Exchange(service, http, body, body.max_completion_tokens or body.max_tokens, body.n or 1, may_forget=False)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": settings.model_name}
        if not body.stream:
            return JSONResponse(await whole_completion(exchange, head))
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        return StreamingResponse(completion_chunks(exchange, head, include_usage), media_type="text/event-stream",
                                 headers=NO_BUFFER)

    def known_model(name: str) -> dict:
        if name not in (settings.model_name, "nanochat"):
            raise Refusal(404, f"no model {name!r} here; there is {settings.model_name!r}", "model", "model_not_found")
        return {"id": settings.model_name, "object": "model", "created": created, "owned_by": "nanochat"}

    @app.get("/v1/models")
    async def models():
        return {"object": "list", "data": [known_model(settings.model_name)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str):
        return known_model(name)

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health():
        ready = sum(replica.state == "ready" for replica in service.replicas)
        ok = ready > 0 and not service.draining
        return JSONResponse({"status": "ok" if ok else "draining" if service.draining else "unavailable", "ready": ok,
                             "model": settings.model_name, "engines": {"ready": ready, "total": len(service.replicas)}},
                            200 if ok else 503)

    @app.get("/stats")
    async def stats():
        return service.stats() | {"defaults": {name: getattr(settings, name) for name in (
            "temperature", "top_k", "top_p", "max_tokens")}}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics():
        return PlainTextResponse(prometheus(service.stats()), media_type="text/plain; version=0.0.4")

    return app


class Server(uvicorn.Server):
    """uvicorn, which says when it listens, and on the first signal also lets the service drain."""

    def __init__(self, config: uvicorn.Config, service: Service, announce):
        super().__init__(config)
        self.service, self.announce, self._drains = service, announce, []

    async def startup(self, sockets=None) -> None:
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        self.announce()

    def handle_exit(self, sig, frame) -> None:
        self.force_exit = len(self._drains) > 1
        self.should_exit = True
        self._loop.call_soon_threadsafe(lambda: self._drains.append(asyncio.ensure_future(self.service.drain())))


async def warm_up(app: FastAPI, service: Service) -> None:
    """One request from within, so that what is loaded or built on the first one is there for the first person."""
    key = {"Authorization": f"Bearer {service.settings.api_key}"}
    request = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    transport = httpx.ASGITransport(app, client=("warm-up", 0))
    async with httpx.AsyncClient(transport=transport, base_url="http://warm-up", headers=key) as client:
        await client.post("/chat/completions", json=request)
    service.counts.clear()
    service.first_token_s.clear()


@asynccontextmanager
async def engines(replicas: list[Replica]):
    """The replicas, started and ready; stopped at the end."""
    try:
        for replica in replicas:
            replica.start()
        for replica in replicas:
            await replica.ready()
        yield
    finally:
        for replica in replicas:
            if replica.state != "stopped":
                replica.stop()


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address; UserError where it cannot be had."""
    try:
        listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except OSError as error:
        raise UserError(f"{host}:{port} cannot be listened on ({error.strerror}); see --host and --port") from error
    return listening


async def run(replicas: list[Replica], tokenizer, settings: Settings, listening: socket.socket, announce) -> None:
    """Serve on a bound socket until a signal; `announce(port)` is called when requests are taken."""
    async with engines(replicas):
        service = Service(replicas, tokenizer, settings)
        app = create_app(service)
        await warm_up(app, service)
        config = uvicorn.Config(app, log_level="warning", access_log=False, ws="none", timeout_keep_alive=30,
                                timeout_graceful_shutdown=int(settings.drain_seconds) + 5)
        await Server(config, service, lambda: announce(listening.getsockname()[1])).serve([listening])
