"""Look over the machine before an expensive run: each line OK, WARN or FAIL, with what to do.

python -m scripts.preflight --depth 24 --nproc 8 --fp8

Exit code 0 if all is well, 1 with warnings, 2 with failures.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from nanochat import hub
from nanochat.common import (Parser, UserError, add_runtime_flags, compile_problem, compute_init, get_base_dir, integer,
                             number, run_script)
from nanochat.dataset import climbmix_dir, find_corpus
from nanochat.flash_attention import choose_backend
from nanochat.fp8 import check_fp8
from nanochat.hardware import device_name, free_memory_bytes, host_memory_bytes, peak_for
from nanochat.progress import clock, human
from nanochat.scaling import config_for_depth, count_parameters, flops_per_token, plan, training_memory

SHARD_BYTES = 95e6  # a ClimbMix shard, roughly
CHARS_PER_TOKEN, CHARS_PER_SHARD = 4.8, 250e6
EXPECTED_MFU = {"cuda": 0.45, "cpu": 0.6, "mps": 0.3}
HOST_BYTES_PER_PROCESS = 3e9  # Python, PyTorch, the loader's buffers
CODES = {"OK": 0, "WARN": 1, "FAIL": 2}

Check = tuple[str, str, str]  # verdict, what, details


def gib(value: float) -> str:
    return f"{value / 2**30:.1f} GiB"


def check_devices(args, runtime) -> Iterator[Check]:
    if runtime.device.type == "cuda":
        count = torch.cuda.device_count()
        text = f"{count} x {device_name(runtime.device)}, CUDA {torch.version.cuda}, PyTorch {torch.__version__}"
        yield ("OK", "devices", text) if count >= args.nproc else \
            ("FAIL", "devices", f"{text}; {args.nproc} wanted: --nproc {count}, or another machine")
        names = {torch.cuda.get_device_name(i) for i in range(count)}
        if len(names) > 1:
            yield "WARN", "devices", f"they differ ({', '.join(sorted(names))}): the slowest sets the pace"
    else:
        cores = os.cpu_count() or 1
        verdict = "OK" if cores >= args.nproc else "WARN"
        yield verdict, "devices", f"no GPU: {args.nproc} processes on {cores} cores" + \
            ("" if verdict == "OK" else "; fewer processes would be faster")
    yield "OK", "dtype", f"{runtime.dtype_name} ({runtime.dtype_reason})"
    try:
        yield "OK", "attention", f"{choose_backend(runtime.device.type, runtime.dtype).name} (tried out)"
    except UserError as error:
        yield "FAIL", "attention", str(error)
    problem = compile_problem(runtime.device)
    yield ("OK", "compile", "torch.compile") if problem is None else ("WARN", "compile", f"off, {problem}: slower")
    if args.fp8:
        try:
            check_fp8(runtime)
            yield "OK", "fp8", "float8 matrix products"
        except UserError as error:
            yield "FAIL", "fp8", str(error)


def check_memory(args, runtime, config, run_plan) -> Iterator[Check]:
    kind = runtime.device.type
    needed = training_memory(config, run_plan.device_batch_size, args.nproc, kind, runtime.dtype.itemsize)["total"]
    free = free_memory_bytes(runtime.device, 1 if kind == "cuda" else args.nproc)
    text = f"about {gib(needed)} for {run_plan.device_batch_size} rows at a time, {gib(free)} free"
    yield ("OK", "memory", text) if needed < 0.9 * free else ("WARN" if needed < free else "FAIL", "memory",
                                                              f"{text}: a smaller --device-batch-size, or auto")
    if kind == "cuda":
        needed, free = args.nproc * HOST_BYTES_PER_PROCESS + checkpoint_bytes(config), host_memory_bytes()
        text = f"about {gib(needed)} (loaders, checkpoint on its way to disk), {gib(free)} free"
        yield ("OK", "host memory", text) if needed < free else ("FAIL", "host memory", f"{text}: a machine with more")


def checkpoint_bytes(config) -> float:
    """Model and optimizer files of all ranks."""
    counts = count_parameters(config)
    tables = counts["wte"] + counts["value_embeds"]
    return 4.0 * (counts["total"] - tables) + 2 * tables + 8 * (tables + counts["lm_head"]) + 4 * counts["blocks"]


def check_disk(args, config, run_plan) -> Iterator[Check]:
    shards = 1 + round(run_plan.total_tokens * CHARS_PER_TOKEN / CHARS_PER_SHARD)
    there = len(list(climbmix_dir().glob("shard_*.parquet")))
    # two kept of pretraining, one being written, two of finetuning
    needed = max(0, shards - there) * SHARD_BYTES + 5 * checkpoint_bytes(config)
    free = shutil.disk_usage(get_base_dir()).free
    text = f"about {gib(needed)} (of them {max(0, shards - there)} shards, checkpoints of {gib(checkpoint_bytes(config))}), " \
           f"{gib(free)} free in {get_base_dir()}"
    yield ("OK", "disk", text) if needed < 0.9 * free else ("FAIL", "disk", f"{text}: clear some, or set NANOCHAT_BASE_DIR")
    try:
        yield "OK", "corpus", f"here: {find_corpus(args.data_dir).name}"
    except UserError as error:
        yield ("OK", "corpus", f"to be downloaded: {shards} shards") if hub.is_reachable() else ("FAIL", "corpus", str(error))


def check_network(args) -> Iterator[Check]:
    if hub.is_offline():
        prefetched = (get_base_dir() / "datasets.json").exists() or os.environ.get("NANOCHAT_DATASETS_DIR")
        yield ("OK", "hub", "HF_HUB_OFFLINE is set, data sets were fetched before") if prefetched else \
            ("WARN", "hub", "HF_HUB_OFFLINE is set and no data set is here: python -m scripts.prefetch on a machine with a "
             "network; built-in conversations stand in")
    else:
        yield ("OK", "hub", hub.endpoint()) if hub.is_reachable() else \
            ("WARN", "hub", f"{hub.endpoint()} is out of reach: set HF_ENDPOINT to a mirror, or HF_HUB_OFFLINE=1 after "
             "python -m scripts.prefetch elsewhere; built-in data stands in")
    if args.run != "dummy":
        offline = os.environ.get("WANDB_MODE") in ("offline", "disabled")
        known = os.environ.get("WANDB_API_KEY") or "wandb" in _read(Path("~/.netrc").expanduser())
        yield ("OK", "wandb", "offline" if offline else "logged in") if offline or known else \
            ("FAIL", "wandb", "not logged in: wandb login, or WANDB_API_KEY, or WANDB_MODE=offline, or no --run")


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def check_cost(args, runtime, run_plan) -> Iterator[Check]:
    peak, source = peak_for(runtime.device, runtime.dtype)
    processes = args.nproc if runtime.device.type == "cuda" else 1
    seconds = run_plan.total_flops / (peak * processes * EXPECTED_MFU[runtime.device.type])
    cost = f", about ${seconds / 3600 * args.price:,.0f} at ${args.price:g} an hour" if args.price else ""
    text = f"pretraining {human(run_plan.total_tokens)} tokens, {human(run_plan.total_flops)} FLOPs: about {clock(seconds)} at " \
           f"{EXPECTED_MFU[runtime.device.type]:.0%} of {human(peak)}FLOP/s x {processes}{cost}"
    yield ("WARN" if seconds > 86400 else "OK"), "time", text


def main(argv=None) -> dict:
    parser = Parser(description=__doc__.splitlines()[0])
    add_runtime_flags(parser)
    parser.add_argument("--depth", type=integer(1), default=24, help="of the model")
    parser.add_argument("--nproc", type=integer(1), default=8, help="processes on this machine, one a GPU")
    parser.add_argument("--target-param-data-ratio", type=number(1e-3), default=8.0, help="tokens per parameter")
    parser.add_argument("--max-seq-len", type=integer(2), default=2048, help="context, tokens")
    parser.add_argument("--head-dim", type=integer(2), default=128, help="channels of an attention head")
    parser.add_argument("--vocab-size", type=integer(265), default=32768, help="tokens")
    parser.add_argument("--device-batch-size", type=integer(1), default=None, help="rows a device takes at a time")
    parser.add_argument("--num-iterations", type=integer(1, off=-1), default="-1", help="optimizer steps; -1 by the ratio")
    parser.add_argument("--total-batch-size", type=integer(1, off=-1), default="-1", help="tokens a step; -1 by the plan")
    parser.add_argument("--fp8", action="store_true", help="the run will use float8")
    parser.add_argument("--run", default="dummy", help="name of the wandb run")
    parser.add_argument("--price", type=number(0), default=0.0, help="of the machine, dollars an hour")
    parser.add_argument("--data-dir", default=None, help="folder in place of the corpus")
    args = parser.parse_args(argv)
    config = config_for_depth(args.depth, args.vocab_size, args.max_seq_len, head_dim=args.head_dim)
    run_plan = plan(config, target_param_data_ratio=args.target_param_data_ratio, num_iterations=args.num_iterations,
                    total_batch_size=args.total_batch_size, device_batch_size=args.device_batch_size, world_size=args.nproc)
    runtime = compute_init(args.device_type)

    print(f"preflight: depth {args.depth}, {human(count_parameters(config)['total'])} parameters, "
          f"{human(flops_per_token(config))} FLOPs a token, {args.nproc} processes")
    worst = "OK"
    for check in (check_devices(args, runtime), check_memory(args, runtime, config, run_plan),
                  check_disk(args, config, run_plan), check_network(args), check_cost(args, runtime, run_plan)):
        for verdict, name, details in check:
            worst = max(worst, verdict, key=CODES.get)
            print(f"{verdict:<5}{name:<13}{details}", flush=True)
    print({"OK": "all is well", "WARN": "there are warnings", "FAIL": "this run would fail"}[worst])
    return {"verdict": worst}


def main_with_exit_code() -> None:
    code = CODES[main()["verdict"]]
    if code:
        sys.exit(code)


if __name__ == "__main__":
    run_script(main_with_exit_code)
