"""CORE in batches against one example after the other: the same verdicts? how much faster? how much memory?

python -m dev.check_core -i sft --max-per-task 200 --exact
python -m dev.check_core --depth 6 --max-per-task 100
"""

import os
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

from nanochat.checkpoint_manager import SOURCES, load_model
from nanochat.choice_scoring import Question, Score, make_batches, score_batch
from nanochat.common import Parser, add_model_flags, compute_init, integer, run_script
from nanochat.core_eval import bundle_dir, load_tasks, make_questions, verdict
from nanochat.gpt import build_model
from nanochat.scaling import config_for_depth
from nanochat.tokenizer import RustBPETokenizer

TIE = 1e-6  # losses closer than that may be ordered either way by rounding
BUDGETS = (1024, 8192, 20000)


@torch.inference_mode()
def score_plainly(model, questions: list[Question]) -> list[Score]:
    """One question after another, all logits of all its rows: what batching has to equal."""
    scores = []
    for question in questions:
        longest = max(map(len, question.rows))
        idx = torch.tensor([[*row.tolist(), *[0] * (longest - len(row))] for row in question.rows], device=model.device)
        logits = model(idx)
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), idx[:, 1:], reduction="none")
        right = logits[:, :-1].argmax(dim=-1) == idx[:, 1:]
        spans = [slice(start - 1, len(row) - 1) for row, start in zip(question.rows, question.starts)]
        scores.append(Score(tuple(losses[i, span].mean().item() for i, span in enumerate(spans)),
                            tuple(bool(right[i, span].all()) for i, span in enumerate(spans))))
    return scores


def prepare(args):
    """Model, tasks and their questions."""
    runtime = compute_init("cpu", torch.float32 if args.exact else None)
    if args.source:
        model, tokenizer, _ = load_model(args.source, runtime.device, "eval", args.model_tag, args.step, runtime.dtype)
    else:
        tokenizer = RustBPETokenizer.from_directory(args.tokenizer)
        config = config_for_depth(args.depth, tokenizer.get_vocab_size(), 2048)
        model = build_model(config, runtime.device, runtime.dtype).for_inference()
    tasks = [task for task in load_tasks(bundle_dir()) if not args.tasks or task.label in args.tasks.split(",")]
    return runtime, model, [(task, lambda task=task: make_questions(task, tokenizer, args.max_per_task, args.limit)) for task in tasks]


def compare(args) -> dict:
    """Verdicts in batches of several sizes against those one by one."""
    _, model, tasks = prepare(args)
    report = {"examples": 0, "different": 0, "ties": 0, "worst": 0.0}
    for task, questions in tasks:
        questions = questions()
        plain = score_plainly(model, questions)
        for budget in BUDGETS:
            for batch in make_batches(questions, budget):
                for i, score in zip(batch, score_batch(model, [questions[i] for i in batch])):
                    report["examples"] += 1
                    report["worst"] = max(report["worst"], *(abs(a - b) for a, b in zip(score.losses, plain[i].losses)))
                    if verdict(task, questions[i], score) != verdict(task, questions[i], plain[i]):
                        first, second = sorted(plain[i].losses)[:2] if len(plain[i].losses) > 1 else (0.0, 1.0)
                        report["ties" if second - first < TIE else "different"] += 1
        print(f"{task.label:36s} {len(questions):4d} questions, so far {report}", flush=True)
    return report


def measure(args) -> dict:
    """Time of one way over all tasks, in this process."""
    runtime, model, tasks = prepare(args)
    model_s, start = 0.0, time.perf_counter()
    for task, questions in tasks:
        questions = questions()
        began = time.perf_counter()
        if args.way == "plain":
            score_plainly(model, questions)
        else:
            for batch in make_batches(questions, BUDGETS[1]):
                score_batch(model, [questions[i] for i in batch])
        model_s += time.perf_counter() - began
    seconds = time.perf_counter() - start
    print(f"{args.way}: {seconds:.1f} s, of these {100 * (1 - model_s / seconds):.1f} % not the model; peak memory "
          f"{runtime.peak_memory_bytes() / 2**30:.2f} GiB")
    return {"seconds": seconds, "model_seconds": model_s, "peak_bytes": runtime.peak_memory_bytes()}


def main(argv=None) -> dict:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("-i", "--source", choices=SOURCES, default=None, help="a trained model; else a random one of --depth")
    add_model_flags(parser)
    parser.add_argument("--depth", type=integer(1), default=6)
    parser.add_argument("--tokenizer", default=None, help="folder of the random model's tokenizer")
    parser.add_argument("--max-per-task", type=integer(1), default=100)
    parser.add_argument("--tasks", default=None, help="labels, with commas")
    parser.add_argument("--limit", type=integer(2), default=None, help="cut prompts to so many tokens")
    parser.add_argument("--exact", action="store_true", help="compare verdicts, in fp32, instead of times")
    parser.add_argument("--way", choices=("plain", "batched"), default=None, help="measure this one only")
    args = parser.parse_args(argv)
    if args.exact:
        return compare(args)
    if args.way:
        return measure(args)
    for way in ("batched", "plain", "batched"):
        subprocess.run([sys.executable, "-m", "dev.check_core", *(argv or sys.argv[1:]), "--way", way], check=True, env=os.environ)
    return {}


if __name__ == "__main__":
    run_script(main)
