"""Best-fit packing of documents into rows of fixed length."""

from bisect import bisect_left, bisect_right, insort

INFINITY = float("inf")


class BestFitBuffer:
    """Documents waiting to be packed, searchable by length in O(log n).

    Keys are (length, arrival), so among equals the oldest leaves first and packing is deterministic.
    """

    def __init__(self):
        self._keys: list[tuple[int, int]] = []
        self._documents: dict[int, object] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, length: int, arrival: int, document) -> None:
        insort(self._keys, (length, arrival))
        self._documents[arrival] = document

    def arrivals(self) -> list[int]:
        """Arrival numbers of what waits, ascending."""
        return sorted(self._documents)

    def take_largest(self, room: int):
        """Remove and return the longest document of at most `room` tokens, None if none fits."""
        end = bisect_right(self._keys, (room, INFINITY))
        if end == 0:
            return None
        longest = self._keys[end - 1][0]
        return self._take(bisect_left(self._keys, (longest, -1)))

    def take_shortest(self):
        """Remove and return the shortest document."""
        return self._take(0)

    def _take(self, index: int):
        return self._documents.pop(self._keys.pop(index)[1])


def pack_row(buffer: BestFitBuffer, capacity: int, refill, crop: bool) -> list:
    """One row's documents, best fit first; with `crop` the last one may exceed what is left and is to be cut.

    `refill()` is called before each search and keeps the buffer full; packing ends when the row is full, or when
    nothing fits and `crop` is False. A document is any sequence with a length. An exhausted buffer gives a short row.
    """
    row, room = [], capacity
    while room > 0:
        refill()
        if len(buffer) == 0:
            break
        document = buffer.take_largest(room)
        if document is None:
            if not crop:
                break
            document = buffer.take_shortest()
        row.append(document)
        room -= min(room, len(document))
    return row
