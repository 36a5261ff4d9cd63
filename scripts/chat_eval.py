"""Evaluate a chat model on tasks.

python -m scripts.chat_eval -i sft
python -m scripts.chat_eval -i sft -a SpellingBee,GSM8K -x 100
"""

import json
from dataclasses import asdict

from nanochat.chat_eval import Accuracy, chatcore_metric, evaluate_task
from nanochat.checkpoint_manager import SOURCES, load_model, locate_model
from nanochat.common import (Parser, add_model_flags, add_runtime_flags, announced, compute_cleanup, compute_init, get_base_dir,
                             integer, number, print0, run_script)
from nanochat.results import FinishedTasks
from tasks.common import hub_data_available
from tasks.registry import CHATCORE, NEEDS_HUB, make_task, parse_task_names


def main(argv=None) -> dict:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("-i", "--source", choices=SOURCES, default="sft", help="which stage's model")
    parser.add_argument("-a", "--task-name", default=None, help="tasks, with commas or |; all of ChatCORE when left out")
    add_model_flags(parser)
    add_runtime_flags(parser)
    parser.add_argument("-t", "--temperature", type=number(0, 2), default=0.0, help="0: the likeliest token")
    parser.add_argument("-k", "--top-k", type=integer(0), default=50, help="sample among so many tokens; 0: all")
    parser.add_argument("-m", "--max-new-tokens", type=integer(1), default=512, help="of each answer")
    parser.add_argument("-n", "--num-samples", type=integer(1), default=1, help="answers a problem; one right is a pass")
    parser.add_argument("-b", "--batch-size", type=integer(1), default=32, help="problems at a time")
    parser.add_argument("-x", "--max-problems", type=integer(1), default=None, help="of each task; all when left out")
    args = parser.parse_args(argv)
    names = parse_task_names(args.task_name)
    if args.task_name is None and not hub_data_available():
        left_out = [name for name in names if name in NEEDS_HUB]
        names = [name for name in names if name not in NEEDS_HUB]
        print0(f"the hub is out of reach: {', '.join(left_out)} left out, so there is no ChatCORE")

    directory, _, _ = locate_model(args.source, args.model_tag, args.step)
    runtime = compute_init(args.device_type)
    model, tokenizer, meta = load_model(args.source, runtime.device, "eval", args.model_tag, args.step, runtime.dtype)
    file = get_base_dir() / "chat_eval" / f"{args.source}_{meta['tag']}_{meta['step']:06d}.json"
    weights = directory / f"model_{meta['step']:06d}.pt"
    finished = FinishedTasks(file.with_suffix(".unfinished.jsonl"), vars(args) | {
        "task_name": None, "version": weights.stat().st_mtime_ns, "dtype": runtime.dtype_name}, runtime.is_main)
    accuracies = {name: Accuracy(**result) for name, result in finished.done.items() if name in names}
    if accuracies:
        print0(f"finished already: {', '.join(accuracies)}")
    for name in names:
        if name not in accuracies:
            with announced(name):
                accuracies[name] = evaluate_task(
                    model, tokenizer, make_task(name), runtime, max_problems=args.max_problems, batch_size=args.batch_size,
                    num_samples=args.num_samples, temperature=args.temperature, top_k=args.top_k or None,
                    max_new_tokens=min(args.max_new_tokens, model.config.sequence_len - 1))
            finished.add(name, asdict(accuracies[name]))

    print0(f"\n{args.source} model {meta['tag']}, step {meta['step']}")
    print0(f"{'task':<16}{'right':>7}{'of':>7}{'accuracy':>10}{'+-':>8}{'centered':>10}")
    for name in names:
        a = accuracies[name]
        print0(f"{name:<16}{a.correct:>7}{a.total:>7}{a.accuracy:>10.2%}{a.standard_error:>8.2%}{a.centered:>10.4f}")
    results = {name: accuracies[name].accuracy for name in names}
    metric = chatcore_metric({name: accuracies[name] for name in names}, CHATCORE)
    if metric is not None:
        results["ChatCORE"] = metric
        print0(f"ChatCORE (mean centered accuracy of {len(CHATCORE)} tasks): {metric:.4f}")
    if runtime.is_main:
        table = {name: asdict(accuracies[name]) | {"accuracy": accuracies[name].accuracy, "centered": accuracies[name].centered,
                                                   "standard_error": accuracies[name].standard_error} for name in names}
        file.write_text(json.dumps({"source": args.source, "tag": meta["tag"], "step": meta["step"], "num_samples": args.num_samples,
                                    "temperature": args.temperature, "tasks": table, "chatcore": metric}, indent=1))
    finished.close()
    print0(f"in {file}")
    compute_cleanup()
    return results


if __name__ == "__main__":
    run_script(main)
