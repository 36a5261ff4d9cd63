"""Conversations from the built-in generators: what SFT learns from where no data set can be had."""

import random

from nanochat import synthetic
from tasks.common import Task

GENERATORS = {"facts": synthetic.fact, "arithmetic": synthetic.sums, "word problems": synthetic.word_problem,
              "small talk": synthetic.small_talk}


class BuiltinChat(Task):
    """`size` conversations of one kind; train and test draw from different random streams."""

    def __init__(self, kind: str, size: int, split: str = "train", **slicing):
        super().__init__(**slicing)
        self.kind, self.size, self.split = kind, size, split

    def num_examples(self) -> int:
        return self.size

    def get_example(self, index: int) -> dict:
        return GENERATORS[self.kind](random.Random(f"{self.kind} {self.split} {index}"))


class Identity(Task):
    """Conversations about the model itself, from dev/self_knowledge.md."""

    def __init__(self, size: int, split: str = "train", topics: dict | None = None, **slicing):
        super().__init__(**slicing)
        self.size, self.split = size, split
        self.topics = topics or synthetic.read_knowledge()

    def num_examples(self) -> int:
        return self.size

    def get_example(self, index: int) -> dict:
        return synthetic.identity(random.Random(f"identity {self.split} {index}"), self.topics)
