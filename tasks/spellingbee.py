"""Spelling words and counting their letters. One word in ten is for the tests alone, so that they are never seen."""

import os
import random
import re
from pathlib import Path

from nanochat import hub
from nanochat.common import UserError, get_base_dir, print0
from nanochat.dataset import builtin_words
from nanochat.synthetic import count_letters, is_test_word, spell_word
from tasks.common import Task
from tasks.gsm8k import NumberTask

WORDS_URL = "https://raw.githubusercontent.com/dwyl/english-words/master/words_alpha.txt"


def load_words() -> list[str]:
    """English words of 3 to 12 letters: words_alpha.txt from the mirror, the base directory or the network; without a
    network the words of the built-in corpus."""
    path = get_base_dir() / "words_alpha.txt"
    mirror = os.environ.get("NANOCHAT_DATASETS_DIR")
    if mirror and (Path(mirror).expanduser() / "dwyl/english-words/words_alpha.txt").exists():
        path = Path(mirror).expanduser() / "dwyl/english-words/words_alpha.txt"
    if not path.exists() and hub.is_reachable(WORDS_URL):
        hub.download(WORDS_URL, path)
    if path.exists():
        return [w for w in path.read_text().split() if re.fullmatch(r"[a-z]{3,12}", w)]
    words = builtin_words()
    print0(f"word list: {len(words):,} words of the built-in corpus (words_alpha.txt is out of reach)")
    return words


class _WordTask(Task):
    """Problem i of a split uses a word drawn with its own random generator."""

    def __init__(self, size: int, split: str, words: list[str] | None = None, **slicing):
        super().__init__(**slicing)
        self.size, self.split = size, split
        self.words = [w for w in words or load_words() if is_test_word(w) == (split == "test")]
        if not self.words:
            raise UserError(f"the word list has no word for the {split} split; it needs a hundred words or so")

    def num_examples(self) -> int:
        return self.size

    def get_example(self, index: int) -> dict:
        rng = random.Random(f"{type(self).__name__} {self.split} {index}")
        return self.make(rng, rng.choice(self.words))


class SpellingBee(_WordTask, NumberTask):
    """How often does a letter occur in a word? The answer ends in "#### n"."""

    make = staticmethod(count_letters)


class SimpleSpelling(_WordTask):
    """Spell a word."""

    make = staticmethod(spell_word)

    def evaluate(self, conversation: dict, response: str) -> bool:
        return response.strip() == conversation["messages"][-1]["content"]
