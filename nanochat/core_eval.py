"""CORE (DCLM, arXiv 2406.11794): 22 in-context-learning tasks, their accuracy above guessing averaged.

Data is shuffled with seed 1337, then cut; an item's examples are drawn from the other items that are left, with seed
1234 + its index.
"""

import csv
import os
import random
import shutil
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import yaml
from filelock import FileLock

from nanochat import hub
from nanochat.choice_scoring import BATCH_TOKENS, Question, Score, make_batches, score_batch
from nanochat.common import UserError, get_base_dir, read_jsonl

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
KINDS = ("multiple_choice", "schema", "language_modeling")
GPT2_SIZES = {"gpt2": "124M", "gpt2-medium": "355M", "gpt2-large": "774M", "gpt2-xl": "1558M"}


# --- the bundle -----------------------------------------------------------------------------------------------------


def bundle_dir() -> Path:
    """The folder with core.yaml: $NANOCHAT_EVAL_BUNDLE, else in the base directory, fetched if it is not there."""
    own = os.environ.get("NANOCHAT_EVAL_BUNDLE")
    if own:
        if not (Path(own) / "core.yaml").exists():
            raise UserError(f"NANOCHAT_EVAL_BUNDLE={own}: there is no core.yaml in it")
        return Path(own)
    folder = get_base_dir() / "eval_bundle"
    with FileLock(f"{folder}.lock"):
        if not (folder / "core.yaml").exists():
            archive = hub.download(os.environ.get("NANOCHAT_EVAL_BUNDLE_URL") or BUNDLE_URL, folder.with_suffix(".zip"))
            _unpack(archive, folder)
    return folder


def bundle_in_reach() -> bool:
    """Whether `bundle_dir` would probably find one; a look of seconds, without retries."""
    return bool(os.environ.get("NANOCHAT_EVAL_BUNDLE")) or (get_base_dir() / "eval_bundle" / "core.yaml").exists() or (
        hub.is_reachable(os.environ.get("NANOCHAT_EVAL_BUNDLE_URL") or BUNDLE_URL))


def _unpack(archive: Path, folder: Path) -> None:
    """To a temporary name first, so that the folder is whole when it is there; the archive goes."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as file:
            file.extractall(temporary)
    except zipfile.BadZipFile as error:
        archive.unlink()
        raise UserError(f"{archive} was no zip archive ({error}): run the command again") from None
    content = temporary / "eval_bundle" if (temporary / "eval_bundle").is_dir() else temporary
    if not (content / "core.yaml").exists():
        archive.unlink()
        raise UserError(f"{archive} held no core.yaml: check NANOCHAT_EVAL_BUNDLE_URL")
    shutil.rmtree(folder, ignore_errors=True)
    content.rename(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    archive.unlink()


@dataclass(frozen=True)
class CoreTask:
    """One task: how its items become prompts, and the accuracy of guessing."""

    label: str
    kind: str
    path: Path
    shots: int
    delimiter: str
    baseline: float

    def centered(self, accuracy: float) -> float:
        """(accuracy - baseline) / (1 - baseline)."""
        return (accuracy - self.baseline) / (1 - self.baseline)


def load_tasks(folder: Path) -> list[CoreTask]:
    """The tasks of core.yaml, in its order."""
    try:
        with open(folder / "eval_meta_data.csv", newline="") as file:
            baselines = {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in csv.DictReader(file)}
        entries = yaml.safe_load((folder / "core.yaml").read_text())["icl_tasks"]
        return [CoreTask(e["label"], e["icl_task_type"], folder / "eval_data" / e["dataset_uri"], e["num_fewshot"][0],
                         e.get("continuation_delimiter", " "), baselines[e["label"]]) for e in entries]
    except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"the bundle in {folder} is not whole ({type(error).__name__}: {error}): delete it and run the "
                        "command again") from error


def load_items(task: CoreTask, max_items: int | None = None) -> list[dict]:
    """Items of a task, shuffled, the first `max_items` of them."""
    items = [value for _, value in read_jsonl(task.path)]
    random.Random(1337).shuffle(items)
    return items[:max_items]


def gpt2_scores(folder: Path) -> dict[str, dict[str, float]]:
    """Published accuracies of GPT-2: name -> task -> accuracy."""
    scores = {}
    for name in GPT2_SIZES:
        with open(folder / f"openai-community-{name}.csv", newline="") as file:
            rows = [[cell.strip() for cell in row] for row in csv.reader(file)]
        scores[name] = {label: float(accuracy) for label, accuracy, _ in rows[1:] if accuracy}
    return scores


def core_metric(tasks: list[CoreTask], accuracies: dict[str, float]) -> float:
    """Mean centered accuracy."""
    return sum(task.centered(accuracies[task.label]) for task in tasks) / len(tasks)


# --- from items to questions ------------------------------------------------------------------------------------------


def _solved(task: CoreTask, item: dict) -> str:
    """An item with its right answer, as an example."""
    if task.kind == "multiple_choice":
        return f"{item['query']}{task.delimiter}{item['choices'][item['gold']]}"
    if task.kind == "schema":
        return f"{item['context_options'][item['gold']]}{task.delimiter}{item['continuation']}"
    return f"{item['context'].strip()}{task.delimiter}{item['continuation']}"


def render(task: CoreTask, items: list[dict], index: int) -> list[str]:
    """Texts of an item, its examples before it: one a choice; for language modeling the text without the continuation,
    then with it."""
    others = [i for i in range(len(items)) if i != index]
    chosen = random.Random(1234 + index).sample(others, min(task.shots, len(others)))
    before = "".join(_solved(task, items[i]) + "\n\n" for i in chosen)
    item = items[index]
    if task.kind == "multiple_choice":
        return [f"{before}{item['query']}{task.delimiter}{choice}" for choice in item["choices"]]
    if task.kind == "schema":
        return [f"{before}{context}{task.delimiter}{item['continuation']}" for context in item["context_options"]]
    whole = before + _solved(task, item)
    return [whole[:len(whole) - len(item["continuation"])].strip(), whole]


def _common_length(rows: list[np.ndarray]) -> int:
    """Tokens that all rows begin with in common."""
    shortest = min(map(len, rows))
    stacked = np.stack([row[:shortest] for row in rows])
    differs = np.flatnonzero((stacked != stacked[0]).any(axis=0))
    return int(differs[0]) if len(differs) else shortest


def to_question(task: CoreTask, rows: list[np.ndarray], gold: int, limit: int | None) -> Question:
    """Which tokens of the encoded texts are scored: of choices what comes after their common beginning, of schemas their
    common end, of language modeling the continuation. Rows over `limit` tokens lose their beginning."""
    if task.kind == "language_modeling":
        without, row = rows
        if not np.array_equal(without, row[:len(without)]):  # the tokenizer joins the two across the border
            without = without[:_common_length(rows)]
        rows, starts = [row], [min(len(without), len(row) - 1)]
    elif task.kind == "multiple_choice":
        starts = [min(_common_length(rows), len(row) - 1) for row in rows]
    else:
        common = min(_common_length([row[::-1] for row in rows]), *(len(row) - 1 for row in rows))
        starts = [len(row) - max(1, common) for row in rows]
    if limit is not None:
        cuts = [max(0, len(row) - limit) for row in rows]
        rows, starts = [row[cut:] for row, cut in zip(rows, cuts)], [max(1, s - cut) for s, cut in zip(starts, cuts)]
    return Question(tuple(rows), tuple(starts), gold)


def make_questions(task: CoreTask, tokenizer, max_items: int | None, limit: int | None) -> list[Question]:
    """All questions of a task."""
    items = load_items(task, max_items)
    texts = [render(task, items, index) for index in range(len(items))]
    encoded = iter(tokenizer.encode([text for some in texts for text in some], prepend=tokenizer.get_bos_token_id(),
                                    num_threads=os.cpu_count() or 1))
    return [to_question(task, [np.array(next(encoded), dtype=np.int32) for _ in some], item.get("gold", 0), limit)
            for some, item in zip(texts, items)]


# --- evaluation -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TaskResult:
    """Accuracy of a task, and the verdicts by item: right or wrong, which row was chosen."""

    label: str
    accuracy: float
    centered: float
    right: list[bool]
    chosen: list[int]
    seconds: float
    model_seconds: float


def verdict(task: CoreTask, question: Question, score: Score) -> tuple[bool, int]:
    """(right, chosen row): the row of the lowest mean loss; for language modeling whether every token was the likeliest."""
    if task.kind == "language_modeling":
        return score.hits[0], 0
    chosen = min(range(len(score.losses)), key=score.losses.__getitem__)
    return chosen == question.gold, chosen


def deal_out(costs: list[int], world_size: int) -> list[int]:
    """The rank of each batch: the dearest first, each to the rank that has least to do."""
    loads, ranks = [0] * world_size, [0] * len(costs)
    for i in sorted(range(len(costs)), key=costs.__getitem__, reverse=True):
        ranks[i] = min(range(world_size), key=loads.__getitem__)
        loads[ranks[i]] += costs[i]
    return ranks


def evaluate_questions(task: CoreTask, questions: list[Question], model, runtime, scorer=score_batch,
                       budget: int | None = None, sharing: bool = True) -> TaskResult:
    """Accuracy over some questions, dealt out to the ranks; `scorer`, `budget` and `sharing` are those of choice_scoring."""
    start, in_model = time.perf_counter(), 0.0
    batches = make_batches(questions, budget or BATCH_TOKENS.get(runtime.device.type, 2**13), sharing)
    owners = deal_out([sum(questions[i].cost for i in batch) for batch in batches], runtime.world_size)
    verdicts = torch.zeros(2, len(questions), dtype=torch.float32)
    for batch, owner in zip(batches, owners):
        if owner == runtime.rank:
            began = time.perf_counter()
            scores = scorer(model, [questions[i] for i in batch])
            in_model += time.perf_counter() - began
            for i, score in zip(batch, scores):
                verdicts[:, i] = torch.tensor(verdict(task, questions[i], score))
    right, chosen = runtime.sum_tensor(verdicts).tolist()
    accuracy = sum(right) / len(right)
    return TaskResult(task.label, accuracy, task.centered(accuracy), [r > 0 for r in right], [int(c) for c in chosen],
                      time.perf_counter() - start, in_model)


class CoreEvaluation:
    """All tasks, their questions prepared once, in the background while the model works on the ones before.

    `limit`: longer prompts are cut to their last so many tokens; None leaves them as they are. `keep`: the questions stay in
    memory for the next time.
    """

    def __init__(self, tokenizer, max_items: int | None = None, limit: int | None = None, keep: bool = False):
        self.folder = bundle_dir()
        self.tasks, self.limit = load_tasks(self.folder), limit
        self._questions = lru_cache(maxsize=None if keep else 2)(
            lambda task: make_questions(task, tokenizer, max_items, limit))

    def run(self, model, runtime, done: dict[str, TaskResult] | None = None, each=lambda result: None, **options) -> dict:
        """Label -> TaskResult of all tasks, those in `done` taken as they are; `each` is called with every new one."""
        results = dict(done or {})
        tasks = [task for task in self.tasks if task.label not in results]
        with ThreadPoolExecutor(1) as background:
            coming = background.submit(self._questions, tasks[0]) if tasks else None
            for i, task in enumerate(tasks):
                questions = coming.result()
                if i + 1 < len(tasks):
                    coming = background.submit(self._questions, tasks[i + 1])
                results[task.label] = evaluate_questions(task, questions, model, runtime, **options)
                each(results[task.label])
        return results

    def policy(self) -> str:
        """What becomes of long prompts, in words."""
        return "as they are, however long" if self.limit is None else f"cut to their last {self.limit} tokens"

    def metric(self, results: dict[str, TaskResult]) -> float:
        return core_metric(self.tasks, {label: result.accuracy for label, result in results.items()})
