"""Evaluation tasks by the names that people type."""

from nanochat.common import UserError
from tasks.arc import ARC
from tasks.builtin import Arithmetic
from tasks.common import Task
from tasks.gsm8k import GSM8K
from tasks.humaneval import HumanEval
from tasks.mmlu import MMLU
from tasks.spellingbee import SimpleSpelling, SpellingBee

EVAL_TASKS = {
    "ARC-Easy": lambda: ARC("ARC-Easy", "test"),
    "ARC-Challenge": lambda: ARC("ARC-Challenge", "test"),
    "MMLU": lambda: MMLU("test"),
    "GSM8K": lambda: GSM8K("test"),
    "HumanEval": lambda: HumanEval(),
    "SpellingBee": lambda: SpellingBee(256, "test"),
    "SimpleSpelling": lambda: SimpleSpelling(256, "test"),
    "Arithmetic": lambda: Arithmetic(256, "test"),
}
RL_TASKS = {  # training problems; the problems of that name above are held out
    "GSM8K": lambda: GSM8K("train"),
    "SpellingBee": lambda: SpellingBee(20_000, "train"),
    "SimpleSpelling": lambda: SimpleSpelling(20_000, "train"),
    "Arithmetic": lambda: Arithmetic(20_000, "train"),
}
NEEDS_HUB = {"ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval"}
HUB_SPLITS = (  # repository, subset, split: all that trainings and evaluations read
    ("HuggingFaceTB/smol-smoltalk", "default", "train"), ("HuggingFaceTB/smol-smoltalk", "default", "test"),
    ("cais/mmlu", "all", "auxiliary_train"), ("cais/mmlu", "all", "test"),
    ("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test"),
    ("allenai/ai2_arc", "ARC-Easy", "test"), ("allenai/ai2_arc", "ARC-Challenge", "test"),
    ("openai/openai_humaneval", "openai_humaneval", "test"),
)
CHATCORE = ("ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee")  # what the mean is taken over


def parse_task_names(text: str | None) -> list[str]:
    """ "ARC-Easy|GSM8K" or with commas -> names; None gives all of ChatCORE; UserError for an unknown one."""
    names = list(CHATCORE) if text is None else [n.strip() for n in text.replace("|", ",").split(",") if n.strip()]
    unknown = [name for name in names if name not in EVAL_TASKS]
    if unknown or not names:
        raise UserError(f"unknown task {', '.join(unknown) or '(none)'}; there are: {', '.join(EVAL_TASKS)}")
    return names


def make_task(name: str) -> Task:
    return EVAL_TASKS[name]()
