"""HumanEval (openai/openai_humaneval, arXiv 2107.03374): Python functions to be written, judged by running them."""

import re

from nanochat.execution import execute_code
from tasks.common import Task, load_hub_dataset

_FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL | re.IGNORECASE)
_IMPORT = re.compile(r"^(?:import|from)\s.*$", re.MULTILINE)


def extract_program(text: str) -> str:
    """The code of an answer: its first fenced block, or all of it where there is none."""
    fenced = _FENCED.search(text)
    return fenced[1] if fenced else text


class HumanEval(Task):
    def __init__(self, **slicing):
        super().__init__(**slicing)
        self.rows = load_hub_dataset("openai/openai_humaneval", "openai_humaneval", "test")

    def num_examples(self) -> int:
        return len(self.rows)

    def get_example(self, index: int) -> dict:
        row = self.rows[index]
        return {"messages": [{"role": "user", "content": row["prompt"]},
                             {"role": "assistant", "content": f"{row['prompt']}{row['canonical_solution']}"}],
                "entry_point": row["entry_point"], "test": row["test"]}

    def evaluate(self, conversation: dict, response: str) -> bool:
        """Runs the answer, with the imports of the question, and then the problem's tests. An answer that does not define
        the function is taken for the rest of the question."""
        prompt, name = conversation["messages"][0]["content"], conversation["entry_point"]
        program = extract_program(response)
        if not re.search(rf"^\s*(?:async\s+)?def\s+{re.escape(name)}\b", program, re.MULTILINE):
            program = prompt + program
        imports = "\n".join(_IMPORT.findall(prompt))
        return execute_code(f"{imports}\n\n{program}\n\n{conversation['test']}\n\ncheck({name})\n").success
