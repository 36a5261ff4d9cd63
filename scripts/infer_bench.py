"""Speed of generation: prefill, decode, time to first token, memory, and the share of the memory bandwidth.

python -m scripts.infer_bench --depth 12
python -m scripts.infer_bench -i sft --batch-sizes 1,8 --context-lengths 512
"""

import json
import random
import statistics
import time
from pathlib import Path

from nanochat.checkpoint_manager import SOURCES, load_model
from nanochat.common import (Parser, UserError, add_model_flags, add_runtime_flags, announced, compute_init, integer,
                             run_script)
from nanochat.engine import Engine, Request
from nanochat.gpt import Linear, build_model
from nanochat.hardware import device_name, measured_bandwidth, peak_bandwidth
from nanochat.kv_cache import KVCache
from nanochat.scaling import config_for_depth
from nanochat.tokenizer import RustBPETokenizer

ROUNDS = 5  # decoding and the bandwidth are measured in turn so many times
COLUMNS = ("batch", "context", "prefill tok/s", "first token ms", "decode tok/s", "ms/step", "x batch 1", "GB/s",
           "measured GB/s", "share", "memory GiB")


def numbers(text: str) -> list[int]:
    """Argument type: whole numbers with commas between them."""
    return [integer(1)(part) for part in text.split(",")]


def random_model(depth: int, context: int, runtime):
    """A model of this depth with the weights of the first step of a training, and a tokenizer of single bytes."""
    config = config_for_depth(depth, 32768, context)
    return build_model(config, runtime.device, runtime.dtype).for_inference(), \
        RustBPETokenizer.train_from_iterator(["bytes"], 265)


def bytes_per_step(model, batch: int, length: int) -> int:
    """What one decoding step must read: every matrix once; each row's keys and values, in windows where there are any."""
    weights = sum(module.weight.nbytes for module in model.modules() if isinstance(module, Linear))
    per_place = KVCache.slot_bytes(model, 1) // model.config.n_layer
    places = sum(length if window < 0 else min(length, window + 1) for window in model.windows)
    return weights + batch * per_place * places


def measure(model, tokenizer, runtime, batch: int, context: int, new_tokens: int, graphs: bool) -> dict:
    """One line of the table: `batch` random prompts of `context` tokens, `new_tokens` after each."""
    engine = Engine(model, tokenizer, slots=batch, graphs=graphs)
    if engine.cache.batch_size < batch:
        raise UserError(f"memory for {engine.cache.batch_size} slots only: use smaller --batch-sizes")
    engine.stop_tokens, engine.python_start = set(), -1  # nothing ends before its time
    rng = random.Random(batch * context)
    vocabulary = model.config.vocab_size
    engine.generate_many([[0, 1]], max_tokens=2)  # warm up
    runtime.synchronize()
    start = time.perf_counter()
    sequences = [engine.submit(Request([rng.randrange(vocabulary) for _ in range(context)], new_tokens, top_k=50))
                 for _ in range(batch)]
    first = []
    while len(first) < batch:
        first += [time.perf_counter() - start for s, _, _ in engine.step() if len(s.completion.tokens) == 1]
    prefill_s = time.perf_counter() - start
    steps, shares, bandwidths = [], [], []
    per_round = max(1, (min(s.limit - len(s.completion.tokens) for s in sequences) - 1) // ROUNDS)
    for _ in range(ROUNDS):
        bandwidths.append(measured_bandwidth(runtime.device, repeats=3))
        read, start = 0, time.perf_counter()
        for _ in range(per_round):
            read += bytes_per_step(model, batch, len(sequences[0].tokens))
            engine.step()
        runtime.synchronize()
        seconds = time.perf_counter() - start
        steps.append(seconds / per_round)
        shares.append(read / seconds)
    bandwidth, step = statistics.median(bandwidths), statistics.median(steps)
    return {"batch": batch, "context": context, "prefill tok/s": batch * context / prefill_s,
            "first token ms": 1e3 * statistics.median(first), "decode tok/s": batch / step, "ms/step": 1e3 * step,
            "GB/s": statistics.median(shares) / 1e9, "measured GB/s": bandwidth / 1e9,
            "share": statistics.median(s / b for s, b in zip(shares, bandwidths)),
            "memory GiB": runtime.peak_memory_bytes() / 2**30}


def line(result: dict) -> str:
    cells = []
    for column in COLUMNS:
        value = result[column]
        cells.append("-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.0%}" if column == "share" else
                     f"{value:,.0f}" if value >= 100 else f"{value:.2f}")
    return "  ".join(cell.rjust(len(column)) for cell, column in zip(cells, COLUMNS))


def main(argv=None) -> dict:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("-i", "--source", choices=SOURCES, default=None, help="a trained model; else a random one")
    add_model_flags(parser)
    parser.add_argument("--depth", type=integer(1), default=12, help="of the random model")
    parser.add_argument("--max-seq-len", type=integer(128), default=2048, help="context of the random model")
    parser.add_argument("--batch-sizes", type=numbers, default="1,16", help="sequences at once, with commas")
    parser.add_argument("--context-lengths", type=numbers, default="256,1024", help="prompt tokens, with commas")
    parser.add_argument("--max-new-tokens", type=integer(ROUNDS), default=96, help="generated after each prompt")
    parser.add_argument("--no-graphs", action="store_true", help="on GPUs: without CUDA graphs, for comparison")
    parser.add_argument("--json", default=None, metavar="FILE", help="write the table there too")
    add_runtime_flags(parser)
    args = parser.parse_args(argv)
    if args.source is None and (args.model_tag or args.step is not None):
        raise UserError("-g and -s choose a trained model: name its stage, too, with -i")
    if args.json:
        try:
            open(args.json, "a").close()
        except OSError as error:
            raise UserError(f"--json={args.json}: {error.strerror}") from error
    runtime = compute_init(args.device_type)
    if args.source:
        model, tokenizer, meta = load_model(args.source, runtime.device, "eval", args.model_tag, args.step, runtime.dtype)
        name = f"{args.source} {meta['tag']}, step {meta['step']}"
    else:
        with announced(f"building a random model of depth {args.depth}"):
            model, tokenizer = random_model(args.depth, args.max_seq_len, runtime)
        name = f"random weights, depth {args.depth}"
    limit = model.config.sequence_len - args.max_new_tokens
    if max(args.context_lengths) > limit:
        raise UserError(f"--context-lengths={max(args.context_lengths)} and --max-new-tokens={args.max_new_tokens} do not fit "
                        f"into the context of {model.config.sequence_len} tokens")
    sheet = peak_bandwidth(device_name(runtime.device)) if runtime.device.type == "cuda" else None
    print(f"{name} | {device_name(runtime.device)} | {runtime.dtype_name}"
          + (f" | data sheet {sheet / 1e9:,.0f} GB/s" if sheet else ""))
    print("  ".join(COLUMNS))
    results: list[dict] = []
    for context in args.context_lengths:
        for batch in args.batch_sizes:
            result = measure(model, tokenizer, runtime, batch, context, args.max_new_tokens, not args.no_graphs)
            alone = next((r for r in results if r["batch"] == 1 and r["context"] == context), None)
            result["x batch 1"] = result["decode tok/s"] / (alone or result)["decode tok/s"] if alone or batch == 1 else None
            results.append(result)
            print(line(result), flush=True)
    report = {"model": name, "device": device_name(runtime.device), "dtype": runtime.dtype_name, "results": results}
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1))
    return report


if __name__ == "__main__":
    run_script(main)
