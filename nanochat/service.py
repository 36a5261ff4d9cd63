"""What the web server consists of beside its protocols: settings, refusals, the guard at the door, and the service that
hands requests to the engines and counts."""

import asyncio
import hmac
import statistics
import time
import zlib
from collections import Counter, deque
from dataclasses import dataclass

from fastapi.responses import JSONResponse

from nanochat.engine import Request
from nanochat.replica import Replica, Ticket

MAX_BODY_BYTES = 2**20
DISCARDED_BODY_BYTES = 2**26  # of a body that is too big so much is still read, so that the client gets to see why
BODY_SECONDS = 20  # a request's body has to arrive within
RETRY_AFTER_SECONDS = 2
OPEN_PATHS = ("/", "/health")  # served without an API key


@dataclass(frozen=True)
class Settings:
    """How the server behaves; sampling defaults apply where a request says nothing."""

    model_name: str = "nanochat"
    max_tokens: int = 512
    temperature: float = 0.6
    top_k: int = 50
    top_p: float = 1.0
    max_queue: int = 64
    api_key: str | None = None
    cors_origins: tuple[str, ...] = ()
    log_content: bool = False
    drain_seconds: float = 30.0


class Refusal(Exception):
    """An answer other than 200: status, what is wrong, and OpenAI's words for it."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


def refusal_response(path: str, refusal: Refusal) -> JSONResponse:
    """In the form that the path's protocol has for errors."""
    kinds = {401: "authentication_error", 503: "server_error", 500: "server_error"}
    body = {"detail": refusal.message} if not path.startswith("/v1/") else {"error": {
        "message": refusal.message, "type": kinds.get(refusal.status, "invalid_request_error"), "param": refusal.param,
        "code": refusal.code}}
    headers = {503: {"Retry-After": str(RETRY_AFTER_SECONDS)}, 401: {"WWW-Authenticate": "Bearer"}}
    return JSONResponse(body, refusal.status, headers.get(refusal.status))


def log(scope, text: str) -> None:
    """One line; the request's content is not in it."""
    client = scope["client"][0] if scope.get("client") else "-"
    print(f"{time.strftime('%H:%M:%S')} {client} {scope['method']} {scope['path']!r} | {text}", flush=True)


class Guard:
    """ASGI middleware in front of everything: the API key, and bodies that are too big or too slow."""

    def __init__(self, app, settings: Settings):
        self.app, self.settings = app, settings

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            self._check_key(scope)
            async with asyncio.timeout(BODY_SECONDS):
                body = await self._body(receive)
        except TimeoutError:
            return await self._refuse(Refusal(408, f"the request's body did not arrive within {BODY_SECONDS} s"), scope, receive,
                                      send)
        except Refusal as refusal:
            return await self._refuse(refusal, scope, receive, send)
        if body is not None:
            first = [{"type": "http.request", "body": body, "more_body": False}]

            async def receive_rest():
                return first.pop() if first else await receive()

            await self.app(scope, receive_rest, send)

    def _check_key(self, scope) -> None:
        key = self.settings.api_key
        if key and scope["path"] not in OPEN_PATHS and scope["method"] != "OPTIONS":
            scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), key.encode()):
                raise Refusal(401, "this server wants its API key: Authorization: Bearer <key>", code="invalid_api_key")

    @staticmethod
    async def _body(receive) -> bytes | None:
        body, size, more = bytearray(), 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunk, more = message.get("body", b""), message.get("more_body", False)
            size += len(chunk)
            if size <= MAX_BODY_BYTES:
                body += chunk
            elif size > DISCARDED_BODY_BYTES:
                break
        if size > MAX_BODY_BYTES:
            raise Refusal(413, f"the request's body is larger than {MAX_BODY_BYTES} bytes")
        return bytes(body)

    @staticmethod
    async def _refuse(refusal, scope, receive, send):
        log(scope, f"{refusal.status} {refusal.message}")
        await refusal_response(scope["path"], refusal)(scope, receive, send)


class Service:
    """The replicas, who gets which, and what has been counted."""

    def __init__(self, replicas: list[Replica], tokenizer, settings: Settings):
        self.replicas, self.tokenizer, self.settings = replicas, tokenizer, settings
        self.started, self.draining = time.time(), False
        self.counts: Counter = Counter()
        self.first_token_s: deque[float] = deque(maxlen=1000)

    @property
    def context(self) -> int:
        return min(replica.facts["context"] for replica in self.replicas if replica.facts)

    @property
    def slots(self) -> int:
        return sum(replica.facts["slots"] for replica in self.replicas if replica.state == "ready")

    @property
    def running(self) -> int:
        return sum(len(replica.tickets) for replica in self.replicas)

    def submit(self, requests: list[Request], home: str, events: asyncio.Queue) -> list[Ticket]:
        """Put the requests of one client on one replica: that where its conversation began, unless others have less to do."""
        ready = [replica for replica in self.replicas if replica.state == "ready"]
        if self.draining or not ready:
            raise Refusal(503, "the server is shutting down" if self.draining else "no engine is running; try again soon")
        most = self.slots + self.settings.max_queue
        if len(requests) > most:
            raise Refusal(400, f"n={len(requests)} answers at once are more than the {most} that this server takes", "n")
        if self.running + len(requests) > self.slots + self.settings.max_queue:
            self.counts["rejected"] += 1
            raise Refusal(503, f"too many at once ({self.running} answers are being written or wait); try again in "
                               f"{RETRY_AFTER_SECONDS} s", code="queue_full")
        least = min(len(replica.tickets) for replica in ready)
        preferred = ready[zlib.crc32(home.encode("utf-8", "replace")) % len(ready)]
        replica = preferred if len(preferred.tickets) <= least + 1 else min(ready, key=lambda r: len(r.tickets))
        self.counts["accepted"] += len(requests)
        return [replica.submit(request, events) for request in requests]

    def finished(self, ticket: Ticket) -> None:
        """Count a ticket that came to its end, whichever."""
        if ticket.first_token_s is not None:
            self.first_token_s.append(ticket.first_token_s)
        self.counts[{"error": "failed", "cancelled": "cancelled", "shutdown": "cancelled"}.get(
            ticket.finish_reason, "completed")] += 1

    async def drain(self) -> None:
        """Take nothing new, let what runs finish, tell what does not finish in time; called again, at once."""
        deadline = time.monotonic() + (0 if self.draining else self.settings.drain_seconds)
        if self.running and not self.draining:
            print(f"shutting down: {self.running} answers have {self.settings.drain_seconds:g} s to finish (again to leave at "
                  "once)", flush=True)
        self.draining = True
        while self.running and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        for replica in self.replicas:
            for ticket in list(replica.tickets.values()):
                ticket.end("shutdown", "the server is shutting down")

    def stats(self) -> dict:
        quantiles = statistics.quantiles(self.first_token_s, n=20, method="inclusive") if len(self.first_token_s) > 1 else [None] * 19
        devices = [{"index": i, "state": r.state, **r.facts, **r.counters, "tokens_per_s": round(r.tokens_per_s(), 1),
                    "restarts": r.restarts, "pid": r.process.pid} for i, r in enumerate(self.replicas)]
        active = sum(device["active"] if replica.tickets else 0 for device, replica in zip(devices, self.replicas))
        return {"model": self.settings.model_name, "context": self.context, "uptime_s": round(time.time() - self.started, 1),
                "draining": self.draining, "slots": {"total": self.slots, "active": active},
                "queue": {"waiting": max(0, self.running - active), "limit": self.settings.max_queue},
                "running": self.running, "tokens_per_s": round(sum(d["tokens_per_s"] for d in devices), 1),
                "requests": {name: self.counts[name] for name in
                             ("accepted", "completed", "cancelled", "failed", "rejected")},
                "first_token_s": {"p50": quantiles[9], "p95": quantiles[18]}, "devices": devices}


def prometheus(stats: dict) -> str:
    """The same counts as text for Prometheus."""
    lines = []

    def add(name, kind, values):  # values: (labels, number)
        lines.append(f"# TYPE nanochat_{name} {kind}")
        lines.extend(f"nanochat_{name}{labels} {value}" for labels, value in values)

    add("requests_total", "counter", [(f'{{state="{state}"}}', n) for state, n in stats["requests"].items()])
    add("requests_running", "gauge", [("", stats["running"])])
    add("queue_waiting", "gauge", [("", stats["queue"]["waiting"])])
    for state in ("p50", "p95"):
        if stats["first_token_s"][state] is not None:
            add(f"first_token_seconds_{state}", "gauge", [("", stats["first_token_s"][state])])
    for name, kind, key in (("slots", "gauge", "slots"), ("slots_active", "gauge", "active"),
                            ("tokens_per_second", "gauge", "tokens_per_s"), ("generated_tokens_total", "counter", "generated"),
                            ("prefilled_tokens_total", "counter", "prefilled"), ("reused_tokens_total", "counter", "reused"),
                            ("engine_restarts_total", "counter", "restarts")):
        add(name, kind, [(f'{{device="{d["index"]}"}}', d[key]) for d in stats["devices"] if key in d])
    return "\n".join(lines) + "\n"
