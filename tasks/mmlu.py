"""MMLU (cais/mmlu, arXiv 2009.03300): multiple choice over 57 subjects."""

from tasks.common import LetterTask, load_hub_dataset

LETTERS = ["A", "B", "C", "D"]


class MMLU(LetterTask):
    """Splits auxiliary_train, dev, validation, test."""

    def __init__(self, split: str, **slicing):
        super().__init__(**slicing)
        self.rows = load_hub_dataset("cais/mmlu", "all", split)

    def num_examples(self) -> int:
        return len(self.rows)

    def get_example(self, index: int) -> dict:
        row = self.rows[index]
        row = row.get("train") or row  # auxiliary_train is nested in the original
        return self.conversation(row["question"], LETTERS, row["choices"], LETTERS[row["answer"]])
