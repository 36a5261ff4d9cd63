"""Generative evaluation with many problems at once against one after another: the same answers? how much faster?

python -m dev.check_generation --depth 6 --tokenizer DIR
"""

import time

import torch

from nanochat.common import Parser, compute_init, integer, run_script
from nanochat.engine import Engine
from nanochat.gpt import build_model
from nanochat.scaling import config_for_depth
from nanochat.tokenizer import RustBPETokenizer
from tasks.gsm8k import GSM8K


def main(argv=None) -> dict:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=integer(1), default=6, help="of a random model")
    parser.add_argument("--tokenizer", required=True, help="folder of its tokenizer")
    parser.add_argument("--problems", type=integer(1), default=64)
    parser.add_argument("--max-new-tokens", type=integer(1), default=128)
    args = parser.parse_args(argv)
    runtime = compute_init("cpu")
    tokenizer = RustBPETokenizer.from_directory(args.tokenizer)
    model = build_model(config_for_depth(args.depth, tokenizer.get_vocab_size(), 2048), runtime.device, runtime.dtype)
    with torch.no_grad():  # projections that are not zero, so that answers depend on the question
        for name, parameter in model.named_parameters():
            if "c_proj" in name or "lm_head" in name:
                parameter.normal_(std=0.05)
    model.for_inference()
    task = GSM8K("test")
    prompts = [tokenizer.render_for_completion(task[i]) for i in range(args.problems)]
    answers, seconds = {}, {}
    for batch_size in (args.problems, 1, args.problems):
        engine, start = Engine(model, tokenizer), time.perf_counter()
        completions = engine.generate_many(prompts, max_tokens=args.max_new_tokens, temperature=0, batch_size=batch_size)
        seconds.setdefault(batch_size, []).append(time.perf_counter() - start)
        answers[batch_size] = [completion.tokens for completion in completions]
        tokens = sum(map(len, answers[batch_size]))
        print(f"{batch_size:3d} at once: {seconds[batch_size][-1]:.1f} s, {tokens} tokens", flush=True)
    equal = sum(a == b for a, b in zip(answers[1], answers[args.problems]))
    ratio = seconds[1][0] / (sum(seconds[args.problems]) / 2)
    print(f"{equal} of {args.problems} answers equal, {ratio:.1f} times as fast, {runtime.dtype_name}")
    return {"equal": equal, "ratio": ratio}


if __name__ == "__main__":
    run_script(main)
