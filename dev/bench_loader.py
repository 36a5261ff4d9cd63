"""Does the loader keep up with its tokenizer, and does its packing waste more than best fit must?

python -m dev.bench_loader --data-dir DIR

Alternates tiktoken alone (encode_ordinary_batch) and the loader on the same documents with the same threads; medians.
"""

import statistics
import time

import torch

from nanochat.common import Parser, Runtime, integer, print0, run_script
from nanochat.dataloader import BUFFER_SIZE, PretrainLoader
from nanochat.dataset import DocumentReader, find_corpus
from nanochat.tokenizer import get_tokenizer


def brute_force_waste(lengths: list[int], capacity: int) -> float:
    """Share of tokens that plain best fit (look at the whole buffer each time) crops away."""
    waiting, position, used, cropped = [], 0, 0, 0
    while position < len(lengths):
        room = capacity
        while room:
            while len(waiting) < BUFFER_SIZE and position < len(lengths):
                waiting.append(lengths[position])
                position += 1
            if not waiting:
                break
            fits = [n for n in waiting if n <= room]
            n = max(fits) if fits else min(waiting)
            waiting.remove(n)
            used, cropped, room = used + n, cropped + max(0, n - room), room - min(n, room)
    return cropped / used


def main(argv=None) -> dict:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", default=None, help="folder in place of the corpus")
    parser.add_argument("--documents", type=integer(2000), default=6000, help="documents a round")
    parser.add_argument("--max-seq-len", type=integer(2), default=2048, help="row length")
    parser.add_argument("--threads", type=integer(1), default=2, help="of tiktoken and of the loader's pool")
    parser.add_argument("--rounds", type=integer(1), default=5, help="of each")
    args = parser.parse_args(argv)
    tokenizer, corpus = get_tokenizer(), find_corpus(args.data_dir)
    texts = DocumentReader(corpus.train).read(0, args.documents)
    tokens = lengths = None
    alone, loaded, delivered = [], [], []
    runtime = Runtime(torch.device("cpu"), torch.float32, "")
    for _ in range(args.rounds):
        start = time.perf_counter()
        ids = tokenizer.enc.encode_ordinary_batch(texts, num_threads=args.threads)
        alone.append(time.perf_counter() - start)
        lengths = [len(i) + 1 for i in ids]
        tokens = sum(lengths)
        del ids

        loader = PretrainLoader(tokenizer, corpus.train, runtime, 8, args.max_seq_len, threads=args.threads)
        start, rows = time.perf_counter(), 0
        while loader.state_dict()["next"] < args.documents:
            rows += loader.next_batch()[0].size(0)
        loaded.append(time.perf_counter() - start)
        taken = loader.state_dict()["next"]  # the documents that wait are encoded too
        loaded[-1] *= args.documents / taken
        delivered.append(rows * (args.max_seq_len + 1))
        waiting = set(loader.state_dict()["waiting"])
        loader.close()
    used = sum(n for i, n in enumerate(lengths) if i not in waiting)
    a, b = (tokens / statistics.median(seconds) for seconds in (alone, loaded))
    waste, reference = 1 - delivered[-1] / used, brute_force_waste(lengths, args.max_seq_len + 1)
    print0(f"{args.documents} documents, {tokens:,} tokens, {args.threads} threads, median of {args.rounds}")
    print0(f"{'tiktoken alone':<34}{a / 1e6:>8.2f}M tok/s")
    print0(f"{'loader, tokens encoded':<34}{b / 1e6:>8.2f}M tok/s {b / a:>8.0%}")
    print0(f"{'cropped away, of the tokens used':<34}{waste:>8.2%}  plain best fit with a buffer of {BUFFER_SIZE}: "
           f"{reference:.2%}")
    return {"ratio": b / a, "waste": waste, "reference_waste": reference}


if __name__ == "__main__":
    run_script(main)
