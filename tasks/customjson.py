"""Conversations from a person's own jsonl file."""

from pathlib import Path

from nanochat.common import UserError, read_jsonl
from nanochat.tokenizer import check_conversation
from tasks.common import Task


class CustomJSON(Task):
    """One conversation a line: {"messages": [{"role", "content"}, ...]}, or the list of messages alone."""

    def __init__(self, filepath: str | Path, **slicing):
        super().__init__(**slicing)
        self.conversations = []
        path = Path(filepath).expanduser()
        for number, value in read_jsonl(path):
            conversation = {"messages": value} if isinstance(value, list) else value
            try:
                check_conversation(conversation)
                if all(message["role"] != "assistant" for message in conversation["messages"]):
                    raise UserError("no message of role assistant, so nothing to learn")
            except UserError as error:
                raise UserError(f"{path}, line {number}: {error}") from error
            self.conversations.append(conversation)
        if not self.conversations:
            raise UserError(f"{path} holds no conversation")

    def num_examples(self) -> int:
        return len(self.conversations)

    def get_example(self, index: int) -> dict:
        return self.conversations[index]
