"""Attention for training, forward and backward: every backend that runs here, in turn.

python -m dev.bench_attention --rows 16 --max-seq-len 512 --heads 6 --head-dim 64
"""

import statistics
import time

import torch

from nanochat.common import Parser, add_runtime_flags, compute_init, integer, print0, run_script
from nanochat.flash_attention import BACKENDS
from nanochat.hardware import measured_flops


def measure(backend, tensors, grad, window: int, runtime) -> tuple[float, float]:
    """Seconds of the forward and of the backward pass."""
    runtime.synchronize()
    start = time.perf_counter()
    out = backend.func(*tensors, True, (window, 0))
    runtime.synchronize()
    middle = time.perf_counter()
    torch.autograd.grad(out, tensors, grad)
    runtime.synchronize()
    return middle - start, time.perf_counter() - middle


def main(argv=None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    add_runtime_flags(parser)
    parser.add_argument("--rows", type=integer(1), default=16, help="rows")
    parser.add_argument("--max-seq-len", type=integer(2), default=512, help="positions of a row")
    parser.add_argument("--heads", type=integer(1), default=6, help="heads, of queries as of keys")
    parser.add_argument("--head-dim", type=integer(2), default=64, help="channels of a head")
    parser.add_argument("--window", type=integer(1, off=-1), default="-1", help="previous positions seen; -1 all")
    parser.add_argument("--repeats", type=integer(3), default=9, help="measurements, after one that is not counted")
    args = parser.parse_args(argv)
    runtime = compute_init(args.device_type)
    B, T, H, D, window = args.rows, args.max_seq_len, args.heads, args.head_dim, args.window or -1
    seen = sum(min(t, T if window < 0 else window) + 1 for t in range(T))
    product_flops = 2 * B * H * D * seen  # of one of the 2 products forward, 5 backward
    print0(f"{'dtype':<10}{'backend':<9}{'forward':>11}{'backward':>11}{'both':>11}{'of a matrix product':>22}")
    for dtype in (torch.bfloat16, torch.float32):
        tensors = [torch.randn(B, T, H, D, device=runtime.device, dtype=dtype).requires_grad_() for _ in range(3)]
        grad = torch.randn_like(tensors[0])
        backends = [b for b in BACKENDS if b.usable(runtime.device, dtype)]
        seconds, product = {b.name: [] for b in backends}, []
        for _ in range(args.repeats + 1):
            for backend in backends:
                seconds[backend.name].append(measure(backend, tensors, grad, window, runtime))
            product.append(measured_flops(runtime.device, dtype, repeats=1))
        for name, times in seconds.items():
            forward, backward = (statistics.median(column) for column in zip(*times[1:]))
            share = 7 * product_flops / (forward + backward) / statistics.median(product[1:])
            print0(f"{str(dtype).removeprefix('torch.'):<10}{name:<9}{forward * 1e3:>8.1f} ms{backward * 1e3:>8.1f} ms"
                   f"{(forward + backward) * 1e3:>8.1f} ms{share:>22.0%}")


if __name__ == "__main__":
    run_script(main)
