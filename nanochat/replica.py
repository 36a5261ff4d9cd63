"""An engine in a process of its own, one a device, and the server's end of the pipe to it.

To the engine: ("submit", id, Request), ("cancel", id). From it: ("ready", facts), ("failed", reason), then after each step
("events", [Event, ...], counters).
"""

import asyncio
import multiprocessing
import queue
import signal
import threading
import time
from collections import deque
from dataclasses import dataclass, field

import torch

from nanochat.checkpoint_manager import load_model
from nanochat.common import UserError, compute_init
from nanochat.engine import Engine, Request
from nanochat.gpt import Linear
from nanochat.hardware import device_name

BYTES_PER_THREAD = 2**25  # of weights: with less, threads wait for each other, and on few cores for the web server, too
RATE_SECONDS = 10  # tokens/s are an average over the last so many seconds


@dataclass(frozen=True)
class ModelChoice:
    """Which model a replica loads, and onto what."""

    source: str
    model_tag: str | None
    step: int | None
    device_type: str = ""
    device_index: int = 0
    threads: int | None = None  # at most, on CPUs
    slots: int = 64


@dataclass
class Event:
    """What a step brought one request: pieces of text, tokens so far, and at the end the reason."""

    id: int
    pieces: list[tuple[str, str]]
    tokens: int
    reused: int
    at: float  # time.monotonic of the engine's process
    finish_reason: str | None = None  # as in Completion, or "error", "shutdown", with the only piece to say why


# --- the engine's process -------------------------------------------------------------------------------------------


def serve_engine(connection, choice: ModelChoice) -> None:
    """Load the model and serve requests from the pipe until it closes."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)  # the server decides when this ends
    try:
        engine, facts = _load(choice)
    except UserError as error:
        connection.send(("failed", str(error)))
        return
    connection.send(("ready", facts))
    try:
        _loop(connection, engine)
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the server is gone
        pass


def _load(choice: ModelChoice) -> tuple[Engine, dict]:
    runtime = compute_init(choice.device_type, index=choice.device_index)
    model, tokenizer, _ = load_model(choice.source, runtime.device, "eval", choice.model_tag, choice.step, runtime.dtype)
    if choice.threads:
        weights = sum(module.weight.nbytes for module in model.modules() if isinstance(module, Linear))
        torch.set_num_threads(max(1, min(choice.threads, weights // BYTES_PER_THREAD)))
    engine = Engine(model, tokenizer, slots=choice.slots)
    engine.generate_many([[0, 1]], max_tokens=2)  # whatever is compiled or captured, is now
    return engine, {"device": device_name(runtime.device), "dtype": runtime.dtype_name, "slots": engine.cache.batch_size,
                    "context": engine.context}


def _loop(connection, engine: Engine) -> None:
    ids: dict = {}  # sequence -> id
    sequences: dict = {}  # id -> sequence
    generated = 0
    while True:
        while connection.poll(0 if engine.busy else None):
            name, request_id, *rest = connection.recv()
            if name == "submit":
                sequence = engine.submit(rest[0])
                ids[sequence], sequences[request_id] = request_id, sequence
                if sequence.done:
                    connection.send(("events", [_event(ids, sequences, sequence)], {}))
            elif request_id in sequences:
                sequence = sequences.pop(request_id)
                engine.cancel(sequence)
                del ids[sequence]
        if engine.busy:
            stepped = engine.step()
            generated += len(stepped)
            connection.send(("events", [_event(ids, sequences, sequence) for sequence, _, _ in stepped], {
                "active": engine.active, "waiting": len(engine.waiting), "generated": generated,
                "prefilled": engine.prefilled_tokens, "reused": engine.reused_tokens}))


def _event(ids: dict, sequences: dict, sequence) -> Event:
    completion, request_id = sequence.completion, ids[sequence]
    pieces, completion.pieces = completion.pieces, []
    if sequence.done:
        del ids[sequence], sequences[request_id]
    return Event(request_id, pieces, len(completion.tokens), sequence.reused, time.monotonic(), completion.finish_reason)


# --- the server's end -----------------------------------------------------------------------------------------------


class Ticket:
    """A request under way, as the server sees it; its events go to a queue as (ticket, event)."""

    def __init__(self, replica: "Replica", request_id: int, events: asyncio.Queue):
        self.replica, self.id, self.events = replica, request_id, events
        self.started, self.first_token_s, self.tokens, self.reused = time.monotonic(), None, 0, 0
        self._first: Event | None = None  # with a token; and the last so far
        self._last: Event | None = None
        self.finish_reason: str | None = None

    def put(self, event: Event) -> None:
        if event.tokens:
            self._first, self._last = self._first or event, event
            if self.first_token_s is None:
                self.first_token_s = time.monotonic() - self.started
        self.tokens, self.reused, self.finish_reason = event.tokens, event.reused, event.finish_reason
        self.events.put_nowait((self, event))

    def end(self, reason: str, message: str = "") -> None:
        """End it from the server's side; the engine forgets it."""
        if self.finish_reason is None:
            self.replica.forget(self)
            self.put(Event(self.id, [("text", message)] if message else [], self.tokens, self.reused, time.monotonic(), reason))

    @property
    def tokens_per_s(self) -> float:
        """Speed after the first token, by the engine's clock; 0 as long as there is but one."""
        if self._first is None or self._last.tokens == self._first.tokens:
            return 0.0
        return (self._last.tokens - self._first.tokens) / (self._last.at - self._first.at)


@dataclass
class Replica:
    """One engine process. `start` it, await `ready`, `submit` requests; when it dies, its requests end with an error and
    another one is started."""

    choice: ModelChoice
    state: str = "stopped"  # starting, ready, failed, stopped
    facts: dict = field(default_factory=dict)
    counters: dict = field(default_factory=lambda: dict.fromkeys(("active", "waiting", "generated", "prefilled", "reused"), 0))
    tickets: dict[int, Ticket] = field(default_factory=dict)
    restarts: int = 0
    failure: str = ""
    _next_id: int = 0

    def start(self) -> None:
        """Start the process; call it from the event loop."""
        self.state, self._loop, self._changed = "starting", asyncio.get_running_loop(), asyncio.Event()
        self._rates: deque = deque()
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self.process = context.Process(target=serve_engine, args=(theirs, self.choice), daemon=True)
        self.process.start()
        theirs.close()
        self._outgoing: queue.SimpleQueue = queue.SimpleQueue()
        for work in (self._send_all, self._receive_all):
            threading.Thread(target=work, args=(self._connection, self._outgoing), daemon=True).start()

    def stop(self) -> None:
        """End the process; its requests should have ended before."""
        self.state = "stopped"
        self.process.kill()
        self.process.join(5)
        self._connection.close()

    async def ready(self) -> None:
        """Wait until it serves; UserError if it cannot."""
        while self.state == "starting":
            self._changed.clear()
            await self._changed.wait()
        if self.state != "ready":
            raise UserError(self.failure)

    def submit(self, request: Request, events: asyncio.Queue) -> Ticket:
        """Hand a request to the engine; what becomes of it comes through `events`."""
        self._next_id += 1
        ticket = self.tickets[self._next_id] = Ticket(self, self._next_id, events)
        self._outgoing.put(("submit", ticket.id, request))
        return ticket

    def forget(self, ticket: Ticket) -> None:
        if self.tickets.pop(ticket.id, None):
            self._outgoing.put(("cancel", ticket.id))

    def tokens_per_s(self) -> float:
        now = time.monotonic()
        while self._rates and self._rates[0][0] < now - RATE_SECONDS:
            self._rates.popleft()
        return sum(tokens for _, tokens in self._rates) / RATE_SECONDS

    # --- the pipe, each direction in a thread of its own, so that a full one blocks nothing else ---

    def _send_all(self, connection, outgoing) -> None:
        try:
            while (message := outgoing.get()) is not None:
                connection.send(message)
        except OSError:
            pass

    def _receive_all(self, connection, outgoing) -> None:
        try:
            while True:
                self._loop.call_soon_threadsafe(self._received, connection, connection.recv())
        except (EOFError, OSError):
            outgoing.put(None)
        try:
            self._loop.call_soon_threadsafe(self._ended, connection)
        except RuntimeError:  # the loop is closed, the server over
            pass

    def _received(self, connection, message) -> None:
        if connection is not self._connection:
            return
        kind, *content = message
        if kind == "ready":
            self.state, self.facts = "ready", content[0]
        elif kind == "failed":
            self.state, self.failure = "failed", content[0]
        else:
            events, counters = content
            if counters:
                self._rates.append((time.monotonic(), counters["generated"] - self.counters["generated"]))
                self.counters = counters
            for event in events:
                ticket = self.tickets.get(event.id)
                if ticket:
                    if event.finish_reason:
                        del self.tickets[event.id]
                    ticket.put(event)
        self._changed.set()

    def _ended(self, connection) -> None:
        if connection is not self._connection or self.state in ("stopped", "failed"):
            return
        self.process.join(5)
        was_ready, self.state = self.state == "ready", "failed"
        self.failure = f"the engine on {self.facts.get('device', 'its device')} ended with exit code {self.process.exitcode}"
        print(f"error: {self.failure}" + ("; starting another one" if was_ready else ""), flush=True)
        for ticket in list(self.tickets.values()):
            ticket.end("error", self.failure)
        self.tickets.clear()
        self._changed.set()
        if was_ready:  # one that dies before it serves would do so again
            self.restarts += 1
            self.counters = dict.fromkeys(self.counters, 0)
            self.start()
