"""From tokens to what a person reads: whole characters, tool calls as parts of their own, stop strings."""

OPENERS = {"<|python_start|>": "python", "<|output_start|>": "python_output"}
CLOSERS = ("<|python_end|>", "<|output_end|>")


class TextStream:
    """Turns tokens into text as they come, in whole characters only."""

    def __init__(self, tokenizer):
        self.tokenizer, self._pending = tokenizer, b""

    def push(self, token: int) -> str:
        """Text that became complete with this token; a multi-byte character comes when its last byte is there."""
        self._pending += self.tokenizer.decode_bytes([token])
        cut = len(self._pending)
        for back in range(1, min(4, cut) + 1):  # an unfinished character is at most three bytes long
            byte = self._pending[cut - back]
            if byte >= 0xC0:  # a lead byte: 2, 3 or 4 bytes long
                length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
                cut = cut - back if length > back else cut
                break
            if byte < 0x80:
                break
        text, self._pending = self._pending[:cut], self._pending[cut:]
        return text.decode("utf-8", errors="replace")

    def flush(self) -> str:
        """What is left at the end, unfinished characters replaced."""
        text, self._pending = self._pending.decode("utf-8", errors="replace"), b""
        return text


class AnswerStream:
    """Turns an answer's tokens into pieces (part type, text); type is text, python (a call) or python_output.

    A piece without text begins a new part. Ends at the first of the `stop` strings that the text contains, which is left
    out: text that may yet become one is held back until that is decided.
    """

    def __init__(self, tokenizer, stop: tuple[str, ...] = ()):
        self.stop, self.stopped, self.kind = [s for s in stop if s], False, "text"
        self._text, self._held = TextStream(tokenizer), ""
        self._markers = {tokenizer.encode_special(name): kind for name, kind in OPENERS.items()}
        self._markers |= {tokenizer.encode_special(name): "text" for name in CLOSERS}

    def push(self, token: int) -> list[tuple[str, str]]:
        """Pieces that became certain with this token."""
        if self.stopped:
            return []
        if token not in self._markers:
            return self._emit(self._text.push(token))
        pieces = self.flush()
        if self.stopped:
            return pieces
        self.kind = self._markers[token]
        return [*pieces, (self.kind, "")]

    def flush(self) -> list[tuple[str, str]]:
        """What is left at the end of the answer, or of a part."""
        pieces = self._emit(self._text.flush())
        rest, self._held = self._held, ""
        return pieces + [(self.kind, rest)] if rest and not self.stopped else pieces

    def _emit(self, text: str) -> list[tuple[str, str]]:
        text, self._held = self._held + text, ""
        if self.kind == "text" and self.stop:
            found = [at for at in map(text.find, self.stop) if at >= 0]
            if found:
                text, self.stopped = text[:min(found)], True
            else:
                held = max(overlap(text, stop) for stop in self.stop)
                text, self._held = text[:len(text) - held], text[len(text) - held:]
        return [(self.kind, text)] if text else []


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`, but is not all of it: ("say STO", "STOP") -> 3."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def join_pieces(pieces) -> list[dict]:
    """Parts of an assistant message from the pieces of an AnswerStream; parts that stayed empty are left out."""
    parts = [{"type": "text", "text": ""}]
    for kind, text in pieces:
        if not text:
            parts.append({"type": kind, "text": ""})
        parts[-1]["text"] += text
    return [part for part in parts if part["text"]] or parts[:1]
