"""Training throughput of a shape, next to a matrix product measured in the same run, step by step in turn.

python -m dev.bench_train --depth 6 --head-dim 64 --window-pattern L --max-seq-len 512 --device-batch-size 32
"""

import statistics
import time

import psutil
import torch

from nanochat.common import Parser, add_runtime_flags, compute_init, integer, print0, run_script
from nanochat.gpt import build_model
from nanochat.hardware import measured_flops, peak_for
from nanochat.optim import build_optimizer
from nanochat.scaling import config_for_depth, count_parameters, flops_per_token
from nanochat.train_step import make_scaler, start_compile, train_step


def main(argv=None) -> dict:
    parser = Parser(description=__doc__.splitlines()[0])
    add_runtime_flags(parser)
    parser.add_argument("--depth", type=integer(1), default=12, help="number of layers")
    parser.add_argument("--aspect-ratio", type=integer(1), default=64, help="width = depth x this")
    parser.add_argument("--head-dim", type=integer(2), default=128, help="channels of an attention head")
    parser.add_argument("--max-seq-len", type=integer(2), default=2048, help="context")
    parser.add_argument("--window-pattern", default="SSSL", help="L full context, S a quarter")
    parser.add_argument("--device-batch-size", type=integer(1), default=32, help="rows a micro-step")
    parser.add_argument("--grad-accum-steps", type=integer(1), default=1, help="micro-steps a step")
    parser.add_argument("--vocab-size", type=integer(2), default=32768, help="tokens")
    parser.add_argument("--steps", type=integer(3), default=10, help="timed steps, after two that are not counted")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    args = parser.parse_args(argv)
    config = config_for_depth(args.depth, args.vocab_size, args.max_seq_len, args.aspect_ratio, args.head_dim,
                              args.window_pattern)
    runtime = compute_init(args.device_type)
    model = build_model(config, runtime.device, runtime.dtype)
    compiled = start_compile(model, float("inf")) if not args.eager else False
    optimizer = build_optimizer(model, compile=compiled and runtime.device.type == "cuda")
    scaler, rows = make_scaler(runtime), args.device_batch_size
    tokens = rows * args.max_seq_len * args.grad_accum_steps

    def batch():
        ids = torch.randint(0, args.vocab_size, (rows, args.max_seq_len + 1), device=runtime.device)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), rows * args.max_seq_len

    seconds, products, first = [], [], None
    for step in range(args.steps + 2):
        batches = [batch() for _ in range(args.grad_accum_steps)]
        runtime.synchronize()
        start = time.perf_counter()
        train_step(model, optimizer, batches, runtime, scaler)
        runtime.synchronize()
        took = time.perf_counter() - start
        first = first or time.time() - psutil.Process().create_time()
        products.append(measured_flops(runtime.device, runtime.dtype, repeats=3))
        print0(f"step {step}: {took:.2f} s, {tokens / took:,.0f} tok/s, matrix product {products[-1] / 1e9:,.0f} GFLOP/s")
        if step >= 2:
            seconds.append(took)
    rate = tokens / statistics.median(seconds)
    flops, product = rate * flops_per_token(config), statistics.median(products[2:])
    peak, source = peak_for(runtime.device, runtime.dtype)
    print0(f"\n{'parameters':<40}{count_parameters(config)['total'] / 1e6:>10,.1f} M")
    print0(f"{'tokens per second (median)':<40}{rate:>10,.0f}")
    print0(f"{'model FLOP/s':<40}{flops / 1e9:>10,.0f} G")
    print0(f"{'matrix product, 2048 cubed, same run':<40}{product / 1e9:>10,.0f} G")
    print0(f"{'share of the matrix product':<40}{flops / product:>10.1%}")
    if runtime.device.type == "cuda":
        print0(f"{'MFU of ' + source:<40}{flops / peak:>10.1%}")
    print0(f"{'peak memory':<40}{runtime.peak_memory_bytes() / 2**30:>10.2f} GiB")
    print0(f"{'from the command to the end of step 1':<40}{first:>10.1f} s")
    return {"tokens_per_s": rate, "share": flops / product, "peak_memory_bytes": runtime.peak_memory_bytes(),
            "first_step_s": first}


if __name__ == "__main__":
    run_script(main)
