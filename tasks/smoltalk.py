"""SmolTalk (HuggingFaceTB/smol-smoltalk): general conversations."""

from tasks.common import Task, load_hub_dataset


class SmolTalk(Task):
    def __init__(self, split: str, **slicing):
        super().__init__(**slicing)
        self.rows = load_hub_dataset("HuggingFaceTB/smol-smoltalk", "default", split)

    def num_examples(self) -> int:
        return len(self.rows)

    def get_example(self, index: int) -> dict:
        return {"messages": self.rows[index]["messages"]}
