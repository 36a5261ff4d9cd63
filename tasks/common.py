"""What a task is: conversations by index, sliced, mixed or in sequence; and how its data is loaded."""

import json
import os
import random
from pathlib import Path

from filelock import FileLock

from nanochat import hub
from nanochat.common import UserError, get_base_dir, read_json


class Task:
    """A list of conversations; subclasses give `num_examples`, `get_example`, and for evaluation `evaluate`.

    `start`, `stop`, `step` slice it. eval_type is "categorical" (conversations carry "letters") or "generative";
    `baseline` is the accuracy of guessing.
    """

    eval_type = "generative"
    baseline = 0.0

    def __init__(self, start: int = 0, stop: int | None = None, step: int = 1):
        self._slice = slice(start, stop, step)

    def num_examples(self) -> int:
        raise NotImplementedError

    def get_example(self, index: int) -> dict:
        raise NotImplementedError

    def evaluate(self, conversation: dict, response: str) -> bool:
        raise NotImplementedError

    def reward(self, conversation: dict, response: str) -> float:
        """What reinforcement learning is to make larger: 1 for a right answer, unless a task says otherwise."""
        return float(self.evaluate(conversation, response))

    def _indices(self) -> range:
        return range(self.num_examples())[self._slice]

    def __len__(self) -> int:
        return len(self._indices())

    def __getitem__(self, index: int) -> dict:
        return self.get_example(self._indices()[index])


class TaskMixture(Task):
    """All conversations of several tasks, shuffled once by `seed`; list a task twice to see it twice an epoch."""

    def __init__(self, tasks: list[Task], seed: int = 42, **slicing):
        super().__init__(**slicing)
        self.tasks = tasks
        self._order = [(t, i) for t, task in enumerate(tasks) for i in range(len(task))]
        random.Random(seed).shuffle(self._order)

    def num_examples(self) -> int:
        return len(self._order)

    def get_example(self, index: int) -> dict:
        task, i = self._order[index]
        return self.tasks[task][i]


class TaskSequence(Task):
    """Several tasks one after the other: a curriculum."""

    def __init__(self, tasks: list[Task], **slicing):
        super().__init__(**slicing)
        self.tasks = tasks

    def num_examples(self) -> int:
        return sum(map(len, self.tasks))

    def get_example(self, index: int) -> dict:
        for task in self.tasks:
            if index < len(task):
                return task[index]
            index -= len(task)
        raise IndexError(index)


def render_mc(question: str, letters: list[str], choices: list[str]) -> str:
    """A multiple-choice question as a user message; `=LETTER` makes the letter a token of its own."""
    lines = [question, *(f"- {choice}={letter}" for letter, choice in zip(letters, choices))]
    return "\n".join(lines) + "\n\nAnswer with the letter of the right choice only."


class LetterTask(Task):
    """A multiple-choice task: the answer is a letter."""

    eval_type = "categorical"
    baseline = 0.25

    @staticmethod
    def conversation(question: str, letters: list[str], choices: list[str], answer: str) -> dict:
        return {"messages": [{"role": "user", "content": render_mc(question, letters, choices)},
                             {"role": "assistant", "content": answer}], "letters": letters}

    def evaluate(self, conversation: dict, response: str) -> bool:
        return response == conversation["messages"][-1]["content"]


# --- data ---------------------------------------------------------------------------------------------------------


def load_hub_dataset(repo: str, subset: str, split: str):
    """A split of a hub data set, rows as dicts by index; UserError if it cannot be had.

    $NANOCHAT_DATASETS_DIR/<org>/<name>/<subset>/<split>.parquet is read in its place when that variable is set.
    """
    import datasets  # slow to import

    mirror = os.environ.get("NANOCHAT_DATASETS_DIR")
    if mirror:
        path = Path(mirror).expanduser() / repo / subset / f"{split}.parquet"
        if not path.exists():
            raise UserError(f"{path} is missing: put the split there, or unset NANOCHAT_DATASETS_DIR")
        try:
            return datasets.Dataset.from_parquet(str(path), cache_dir=str(get_base_dir() / "datasets"))
        except Exception as error:  # the library raises many kinds
            raise UserError(f"{path} cannot be read ({str(error).splitlines()[0]}): put a whole copy there") from error
    name = None if subset == "default" else subset
    with FileLock(get_base_dir() / f"{repo.replace('/', '--')}.lock"):
        try:
            return datasets.load_dataset(repo, name, split=split, revision=_pinned_revision(repo))
        except Exception as error:  # the library raises many kinds
            raise UserError(f"data set {repo} ({subset}, {split}) cannot be had: {str(error).splitlines()[0]}; check "
                            "the network and HF_ENDPOINT, or set NANOCHAT_DATASETS_DIR") from error


def _pinned_revision(repo: str) -> str | None:
    """The commit of a data set that this base directory uses: looked up once, kept in datasets.json."""
    path = get_base_dir() / "datasets.json"
    pins = read_json(path) or {}
    if repo not in pins and not hub.is_offline():
        import huggingface_hub

        pins[repo] = huggingface_hub.HfApi(endpoint=hub.endpoint()).dataset_info(repo).sha
        path.write_text(json.dumps(pins, indent=1))
    return pins.get(repo)


def hub_data_available() -> bool:
    """Whether hub data sets may be had: from a mirror, from the cache of earlier downloads, or over the network."""
    return bool(os.environ.get("NANOCHAT_DATASETS_DIR")) or hub.is_offline() and (
        get_base_dir() / "datasets.json").exists() or hub.is_reachable()
