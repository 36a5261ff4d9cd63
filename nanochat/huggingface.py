"""Causal language models of Hugging Face's transformers (an optional package) under CORE's scoring.

R rows of a batch, T positions, V vocabulary.
"""

import os

import numpy as np
import torch
import torch.nn.functional as F

from nanochat.choice_scoring import Question, Score
from nanochat.common import UserError

BATCH_TOKENS = {"cuda": 2**13, "cpu": 2**11}  # small: these models give logits for every position


class HuggingFaceTokenizer:
    """As much of a tokenizer as CORE needs."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def get_bos_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    def encode(self, texts: list[str], prepend: int, num_threads: int = 8) -> list[list[int]]:
        return [[prepend, *ids] for ids in self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]


def load_huggingface(path: str, device: torch.device, dtype: torch.dtype):
    """(model, tokenizer, longest prompt) of a folder or a hub id; UserError if it cannot be had."""
    try:
        import transformers
    except ImportError:
        raise UserError("--hf-path needs the package transformers: uv pip install transformers") from None
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--hf-path={path}: neither a folder nor a hub id of a causal language model "
                        f"({(str(error).splitlines() or ['?'])[0]})") from error
    return model.to(device).eval(), HuggingFaceTokenizer(tokenizer), getattr(model.config, "max_position_embeddings", 2048)


@torch.inference_mode()
def score_huggingface(model, questions: list[Question]) -> list[Score]:
    """Scores of all rows of some questions; each row is computed whole."""
    rows = [row for question in questions for row in question.rows]
    starts = [start for question in questions for start in question.starts]
    idx = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
    for i, row in enumerate(rows):
        idx[i, :len(row)] = row  # padding on the right: causal attention never looks there
    logits = model(input_ids=torch.from_numpy(idx).to(model.device)).logits
    scored = []
    for i, (row, start) in enumerate(zip(rows, starts)):
        wanted = logits[i, start - 1:len(row) - 1].float()
        target = torch.from_numpy(row[start:].astype(np.int64)).to(wanted.device)
        scored.append((F.cross_entropy(wanted, target).item(), bool((wanted.argmax(dim=-1) == target).all())))
    each = iter(scored)
    return [Score(*map(tuple, zip(*(next(each) for _ in question.rows)))) for question in questions]
