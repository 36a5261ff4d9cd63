"""ARC (allenai/ai2_arc, arXiv 1803.05457): grade-school science questions, ARC-Easy and ARC-Challenge."""

from tasks.common import LetterTask, load_hub_dataset


class ARC(LetterTask):
    def __init__(self, subset: str, split: str, **slicing):
        super().__init__(**slicing)
        self.rows = load_hub_dataset("allenai/ai2_arc", subset, split)

    def num_examples(self) -> int:
        return len(self.rows)

    def get_example(self, index: int) -> dict:
        row = self.rows[index]
        return self.conversation(row["question"], list(row["choices"]["label"]), row["choices"]["text"],
                                 row["answerKey"])
