"""Evaluate a base model: bits per byte on both splits, and samples.

python -m scripts.base_eval --eval bpb,sample
"""

from nanochat.checkpoint_manager import load_model, locate_model
from nanochat.common import (Parser, UserError, add_model_flags, add_runtime_flags, compute_cleanup, compute_init, integer,
                             print0, run_script)
from nanochat.dataloader import fixed_rows
from nanochat.dataset import find_corpus
from nanochat.engine import Engine
from nanochat.loss_eval import evaluate_bpb

EVALUATIONS = ("bpb", "sample")
PROMPTS = ("Paris is a city in", "Water freezes when", "The first three months are January,", "She opened the door and",
           "Two plus three is", "This function returns")


def main(argv=None) -> dict:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--eval", default=",".join(EVALUATIONS), help=f"comma-separated: {', '.join(EVALUATIONS)}")
    add_model_flags(parser)
    add_runtime_flags(parser)
    parser.add_argument("--device-batch-size", type=integer(1), default=32, help="rows a device takes at a time")
    parser.add_argument("--split-tokens", type=integer(1), default=40 * 2**19, help="tokens of each split for bpb")
    parser.add_argument("--max-new-tokens", type=integer(1), default=32, help="of each sample")
    parser.add_argument("--data-dir", default=None, help="folder in place of the corpus")
    args = parser.parse_args(argv)
    wanted = [name.strip() for name in args.eval.split(",")]
    unknown = [name for name in wanted if name not in EVALUATIONS]
    if unknown:
        raise UserError(f"--eval={args.eval}: {', '.join(unknown)} is not one of {', '.join(EVALUATIONS)}")
    corpus = find_corpus(args.data_dir) if "bpb" in wanted else None

    locate_model("base", args.model_tag, args.step)
    runtime = compute_init(args.device_type)
    model, tokenizer, meta = load_model("base", runtime.device, "eval", args.model_tag, args.step, runtime.dtype)
    results = {"tag": meta["tag"], "step": meta["step"]}

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
    compute_cleanup()
    return results


if __name__ == "__main__":
    run_script(main)
