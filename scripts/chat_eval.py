"""Evaluate a chat model on tasks.

python -m scripts.chat_eval -i sft
python -m scripts.chat_eval -i sft -a SpellingBee,GSM8K -x 100
"""

from nanochat.chat_eval import evaluate_task
from nanochat.checkpoint_manager import SOURCES, load_model, locate_model
from nanochat.common import (Parser, add_model_flags, add_runtime_flags, announced, compute_cleanup, compute_init, integer,
                             number, print0, run_script)
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

    locate_model(args.source, args.model_tag, args.step)
    runtime = compute_init(args.device_type)
    model, tokenizer, meta = load_model(args.source, runtime.device, "eval", args.model_tag, args.step, runtime.dtype)
    accuracies = {}
    for name in names:
        with announced(name):
            accuracies[name] = evaluate_task(
                model, tokenizer, make_task(name), runtime, max_problems=args.max_problems, batch_size=args.batch_size,
                num_samples=args.num_samples, temperature=args.temperature, top_k=args.top_k or None,
                max_new_tokens=min(args.max_new_tokens, model.config.sequence_len - 1))

    print0(f"\n{args.source} model {meta['tag']}, step {meta['step']}")
    print0(f"{'task':<16}{'right':>7}{'of':>7}{'accuracy':>10}{'+-':>8}{'centered':>10}")
    for name, a in accuracies.items():
        print0(f"{name:<16}{a.correct:>7}{a.total:>7}{a.accuracy:>10.2%}{a.standard_error:>8.2%}{a.centered:>10.4f}")
    results = {name: a.accuracy for name, a in accuracies.items()}
    if set(CHATCORE) <= set(names):
        results["ChatCORE"] = sum(accuracies[name].centered for name in CHATCORE) / len(CHATCORE)
        print0(f"ChatCORE (mean centered accuracy of {len(CHATCORE)} tasks): {results['ChatCORE']:.4f}")
    compute_cleanup()
    return results


if __name__ == "__main__":
    run_script(main)
