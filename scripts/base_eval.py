"""Evaluate a base model: CORE, bits per byte on both splits, and samples.

python -m scripts.base_eval --eval core,bpb,sample
torchrun --standalone --nproc_per_node=8 -m scripts.base_eval -- --eval core
python -m scripts.base_eval --hf-path openai-community/gpt2
"""

import csv
import json
import re
import time
from dataclasses import asdict
from pathlib import Path

from nanochat import huggingface
from nanochat.checkpoint_manager import load_model, locate_model
from nanochat.common import (Parser, UserError, add_model_flags, add_runtime_flags, compute_cleanup, compute_init, get_base_dir,
                             integer, print0, read_json, run_script)
from nanochat.core_eval import (GPT2_SIZES, CoreEvaluation, TaskResult, bundle_in_reach, core_metric, gpt2_scores,
                                load_items)
from nanochat.dataloader import fixed_rows
from nanochat.dataset import find_corpus
from nanochat.engine import Engine
from nanochat.loss_eval import evaluate_bpb
from nanochat.results import FinishedTasks

EVALUATIONS = ("core", "bpb", "sample")
LONG_PROMPTS = ("as-is", "trim")
PROMPTS = ("Paris is a city in", "Water freezes when", "The first three months are January,", "She opened the door and",
           "Two plus three is", "This function returns")


def parse_evaluations(args) -> list[str]:
    names = EVALUATIONS if args.eval is None else [name.strip() for name in args.eval.split(",")]
    unknown = [name for name in names if name not in EVALUATIONS]
    if unknown:
        raise UserError(f"--eval={args.eval}: {', '.join(unknown)} is not one of {', '.join(EVALUATIONS)}")
    if args.hf_path and args.eval and set(names) != {"core"}:
        raise UserError("--hf-path goes with --eval core: bits per byte and samples are for models of this repository")
    return ["core"] if args.hf_path else list(names)


def evaluate_core(evaluation: CoreEvaluation, model, runtime, name: str, settings: dict, per_example: str | None,
                  **options) -> dict:
    """CORE with a line a task; goes on where the same evaluation was interrupted; writes the table -> task -> accuracy."""
    folder = get_base_dir() / "base_eval"
    finished = FinishedTasks(folder / f"{name}.unfinished.jsonl", settings, runtime.is_main)
    done = {label: TaskResult(**result) for label, result in finished.done.items()}
    print0(f"CORE: {len(evaluation.tasks)} tasks, prompts {evaluation.policy()}"
           + (f"; {len(done)} tasks are finished already" if done else ""))

    def each(result: TaskResult) -> None:
        finished.add(result.label, asdict(result))
        print0(f"  {result.label:34s} accuracy {result.accuracy:.4f}  centered {result.centered:7.4f}  "
               f"{len(result.right):6,d} items  {result.seconds:6.1f} s, {1 - result.model_seconds / result.seconds:.0%} not the model")

    start, before = time.perf_counter(), set(done)
    results = evaluation.run(model, runtime, done, each, **options)
    seconds = time.perf_counter() - start
    in_model = sum(result.model_seconds for label, result in results.items() if label not in before)
    accuracies = {label: result.accuracy for label, result in results.items()}
    core = evaluation.metric(results)
    if runtime.is_main:
        write_table(folder / f"{name}.csv", evaluation, results, core)
        if per_example:
            write_examples(Path(per_example), evaluation, results, settings["max_per_task"])
    finished.close()
    print0(f"{seconds:.1f} s, {1 - in_model / seconds:.0%} of them not the model")
    print0(f"CORE {core:.4f}, in {folder / f'{name}.csv'}")
    return {"core": core, "core_tasks": accuracies}


def write_table(path: Path, evaluation: CoreEvaluation, results: dict[str, TaskResult], core: float) -> None:
    """Accuracy and centered accuracy by task, next to GPT-2's; the last row is CORE."""
    published = gpt2_scores(evaluation.folder)
    sizes = [f"GPT-2 {size}" for size in GPT2_SIZES.values()]
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["task", "accuracy", "centered", *sizes])
        for task in evaluation.tasks:
            result = results[task.label]
            writer.writerow([task.label, f"{result.accuracy:.6f}", f"{result.centered:.6f}",
                             *(f"{task.centered(scores[task.label]):.6f}" for scores in published.values())])
        writer.writerow(["CORE", "", f"{core:.6f}", *(f"{core_metric(evaluation.tasks, scores):.6f}" for scores in published.values())])
    gpt2 = ", ".join(f"{size} {core_metric(evaluation.tasks, scores):.4f}" for size, scores in zip(sizes, published.values()))
    print0(f"for comparison: {gpt2}")


def write_examples(path: Path, evaluation: CoreEvaluation, results: dict[str, TaskResult], max_items: int | None) -> None:
    with open(path, "w") as file:
        for task in evaluation.tasks:
            result = results[task.label]
            for index, (item, right, chosen) in enumerate(zip(load_items(task, max_items), result.right, result.chosen)):
                file.write(json.dumps({"task": task.label, "index": index, "right": right, "chosen": chosen, "item": item}) + "\n")
    print0(f"every example in {path}")


def main(argv=None) -> dict:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--eval", default=None, help=f"comma-separated: {', '.join(EVALUATIONS)}; all that can be had when left out")
    add_model_flags(parser)
    add_runtime_flags(parser)
    parser.add_argument("--hf-path", default=None, metavar="DIR_OR_ID", help="CORE of a Hugging Face model instead")
    parser.add_argument("--max-per-task", type=integer(1, off=-1), default="-1", help="items of each CORE task; -1: all")
    parser.add_argument("--long-prompts", choices=LONG_PROMPTS, default="as-is",
                        help="of CORE, beyond the model's context: as they are, or cut to their end; moves squad by points")
    parser.add_argument("--per-example", default=None, metavar="FILE", help="write CORE's verdict on every item there, as jsonl")
    parser.add_argument("--device-batch-size", type=integer(1), default=32, help="rows a device takes at a time for bpb")
    parser.add_argument("--split-tokens", type=integer(1), default=40 * 2**19, help="tokens of each split for bpb")
    parser.add_argument("--max-new-tokens", type=integer(1), default=32, help="of each sample")
    parser.add_argument("--data-dir", default=None, help="folder in place of the corpus")
    args = parser.parse_args(argv)
    wanted = parse_evaluations(args)
    corpus = find_corpus(args.data_dir) if "bpb" in wanted else None

    if not args.hf_path:
        directory, meta, _ = locate_model("base", args.model_tag, args.step)
    runtime = compute_init(args.device_type)
    if args.hf_path:
        model, tokenizer, limit = huggingface.load_huggingface(args.hf_path, runtime.device, runtime.dtype)
        name, version = re.sub(r"[^\w.-]+", "-", args.hf_path.strip("/.")), None
        options = {"scorer": huggingface.score_huggingface, "budget": huggingface.BATCH_TOKENS.get(runtime.device.type, 2**11),
                   "sharing": False}
        results = {"hf_path": args.hf_path}
    else:
        model, tokenizer, meta = load_model("base", runtime.device, "eval", args.model_tag, args.step, runtime.dtype)
        limit = model.config.sequence_len if args.long_prompts == "trim" else None
        name, options = f"{meta['tag']}_{meta['step']:06d}", {}
        version = (directory / f"model_{meta['step']:06d}.pt").stat().st_mtime_ns
        results = {"tag": meta["tag"], "step": meta["step"]}

    if "core" in wanted:
        settings = {"model": name, "version": version, "max_per_task": args.max_per_task, "limit": limit,
                    "dtype": runtime.dtype_name}
        reachable = bundle_in_reach()
        if args.eval is not None and not reachable:
            raise UserError("--eval core: its data is out of reach (set NANOCHAT_EVAL_BUNDLE to a copy of the bundle)")
        if not reachable:
            print0("CORE: left out, its data is out of reach (NANOCHAT_EVAL_BUNDLE names a copy)")
        else:
            evaluation = CoreEvaluation(tokenizer, args.max_per_task, limit)
            results |= evaluate_core(evaluation, model, runtime, name, settings, args.per_example, **options)

    if "bpb" in wanted:
        length = model.config.sequence_len
        for split in ("train", "val"):
            rows = fixed_rows(tokenizer, getattr(corpus, split), length, max(1, args.split_tokens // length))
            results[f"{split}_bpb"] = evaluate_bpb(model, rows[:, :-1], rows[:, 1:], tokenizer.token_bytes(), runtime,
                                                   args.device_batch_size)
            print0(f"{split} bpb: {results[f'{split}_bpb']:.4f} ({rows[:, 1:].numel():,} tokens of {corpus.name})")

    if "sample" in wanted and runtime.is_main:
        engine = Engine(model, tokenizer)
        results["samples"] = []
        for prompt in PROMPTS:
            (ids,), _ = engine.generate_batch(tokenizer.encode(prompt, prepend="<|bos|>"), temperature=0,
                                              max_tokens=args.max_new_tokens)
            results["samples"].append(tokenizer.decode(ids[1:]))
        print0("samples, conditioned:")
        for text in results["samples"]:
            print0(f"  {text!r}")
        print0("samples, unconditioned:")
        ids, _ = engine.generate_batch([tokenizer.get_bos_token_id()], num_samples=4, max_tokens=64)
        for sample in ids:
            print0(f"  {tokenizer.decode(sample[1:])!r}")
    if runtime.is_main:
        file = get_base_dir() / "base_eval" / f"{name}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps((read_json(file) or {}) | results | {"max_per_task": args.max_per_task}, indent=1))
    compute_cleanup()
    return results


if __name__ == "__main__":
    run_script(main)
