"""GSM8K (openai/gsm8k, arXiv 2110.14168): grade-school maths, with calculator calls."""

import re
from decimal import Decimal, InvalidOperation

from tasks.common import Task, load_hub_dataset

_ANSWER = re.compile(r"####\s*([^\n]*)")
_NUMBER = re.compile(r"-?(?:\d[\d,]*)?\.?\d+")
_CALL = re.compile(r"<<(.*?)=(.*?)>>")


def final_number(text: str) -> Decimal | None:
    """The number after the last "####": final_number("#### 3\\n#### $1,250.00") -> 1250."""
    answers = _ANSWER.findall(text)
    number = _NUMBER.search(answers[-1]) if answers else None
    try:
        return Decimal(number[0].replace(",", "")) if number else None
    except InvalidOperation:
        return None


def answer_parts(answer: str) -> list[dict]:
    """An annotated answer as assistant parts: <<48/2=24>> becomes a calculator call and its result."""
    parts, position = [], 0
    for call in _CALL.finditer(answer):
        parts += [{"type": "text", "text": answer[position:call.start()]}, {"type": "python", "text": call[1]},
                  {"type": "python_output", "text": call[2]}]
        position = call.end()
    parts.append({"type": "text", "text": answer[position:]})
    return [part for part in parts if part["text"]]


class NumberTask(Task):
    """A task whose answers end in "#### n"; n is compared as a number."""

    def evaluate(self, conversation: dict, response: str) -> bool:
        expected = final_number(conversation["messages"][-1]["content"][-1]["text"])
        return expected is not None and final_number(response) == expected


class GSM8K(NumberTask):
    def __init__(self, split: str, subset: str = "main", **slicing):
        super().__init__(**slicing)
        self.rows = load_hub_dataset("openai/gsm8k", subset, split)

    def num_examples(self) -> int:
        return len(self.rows)

    def get_example(self, index: int) -> dict:
        row = self.rows[index]
        return {"messages": [{"role": "user", "content": row["question"]},
                             {"role": "assistant", "content": answer_parts(row["answer"])}]}
