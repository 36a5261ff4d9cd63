"""Batches for pretraining and SFT, made ahead of the device in a background thread.

There is one global stream of rows, the same for every world size and batch size: each rank packs all of it and takes
its own rows. A row has T + 1 tokens; inputs are the first T, targets the last T. Where the rows of a step do not divide
by ranks and device batch, the last micro-step is filled up with rows that count for nothing. The state of a loader is
the number of the next document, the numbers of those that wait in the packing buffer, and the rows of the step so far:
loaded again, the very same rows follow, at any world size.
"""

import hashlib
import json
import os
import queue
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from nanochat.common import Runtime, UserError
from nanochat.dataset import DocumentReader
from nanochat.packing import BestFitBuffer, pack_row
from nanochat.tokenizer import RustBPETokenizer

BUFFER_SIZE = 1000  # documents among which the best fit is searched
READ_AHEAD = 256  # documents tokenized at a time
PREFETCH = 4  # batches ready ahead of the device
IGNORE = -1


class _Stream:
    """Numbered items without end, a chunk of them encoded in the background while the one before is used."""

    def __init__(self, encode_range, first: int):
        self._encode_range, self._next, self._ready = encode_range, first, []
        self._worker = ThreadPoolExecutor(1)
        self._ahead = self._worker.submit(encode_range, first, READ_AHEAD)

    @property
    def position(self) -> int:
        """Number of the item that `take` gives next."""
        return self._next

    def take(self):
        if not self._ready:
            self._ready = self._ahead.result()[::-1]
            self._ahead = self._worker.submit(self._encode_range, self._next + READ_AHEAD, READ_AHEAD)
        self._next += 1
        return self._ready.pop()

    def close(self) -> None:
        self._worker.shutdown(cancel_futures=True)


class _Loader:
    """What both loaders share: packing state, the thread, and the way to the device."""

    def __init__(self, runtime: Runtime, device_batch_size: int, row_tokens: int, rows_per_step: int | None,
                 state: dict | None, identity):
        self.runtime, self.rows_per_rank, self.capacity = runtime, device_batch_size, row_tokens + 1
        self.rows_per_step = rows_per_step or device_batch_size * runtime.world_size
        self.state = {"next": 0, "waiting": [], "row": 0, "identity": identity} if state is None else state
        if self.state["identity"] != identity:
            raise UserError(f"the data is not what the checkpoint was trained on: {self.state['identity']} then, {identity} now; "
                            "bring back the files and the flags that choose them, or start without --resume")
        self._begin()

    def _begin(self) -> None:
        self._buffer = BestFitBuffer()
        self._stream: _Stream | None = None
        self._queue: queue.Queue = queue.Queue(PREFETCH)
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    # given by each loader: encode items by number; one packed row as (tokens, targets)
    def _encode_range(self, first: int, count: int) -> list:
        raise NotImplementedError

    def _row(self) -> tuple[np.ndarray, np.ndarray]:
        raise NotImplementedError

    def _refill(self) -> None:
        while len(self._buffer) < BUFFER_SIZE:
            number = self._stream.position
            item = self._stream.take()
            if item is not None:
                self._buffer.add(len(item), number, item)

    def _snapshot(self, row: int) -> dict:
        return {"next": self._stream.position, "waiting": self._buffer.arrivals(), "row": row,
                "identity": self.state["identity"]}

    def _micro_step(self, count: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Inputs and targets of this rank's share of the next `count` rows, and the supervised tokens of them all."""
        rows = [self._row() for _ in range(count)]
        supervised = sum(int((targets != IGNORE).sum()) for _, targets in rows)
        first = self.runtime.rank * self.rows_per_rank
        mine = rows[first:first + self.rows_per_rank]
        empty = np.zeros_like(rows[0][0]), np.full_like(rows[0][1], IGNORE)
        mine += [empty] * (self.rows_per_rank - len(mine))
        return np.stack([r[0] for r in mine]), np.stack([r[1] for r in mine]), supervised

    def _produce(self) -> None:
        try:
            for number in self.state["waiting"]:
                item = self._encode_range(number, 1)[0]
                self._buffer.add(len(item), number, item)
            self._stream = _Stream(self._encode_range, self.state["next"])
            row = self.state.get("row", 0)
            while not self._stopped.is_set():
                count = min(self.runtime.world_size * self.rows_per_rank, self.rows_per_step - row)
                batch = self._micro_step(count)
                row = (row + count) % self.rows_per_step
                self._put((*batch, self._snapshot(row)))
        except BaseException as error:  # raised where the batches are used
            self._put(error)
        finally:
            if self._stream is not None:
                self._stream.close()

    def _put(self, item) -> None:
        while not self._stopped.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Inputs and targets (B, T) int64 on the device, and the supervised tokens of this micro-step on all ranks."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._produce, daemon=True)
            self._thread.start()
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        tokens, targets, supervised, self.state = item
        return self._to_device(tokens), self._to_device(targets), supervised

    def next_step(self) -> list[tuple[torch.Tensor, torch.Tensor, int]]:
        """The micro-batches up to the end of a step."""
        batches = [self.next_batch()]
        while self.state["row"]:
            batches.append(self.next_batch())
        return batches

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        """Compact over the bus, int64 on the device."""
        tensor = torch.from_numpy(array)
        if self.runtime.device.type == "cuda":
            tensor = tensor.pin_memory().to(self.runtime.device, non_blocking=True)
        return tensor.to(self.runtime.device, torch.int64)

    @property
    def epoch(self) -> float:
        """How often the data has been read."""
        return self.state["next"] / self.num_items

    def state_dict(self) -> dict:
        """Where the batch that `next_batch` gave last has left the stream."""
        return self.state

    def restart(self, state: dict, device_batch_size: int) -> None:
        """Go back to `state`, with another number of rows at a time."""
        self.close()
        self.state, self.rows_per_rank = state, device_batch_size
        self._begin()

    def close(self) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()


class PretrainLoader(_Loader):
    """Rows of whole documents, best fit, each row beginning with <|bos|>, nothing padded; without end.

    When no waiting document fits, the shortest is cropped to fill the row.
    """

    def __init__(self, tokenizer: RustBPETokenizer, files, runtime: Runtime, device_batch_size: int, sequence_len: int,
                 state: dict | None = None, rows_per_step: int | None = None, threads: int | None = None):
        self.tokenizer, self.reader = tokenizer, DocumentReader(tuple(files))
        self.num_items = self.reader.num_documents
        super().__init__(runtime, device_batch_size, sequence_len, rows_per_step, state, self.reader.names)
        self._pool = ThreadPoolExecutor(threads or min(4, os.cpu_count() or 1))

    def _encode_range(self, first, count):
        return self.tokenizer.encode_documents(self.reader.read(first, count), self._pool)

    def _row(self):
        row = np.concatenate(pack_row(self._buffer, self.capacity, self._refill, crop=True))[:self.capacity]
        if row.dtype == np.uint32:
            row = row.astype(np.int32)
        else:  # PyTorch knows int16 everywhere, uint16 not: ids up to 32767 fit
            row = row.astype(np.int16 if self.tokenizer.get_vocab_size() <= 1 << 15 else np.int32)
        return row[:-1], row[1:]



def fixed_rows(tokenizer: RustBPETokenizer, files, sequence_len: int, num_rows: int) -> torch.Tensor:
    """The first rows of a split, at most once through it -> (N, T + 1); the same for every batch and world size."""
    reader, pool = DocumentReader(tuple(files)), ThreadPoolExecutor(min(4, os.cpu_count() or 1))
    buffer, rows, ready, position = BestFitBuffer(), [], deque(), 0

    def refill():
        nonlocal position
        while len(buffer) < BUFFER_SIZE and position < reader.num_documents:
            if not ready:
                count = min(READ_AHEAD, reader.num_documents - position)
                ready.extend(tokenizer.encode_documents(reader.read(position, count), pool))
            document = ready.popleft()
            buffer.add(len(document), position, document)
            position += 1

    while len(rows) < num_rows:
        row = pack_row(buffer, sequence_len + 1, refill, crop=True)
        if sum(map(len, row)) <= sequence_len:  # the split is used up
            break
        rows.append(np.concatenate(row)[:sequence_len + 1].astype(np.int32))
    if not rows:
        raise UserError(f"{', '.join(str(f) for f in files)}: fewer than {sequence_len} tokens in all, not one row; give "
                        "more text, or train with a shorter --max-seq-len")
    return torch.from_numpy(np.stack(rows))


class RenderedConversation:
    """Ids and mask of a conversation; as long as its ids."""

    def __init__(self, ids: list[int], mask: list[int]):
        self.ids, self.mask = ids, mask

    def __len__(self) -> int:
        return len(self.ids)


class SFTLoader(_Loader):
    """Rows of whole conversations, best fit, padded; what is not the assistant's, and padding, has target -1.

    A conversation that alone exceeds the row is cut (`truncated`); one that then teaches nothing is left out
    (`dropped`). `dataset[i]` is a conversation.
    """

    def __init__(self, tokenizer: RustBPETokenizer, dataset, runtime: Runtime, device_batch_size: int,
                 sequence_len: int, state: dict | None = None, rows_per_step: int | None = None):
        self.tokenizer, self.dataset = tokenizer, dataset
        self.num_items = len(dataset)
        self.truncated = self.dropped = self._useless_in_a_row = 0
        super().__init__(runtime, device_batch_size, sequence_len, rows_per_step, state, self._identity())

    def _encode_range(self, first, count):
        return [self.render(number % len(self.dataset)) for number in range(first, first + count)]

    def _identity(self) -> str:
        """Number of conversations, and a hash of a thousand of them."""
        n = len(self.dataset)
        sample = [self.dataset[i * n // min(n, 1000)] for i in range(min(n, 1000))]
        return f"{n} conversations, {hashlib.sha256(json.dumps(sample).encode()).hexdigest()[:16]}"

    def render(self, index: int) -> RenderedConversation | None:
        ids, mask = self.tokenizer.render_conversation(self.dataset[index], max_tokens=None)
        if len(ids) > self.capacity:
            self.truncated += 1
            ids, mask = ids[:self.capacity], mask[:self.capacity]
        self._useless_in_a_row = 0 if any(mask[1:]) else self._useless_in_a_row + 1
        if self._useless_in_a_row:
            self.dropped += 1
            if self._useless_in_a_row > len(self.dataset):
                raise UserError(f"no conversation has an assistant token within {self.capacity - 1} tokens; raise "
                                "--max-seq-len")
            return None
        return RenderedConversation(ids, mask)

    def _row(self):
        return pad_conversations(pack_row(self._buffer, self.capacity, self._refill, crop=False), self.capacity,
                                 self.tokenizer.get_bos_token_id())

    def count_rows(self, sample: int = 4096) -> int:
        """Rows of one epoch: exact for up to `sample` conversations, else estimated from as many, evenly spread."""
        n = len(self.dataset)
        indices = range(n) if n <= sample else [i * n // sample for i in range(sample)]
        rendered = [r for r in map(self.render, indices) if r is not None]
        self.truncated = self.dropped = 0
        if not rendered:
            raise UserError(f"no conversation has an assistant token within {self.capacity - 1} tokens; raise "
                            "--max-seq-len")
        return max(1, round(len(pack_all(rendered, self.capacity)) * n / len(indices)))


def pack_all(rendered: list[RenderedConversation], capacity: int) -> list[list[RenderedConversation]]:
    """All conversations, best fit, into rows."""
    buffer, rows, waiting = BestFitBuffer(), [], iter(enumerate(rendered))

    def refill():
        while len(buffer) < BUFFER_SIZE and (item := next(waiting, None)) is not None:
            buffer.add(len(item[1]), *item)

    while row := pack_row(buffer, capacity, refill, crop=False):
        rows.append(row)
    return rows


def pad_conversations(row: list[RenderedConversation], capacity: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """A row's conversations -> inputs and targets (capacity - 1,) int32, targets -1 where nothing is learnt."""
    ids = np.full(capacity, pad_id, np.int32)
    mask = np.zeros(capacity, bool)
    end = 0
    for part in row:
        ids[end:end + len(part)], mask[end:end + len(part)] = part.ids, part.mask
        end += len(part)
    return ids[:-1], np.where(mask[1:], ids[1:], IGNORE).astype(np.int32)


def fixed_sft_rows(tokenizer: RustBPETokenizer, dataset, sequence_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All conversations of a data set, once, packed and padded -> inputs and targets (N, T)."""
    runtime = Runtime(torch.device("cpu"), torch.float32, "")
    loader = SFTLoader(tokenizer, dataset, runtime, 1, sequence_len)
    rendered = [r for r in map(loader.render, range(len(dataset))) if r is not None]
    rows = [pad_conversations(row, sequence_len + 1, tokenizer.get_bos_token_id())
            for row in pack_all(rendered, sequence_len + 1)]
    return tuple(torch.from_numpy(np.stack(side)) for side in zip(*rows))
