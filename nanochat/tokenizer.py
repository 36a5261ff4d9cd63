"""Byte-level BPE: trained with rustbpe, encoded with tiktoken, stored as plain JSON; and how conversations are rendered."""

import base64
import hashlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import rustbpe
import tiktoken
import torch

from nanochat.common import UserError, get_base_dir, print0, read_json

SPECIAL_TOKENS = (
    "<|bos|>",  # begins every document
    "<|user_start|>", "<|user_end|>",
    "<|assistant_start|>", "<|assistant_end|>",
    "<|python_start|>", "<|python_end|>",  # a call of the calculator
    "<|output_start|>", "<|output_end|>",  # its result
)
# GPT-4's split pattern, with numbers in groups of one or two digits
SPLIT_PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
                 r"|\s*[\r\n]|\s+(?!\S)|\s+")
FILE_NAME = "tokenizer.json"
PART_TYPES = {"text": None, "python": ("<|python_start|>", "<|python_end|>"),
              "python_output": ("<|output_start|>", "<|output_end|>")}


def check_conversation(conversation: dict) -> list[dict]:
    """Messages of a conversation, a leading system message merged into the first user message; UserError if malformed.

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    """
    messages = conversation.get("messages") if isinstance(conversation, dict) else None
    if not isinstance(messages, list) or not all(isinstance(m, dict) and {"role", "content"} <= m.keys()
                                                 for m in messages):
        raise UserError('a conversation is {"messages": [{"role": ..., "content": ...}, ...]}')
    if messages and messages[0]["role"] == "system":
        if len(messages) < 2 or messages[1]["role"] != "user":
            raise UserError("a system message must be followed by a user message")
        merged = f"{messages[0]['content']}\n\n{messages[1]['content']}"
        messages = [{"role": "user", "content": merged}, *messages[2:]]
    if not messages:
        raise UserError("a conversation needs at least one message")
    for i, message in enumerate(messages):
        expected = ("user", "assistant")[i % 2]
        if message["role"] != expected:
            raise UserError(f"message {i} has role {message['role']!r}, expected {expected!r} (user and assistant "
                            "alternate, the user begins)")
        content = message["content"]
        parts_ok = expected == "assistant" and isinstance(content, list) and all(
            isinstance(p, dict) and p.get("type") in PART_TYPES and isinstance(p.get("text"), str) for p in content)
        if not (isinstance(content, str) or parts_ok):
            raise UserError(f"message {i} ({expected}): content must be a string"
                            + (" or a list of {type: text|python|python_output, text}" if expected == "assistant"
                               else ""))
    return messages


def kept_tokenizer(directory: Path, content_hash: str) -> Path:
    """Where a tokenizer that another one replaced is kept."""
    return directory / f"tokenizer_{content_hash[:8]}.json"


class RustBPETokenizer:
    """A byte-level BPE vocabulary with the special tokens as its last ids."""

    def __init__(self, pattern: str, ranks: dict[bytes, int], special_tokens: dict[str, int], bos_token: str,
                 name: str = "nanochat"):
        self.pattern, self._ranks, self._special, self._bos_token = pattern, ranks, special_tokens, bos_token
        self.enc = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens)

    # --- make, load, save ---

    @classmethod
    def train_from_iterator(cls, iterator, vocab_size: int) -> "RustBPETokenizer":
        """Train on an iterator of strings; `vocab_size` includes the special tokens."""
        minimum = 256 + len(SPECIAL_TOKENS)
        if vocab_size < minimum:
            raise UserError(f"vocabulary size {vocab_size}: expected at least {minimum} (256 bytes and the specials)")
        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(iterator, vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
        ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
        return cls._with_specials(trainer.get_pattern(), ranks)

    @classmethod
    def _with_specials(cls, pattern, ranks):
        return cls(pattern, ranks, {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}, "<|bos|>")

    @classmethod
    def from_directory(cls, directory: str | Path) -> "RustBPETokenizer":
        """Load what `save` wrote; UserError if it is missing or damaged."""
        path = Path(directory) / FILE_NAME
        if not path.exists():
            raise UserError(f"no tokenizer in {directory}: run python -m scripts.tok_train")
        try:
            data = json.loads(path.read_text())
            tokens = [base64.b64decode(token) for token in data["tokens"]]
            tokenizer = cls(data["pattern"], {t: i for i, t in enumerate(tokens)}, data["special_tokens"], "<|bos|>")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} cannot be read ({error}): run python -m scripts.tok_train again") from error
        if tokenizer.content_hash() != data.get("sha256"):
            raise UserError(f"{path} is damaged (its content hash differs): run python -m scripts.tok_train again")
        return tokenizer

    @classmethod
    def from_pretrained(cls, name: str) -> "RustBPETokenizer":
        """A tokenizer that tiktoken knows ("gpt2", "cl100k_base"), which it downloads; raises where it cannot."""
        enc = tiktoken.get_encoding(name)
        return cls(enc._pat_str, enc._mergeable_ranks, enc._special_tokens, "<|endoftext|>", name)

    def _contents(self) -> dict:
        tokens = sorted(self._ranks, key=self._ranks.get)
        return {"pattern": self.pattern, "tokens": [base64.b64encode(t).decode() for t in tokens],
                "special_tokens": self._special}

    def content_hash(self) -> str:
        """SHA-256 of pattern, tokens in rank order and specials; checkpoints record it."""
        return hashlib.sha256(json.dumps(self._contents(), sort_keys=True).encode()).hexdigest()

    def save(self, directory: str | Path) -> None:
        """Write `tokenizer.json`; another one that is there is kept beside it, for models that were trained with it."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        path, temporary = directory / FILE_NAME, directory / (FILE_NAME + ".tmp")
        earlier = read_json(path)
        if isinstance(earlier, dict) and earlier.get("sha256") not in (None, self.content_hash()):
            kept = kept_tokenizer(directory, str(earlier["sha256"]))
            shutil.copyfile(path, kept)
            print0(f"the tokenizer that was there is kept as {kept.name}")
        temporary.write_text(json.dumps(self._contents() | {"sha256": self.content_hash()}))
        temporary.replace(path)

    # --- vocabulary ---

    def get_vocab_size(self) -> int:
        return self.enc.n_vocab

    def get_special_tokens(self) -> set[str]:
        return self.enc.special_tokens_set

    def get_bos_token_id(self) -> int:
        return self._special[self._bos_token]

    def encode_special(self, name: str) -> int:
        """Id of a special token: encode_special("<|bos|>") -> vocab_size - 9."""
        return self._special[name]

    def id_to_token(self, token: int) -> str:
        return self.enc.decode([token])

    def token_bytes(self) -> torch.Tensor:
        """Number of bytes of every token (V,), int32, 0 for specials."""
        sizes = torch.zeros(self.get_vocab_size(), dtype=torch.int32)
        for token, rank in self._ranks.items():
            sizes[rank] = len(token)
        return sizes

    # --- encode, decode ---

    def encode(self, text: str | list[str], prepend: int | str | None = None, append: int | str | None = None,
               num_threads: int = 8) -> list[int] | list[list[int]]:
        """Ids of a text, or of each of a list of texts; special tokens in the text are plain text."""
        before, after = ([] if t is None else [self._special[t] if isinstance(t, str) else t]
                         for t in (prepend, append))
        if isinstance(text, str):
            return before + self.enc.encode_ordinary(text) + after
        if isinstance(text, list):
            return [before + ids + after for ids in self.enc.encode_ordinary_batch(text, num_threads=num_threads)]
        raise TypeError(f"encode takes a str or a list of str, got {type(text).__name__}")

    __call__ = encode

    def encode_documents(self, texts: list[str], pool: ThreadPoolExecutor) -> list[np.ndarray]:
        """Each text as <|bos|> and its ids in the smallest unsigned type that holds them, encoded by the pool."""
        dtype = np.uint16 if self.get_vocab_size() <= 1 << 16 else np.uint32
        bos = self.get_bos_token_id()

        def encode_some(some: list[str]) -> list[np.ndarray]:
            documents = []
            for text in some:
                try:
                    ids = self.enc.encode_to_numpy(text, disallowed_special=())
                except UnicodeEncodeError:  # lone surrogates: encode_ordinary replaces them
                    ids = self.enc.encode_ordinary(text)
                document = np.empty(len(ids) + 1, dtype)
                document[0], document[1:] = bos, ids
                documents.append(document)
            return documents

        pieces = pool.map(encode_some, (texts[i:i + 16] for i in range(0, len(texts), 16)))
        return [document for piece in pieces for document in piece]

    def decode(self, ids: list[int]) -> str:
        return self.enc.decode(ids)

    def decode_bytes(self, ids: list[int]) -> bytes:
        return self.enc.decode_bytes(ids)

    # --- conversations ---

    def render_conversation(self, conversation: dict, max_tokens: int | None = 2048) -> tuple[list[int], list[int]]:
        """Ids and mask of a conversation, cut to `max_tokens`; mask 1 on what the assistant is to learn.

        Learnt: assistant text, python calls and <|assistant_end|>. Not learnt: everything else, tool output included.
        """
        ids, mask = [self.get_bos_token_id()], [0]
        for message in check_conversation(conversation):
            for tokens, learnt in self._render_message(message):
                ids.extend(tokens)
                mask.extend([learnt] * len(tokens))
        return ids[:max_tokens], mask[:max_tokens]

    def _render_message(self, message: dict):
        """Yields (ids, learnt) of a message's parts."""
        special, content = self.encode_special, message["content"]
        if message["role"] == "user":
            yield [special("<|user_start|>"), *self.encode(content), special("<|user_end|>")], 0
            return
        yield [special("<|assistant_start|>")], 0
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            markers = PART_TYPES[part["type"]]
            tokens = self.encode(part["text"])
            if markers:
                tokens = [special(markers[0]), *tokens, special(markers[1])]
            yield tokens, int(part["type"] != "python_output")
        yield [special("<|assistant_end|>")], 1

    def render_for_completion(self, conversation: dict, max_tokens: int | None = None) -> list[int]:
        """Ids that prime the assistant's next answer; a final assistant message is left out, a prompt over
        `max_tokens` keeps <|bos|> and its end."""
        messages = check_conversation(conversation)
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        ids, _ = self.render_conversation({"messages": messages}, max_tokens=None)
        ids.append(self.encode_special("<|assistant_start|>"))
        if max_tokens is not None and len(ids) > max_tokens:
            ids = ids[:1] + ids[len(ids) - max_tokens + 1:]
        return ids

    def fit_conversation(self, messages: list[dict], limit: int) -> tuple[list[int], list[dict], int]:
        """(prompt, messages, tokens) of a conversation for the next answer; its oldest exchanges are left out, as few as
        needed to render within `limit` tokens. If the last message alone is longer, the prompt holds its end, and `tokens`
        says how many it has."""
        messages = check_conversation({"messages": messages})
        sizes = [sum(len(ids) for ids, _ in self._render_message(message)) for message in messages]
        first, tokens = 0, sum(sizes) + 2  # <|bos|> and <|assistant_start|>
        while tokens > limit and first < len(messages) - 1:
            tokens -= sum(sizes[first:first + 2])
            first += 2
        return self.render_for_completion({"messages": messages[first:]}, limit), messages[first:], tokens

    def visualize_tokenization(self, ids: list[int], mask: list[int]) -> str:
        """The tokens in colour for a terminal: green is learnt, red is not."""
        return "|".join(f"\033[{32 if m else 31}m{self.id_to_token(i)}\033[0m" for i, m in zip(ids, mask))


def get_tokenizer() -> RustBPETokenizer:
    """The tokenizer of the base directory."""
    return RustBPETokenizer.from_directory(get_base_dir() / "tokenizer")
