"""Conversations from the built-in generators: what SFT learns from where no data set can be had."""

import random

from nanochat import synthetic
from tasks.common import Task
from tasks.gsm8k import NumberTask

GENERATORS = {"facts": synthetic.fact, "arithmetic": synthetic.sums, "word problems": synthetic.word_problem,
              "small talk": synthetic.small_talk}
CALCULATIONS = {"arithmetic", "word problems"}  # whose test problems are in no training


class BuiltinChat(Task):
    """`size` conversations of one kind; train and test draw from different random streams."""

    def __init__(self, kind: str, size: int, split: str = "train", **slicing):
        super().__init__(**slicing)
        self.kind, self.size, self.split = kind, size, split

    def num_examples(self) -> int:
        return self.size

    def get_example(self, index: int) -> dict:
        rng, options = random.Random(f"{self.kind} {self.split} {index}"), {}
        if self.kind in CALCULATIONS:
            options["test"] = self.split == "test"
        return GENERATORS[self.kind](rng, **options)


class Arithmetic(NumberTask):
    """Calculations to be done with the calculator, of numbers larger than those in finetuning: what reinforcement learning
    can teach. The answer ends in "#### n"."""

    def __init__(self, size: int, split: str, **slicing):
        super().__init__(**slicing)
        self.size, self.split = size, split

    def num_examples(self) -> int:
        return self.size

    def get_example(self, index: int) -> dict:
        return synthetic.sums(random.Random(f"large {self.split} {index}"), self.split == "test", synthetic.LARGE)


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
