"""Rollouts of reinforcement learning: the answers to many questions at once, against one question after another.

python -m dev.bench_rollouts --task SpellingBee --num-samples 4
"""

import time
from dataclasses import replace

from nanochat.checkpoint_manager import load_model
from nanochat.common import Parser, add_model_flags, add_runtime_flags, compute_init, integer, run_script
from nanochat.rollout import Sampler, Settings
from tasks.registry import RL_TASKS


def main(argv=None) -> dict:
    parser = Parser(description=__doc__.splitlines()[0])
    add_model_flags(parser)
    add_runtime_flags(parser)
    parser.add_argument("--task", choices=RL_TASKS, default="SpellingBee")
    parser.add_argument("--questions", type=integer(1), default=32)
    parser.add_argument("--num-samples", type=integer(1), default=8, help="answers a question")
    parser.add_argument("--max-new-tokens", type=integer(1), default=128)
    parser.add_argument("--sample-batch-size", type=integer(1), default=64)
    parser.add_argument("--repeats", type=integer(1), default=3)
    args = parser.parse_args(argv)
    runtime = compute_init(args.device_type)
    model, tokenizer, _ = load_model("sft", runtime.device, "train", args.model_tag, args.step, runtime.dtype)
    task, questions = RL_TASKS[args.task](), range(args.questions)
    settings = Settings(args.num_samples, args.max_new_tokens, 1.0, 50, args.sample_batch_size)
    ways = {  # questions at a time, answers written at a time
        "many questions at once": ([list(questions)], settings),
        "a question after the other, its answers at once": ([[q] for q in questions], replace(settings, batch_size=args.num_samples)),
        "an answer after the other": ([[q] for q in questions], replace(settings, batch_size=1)),
    }
    samplers = {way: Sampler(model, tokenizer) for way in ways}  # each with a cache of its own size
    seconds, answers = {way: [] for way in ways}, {}
    for _ in range(args.repeats):
        for way, (groups, how) in ways.items():
            samplers[way].refresh()
            start = time.perf_counter()
            parts = [samplers[way].sample(task, group, how, 0) for group in groups]
            seconds[way].append(time.perf_counter() - start)
            answers[way] = [sample.tokens for part in parts for group in part for sample in group]
    first = next(iter(ways))
    count = len(answers[first])
    print(f"{args.task}, {args.questions} questions x {args.num_samples} answers, {runtime.dtype_name}, median of {args.repeats}")
    for way in ways:
        took = sorted(seconds[way])[args.repeats // 2]
        equal = sum(a == b for a, b in zip(answers[way], answers[first]))
        print(f"{way:<50}{took:>7.2f} s{count / took:>9.1f} answers/s, {took / sorted(seconds[first])[args.repeats // 2]:>5.1f} x the time, "
              f"{equal} of {count} answers equal")
    return {way: sorted(values)[args.repeats // 2] for way, values in seconds.items()}


if __name__ == "__main__":
    run_script(main)
