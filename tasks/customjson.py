"""Conversations from a person's own jsonl file."""

import json
from pathlib import Path

from nanochat.common import UserError
from nanochat.tokenizer import check_conversation
from tasks.common import Task


class CustomJSON(Task):
    """One conversation a line: {"messages": [{"role", "content"}, ...]}, or the list of messages alone."""

    def __init__(self, filepath: str | Path, **slicing):
        super().__init__(**slicing)
        self.conversations = []
        path = Path(filepath).expanduser()
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"conversation file {path} cannot be read: {error}") from error
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
                conversation = {"messages": value} if isinstance(value, list) else value
                check_conversation(conversation)
            except (ValueError, UserError) as error:
                raise UserError(f"{path}, line {number}: {error}") from error
            self.conversations.append(conversation)
        if not self.conversations:
            raise UserError(f"{path} holds no conversation")

    def num_examples(self) -> int:
        return len(self.conversations)

    def get_example(self, index: int) -> dict:
        return self.conversations[index]
