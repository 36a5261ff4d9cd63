"""Pretrain a base model; depth decides everything that no flag does.

python -m scripts.base_train --depth=12
torchrun --standalone --nproc_per_node=8 -m scripts.base_train -- --depth=24 --run=d24
"""

import contextlib
import math
from dataclasses import asdict, replace

from nanochat import ranks, schedule
from nanochat.checkpoint_manager import (CheckpointWriter, build_from_state, check_tokenizer, config_from_meta,
                                         config_to_meta, environment, find_resume_step, load_meta, load_optimizer_states,
                                         load_tensors, source_dir)
from nanochat.common import (DTYPES, Parser, UserError, add_runtime_flags, add_training_output_flags, batch_size,
                             compute_cleanup, compute_init, integer, number, print0, run_name, run_script, steps_or_auto)
from nanochat.core_eval import CoreEvaluation, bundle_in_reach
from nanochat.dataloader import PretrainLoader, fixed_rows
from nanochat.dataset import check_readable, find_corpus
from nanochat.engine import Engine
from nanochat.fp8 import check_fp8, convert_to_fp8, fp8_disabled
from nanochat.gpt import build_model
from nanochat.hardware import peak_for
from nanochat.loss_eval import evaluate_bpb
from nanochat.optim import build_optimizer
from nanochat.progress import Progress, human
from nanochat.scaling import config_for_depth, count_parameters, plan
from nanochat.tokenizer import get_tokenizer
from nanochat.train_step import (LoopState, StopRequest, check_dtype, collect_garbage, get_rng_state, make_scaler,
                                 rows_that_fit, set_rng_state, set_schedules, start_compile, train_on_next)

CORE_EVERY = 2000
SAMPLE_PROMPTS = ("Paris is a city in", "Water freezes when", "The first three months are January,",
                  "She opened the door and", "Two plus three is", "This function returns")


def parse_args(argv):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", default="dummy", help="name of the wandb run; dummy: no wandb")
    add_runtime_flags(parser)
    # model
    parser.add_argument("--depth", type=integer(1, 1000), default=20, help="number of layers")
    parser.add_argument("--aspect-ratio", type=integer(1), default=64, help="width = depth x this")
    parser.add_argument("--head-dim", type=integer(2), default=128, help="channels of an attention head, even")
    parser.add_argument("--max-seq-len", type=integer(2), default=2048, help="context, tokens")
    parser.add_argument("--window-pattern", default="SSSL", help="tiled over layers: L full context, S a quarter")
    parser.add_argument("--fp8", action="store_true", help="float8 matrix products; H100 or newer, needs torchao")
    # horizon: the first that is given
    parser.add_argument("--num-iterations", type=integer(1, 10**9, off=-1), default="-1", help="optimizer steps")
    parser.add_argument("--target-flops", type=number(1, off=-1), default="-1", help="training FLOPs")
    parser.add_argument("--target-param-data-ratio", type=number(1e-3), default=12.0, help="tokens per parameter")
    # optimization
    parser.add_argument("--device-batch-size", type=batch_size, default=None,
                        help="rows a device takes at a time (32, or fewer if the batch is smaller); auto: by its free memory")
    parser.add_argument("--total-batch-size", type=integer(1, 2**32, off=-1), default="-1", help="tokens a step; -1 by the plan")
    parser.add_argument("--embedding-lr", type=number(), default=0.3, help="at width 768 and batch 2^19")
    parser.add_argument("--unembedding-lr", type=number(), default=0.008, help="likewise")
    parser.add_argument("--matrix-lr", type=number(), default=0.02, help="of Muon, likewise")
    parser.add_argument("--scalar-lr", type=number(), default=0.5, help="likewise")
    parser.add_argument("--weight-decay", type=number(), default=0.28, help="of Muon, at depth 12 and batch 2^19")
    parser.add_argument("--warmup-steps", type=integer(0), default=40, help="steps of linear warmup")
    parser.add_argument("--warmdown-ratio", type=number(0, 1), default=0.65, help="share of the run that decays")
    parser.add_argument("--final-lr-frac", type=number(0, 1), default=0.05, help="learning rate at the end, as a share")
    # evaluation, output
    parser.add_argument("--eval-every", type=integer(1, off=-1), default=250, help="steps; -1 at the end only")
    parser.add_argument("--core-metric-every", type=steps_or_auto, default="auto",
                        help="steps; -1 never; auto: 2000 on GPUs, never elsewhere, where it takes too long")
    parser.add_argument("--core-metric-max-per-task", type=integer(1, off=-1), default=500, help="items; -1 all")
    parser.add_argument("--eval-tokens", type=integer(1), default=80 * 2**19, help="tokens of the validation split")
    parser.add_argument("--sample-every", type=integer(1, off=-1), default=2000, help="steps; -1 at the end only")
    add_training_output_flags(parser)
    parser.add_argument("--model-tag", type=run_name, default=None, help="name of the checkpoint directory (d<depth>)")
    parser.add_argument("--data-dir", default=None, help="folder of parquet, jsonl or txt files in place of the corpus")
    return parser.parse_args(argv)


def check_resume(meta: dict, config, args, run_plan) -> None:
    """UserError unless the run that is resumed has the same model and the same schedule."""
    stored = config_from_meta(meta["model_config"])
    if stored != config:
        differing = [f"{name} {getattr(stored, name)} in the checkpoint, {getattr(config, name)} now"
                     for name in asdict(config) if getattr(stored, name) != getattr(config, name)]
        raise UserError(f"--resume needs the model of the checkpoint: {'; '.join(differing)}. Give the same --depth, "
                        "--max-seq-len and so on, or another --model-tag")
    planned = ("num_iterations", "total_batch_size", "weight_decay")
    now = {name: getattr(args, name) for name in (
        "embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr", "warmup_steps", "warmdown_ratio", "final_lr_frac",
        "fp8")} | {name: getattr(run_plan, name) for name in planned}
    before = meta["user_config"] | {name: meta["plan"][name] for name in planned}
    differing = [f"{k.replace('_', '-')} {before[k]} in the checkpoint, {now[k]} now" for k in now if before[k] != now[k]]
    if differing:
        raise UserError(f"--resume needs the settings of the checkpoint: {'; '.join(differing)}. Without --resume the run "
                        "starts afresh (the old one is kept)")


def main(argv=None) -> dict:
    args = parse_args(argv)

    # --- everything that needs no device ---
    tokenizer = get_tokenizer()
    config = config_for_depth(args.depth, tokenizer.get_vocab_size(), args.max_seq_len, args.aspect_ratio,
                              args.head_dim, args.window_pattern)
    rows_at_a_time = None if args.device_batch_size == "auto" else args.device_batch_size
    run_plan = plan(config, num_iterations=args.num_iterations, target_flops=args.target_flops,
                    target_param_data_ratio=args.target_param_data_ratio, total_batch_size=args.total_batch_size,
                    device_batch_size=rows_at_a_time, weight_decay=args.weight_decay,
                    world_size=ranks.place()["world_size"], aspect_ratio=args.aspect_ratio, head_dim=args.head_dim)
    directory = source_dir("base") / (args.model_tag or f"d{args.depth}")
    meta = None
    step = find_resume_step(directory, args.resume)
    if step is not None:
        meta = load_meta(directory, step)
        check_tokenizer(tokenizer, meta)
        check_resume(meta, config, args, run_plan)
        if meta["step"] == run_plan.num_iterations:
            print0(f"{directory} is finished already: {meta['step']} steps, val_bpb {meta['val_bpb']:.4f}")
            return {"step": meta["step"], "val_bpb": meta["val_bpb"], "directory": str(directory)}
    state = LoopState(**meta["loop"]) if meta else LoopState()
    corpus = find_corpus(args.data_dir)
    check_readable(corpus.val)
    check_readable(corpus.train)

    # --- runtime ---
    runtime = compute_init(args.device_type, DTYPES[meta["dtype"]] if meta else None)
    if args.fp8:
        check_fp8(runtime)
    check_dtype(meta, runtime)
    if args.device_batch_size == "auto":
        rows, micro_steps = rows_that_fit(config, run_plan.total_batch_size // args.max_seq_len, runtime)
        run_plan = replace(run_plan, device_batch_size=rows, grad_accum_steps=micro_steps)
    core = core_evaluation(args, tokenizer, runtime)
    peak, peak_source = peak_for(runtime.device, runtime.dtype)
    counts = count_parameters(config)
    print0(f"device: {peak_source}, {human(peak)}FLOP/s | world size {runtime.world_size} | "
           f"{runtime.dtype_name} ({runtime.dtype_reason})")
    print0(f"corpus: {corpus.name}, {len(corpus.train)} training files")
    print0(f"model: depth {config.n_layer}, width {config.n_embd}, {config.n_head} heads of {config.head_dim}, context "
           f"{config.sequence_len}, windows {args.window_pattern}, vocabulary {config.vocab_size:,}; "
           f"{human(counts['total'])} parameters, {human(counts['scaling'])} of them for scaling")
    print0(f"plan: {run_plan.num_iterations:,} steps of {run_plan.total_batch_size:,} tokens = "
           f"{human(run_plan.total_tokens)} tokens ({run_plan.total_tokens / counts['scaling']:.1f} per scaling "
           f"parameter), {human(run_plan.total_flops)} FLOPs; {run_plan.device_batch_size} rows x "
           f"{run_plan.grad_accum_steps} micro-steps; learning rates x {run_plan.lr_scale:.3f}, weight decay "
           f"{run_plan.weight_decay:.4f}")

    # --- data ---
    loader = PretrainLoader(tokenizer, corpus.train, runtime, run_plan.device_batch_size, args.max_seq_len,
                            meta and meta["loader"], run_plan.total_batch_size // args.max_seq_len)
    val_rows = fixed_rows(tokenizer, corpus.val, args.max_seq_len, max(1, args.eval_tokens // args.max_seq_len))
    token_bytes = tokenizer.token_bytes()
    print0(f"validation: {val_rows[:, 1:].numel():,} tokens of {len(corpus.val)} files")

    # --- model, optimizer ---
    if meta:
        tensors = load_tensors(directory / f"model_{meta['step']:06d}.pt")
        model = build_from_state(config, tensors, runtime.device, runtime.dtype)
    else:
        model = build_model(config, runtime.device, runtime.dtype)
    if args.fp8:
        print0(f"fp8: {convert_to_fp8(model)} linear layers")
    compiled = start_compile(model, run_plan.total_flops)
    optimizer = build_optimizer(model, embedding_lr=args.embedding_lr * run_plan.lr_scale,
                                unembedding_lr=args.unembedding_lr * run_plan.lr_scale,
                                matrix_lr=args.matrix_lr * run_plan.lr_scale,
                                scalar_lr=args.scalar_lr * run_plan.lr_scale, weight_decay=run_plan.weight_decay,
                                compile=compiled and runtime.device.type == "cuda")
    scaler = make_scaler(runtime)
    if meta:
        states = load_optimizer_states(directory, meta["step"], meta, runtime)
        optimizer.load_state_dict([s["optimizer"] for s in states])
        set_rng_state(states[0]["rng"], scaler)
        del states
        print0(f"resumed from {directory} at step {step}")

    record = {"model_config": config_to_meta(config), "user_config": vars(args), "plan": asdict(run_plan),
              "max_seq_len": args.max_seq_len, "dtype": runtime.dtype_name, "world_size": runtime.world_size,
              "effective_lrs": {group["names"][0]: group["initial_lr"] for group in optimizer.param_groups},
              "tokenizer_hash": tokenizer.content_hash(), "environment": environment()}

    # --- loop ---
    writer = CheckpointWriter(directory, runtime, args.keep_last)
    progress = Progress(runtime, directory, num_iterations=run_plan.num_iterations, first_step=state.step, run=args.run,
                        config=vars(args) | {"plan": asdict(run_plan)}, flops_per_token=run_plan.flops_per_token,
                        peak_flops=peak * runtime.world_size)
    writer.start(step)
    started_s = state.trained_s

    def save():
        state.saved_step = state.step
        writer.save(state.step, model.state_dict(), {"optimizer": optimizer.state_dict(), "rng": get_rng_state(scaler)},
                    record | {"step": state.step, "val_bpb": state.val_bpb, "loop": asdict(state),
                              "loader": loader.state_dict(), "device_batch_size": loader.rows_per_rank})

    with StopRequest() as stop:
        while True:
            last = state.step == run_plan.num_iterations
            stopping = stop.agreed(runtime) and not last  # the last step is finished in any case
            looking = not stopping and state.evaluated_step != state.step

            if looking and state.due(args.eval_every, last):
                with plain_weights(model, args.fp8):
                    state.val_bpb = evaluate_bpb(model, val_rows[:, :-1], val_rows[:, 1:], token_bytes, runtime,
                                                 loader.rows_per_rank)
                state.best_val_bpb = min(state.val_bpb, state.best_val_bpb or state.val_bpb)
                progress.log(state.step, val_bpb=state.val_bpb)
                print0(f"step {state.step:,} | val_bpb {state.val_bpb:.4f}")
            if looking and core is not None and state.due(args.core_metric_every, last):
                with plain_weights(model, args.fp8):
                    results = core.run(model, runtime)
                tasks = {f"core/{label}": result.centered for label, result in results.items()}
                progress.log(state.step, core=core.metric(results), **tasks)
                print0(f"step {state.step:,} | CORE {core.metric(results):.4f}, at most {args.core_metric_max_per_task} items a task")
            if looking and runtime.is_main and state.due(args.sample_every, last):
                with plain_weights(model, args.fp8):
                    print_samples(model, tokenizer)
            if looking:
                state.evaluated_step = state.step
            if (stopping or state.due(args.save_every, last)) and state.saved_step != state.step:
                save()
            if last or stopping:
                break

            lr = schedule.lr_multiplier(state.step, run_plan.num_iterations, args.warmup_steps, args.warmdown_ratio,
                                        args.final_lr_frac)
            set_schedules(optimizer, lr,
                          schedule.muon_momentum(state.step, run_plan.num_iterations, args.warmdown_ratio),
                          schedule.weight_decay(state.step, run_plan.num_iterations, run_plan.weight_decay))
            progress.begin_step()
            loss, supervised = train_on_next(model, optimizer, loader, runtime, scaler, first=progress.steps_done == 0)
            progress.end_step(state.step, loss, lr, run_plan.total_batch_size, epoch=loader.epoch,
                              supervised_tokens=supervised)
            state.trained_s = started_s + progress.trained_s
            state.count(loss, writer)
            writer.check()
            collect_garbage(progress.steps_done)

    # --- finish ---
    loader.close()
    writer.close()
    progress.close()
    state.farewell(last, directory, runtime, stop.name, f"val_bpb {state.val_bpb or math.nan:.4f}")
    results = {"step": state.step, "val_bpb": state.val_bpb, "losses": progress.losses, "finished": last,
               "directory": str(directory), "peak_memory_bytes": runtime.peak_memory_bytes()}
    compute_cleanup()
    return results


def core_evaluation(args, tokenizer, runtime) -> CoreEvaluation | None:
    """CORE for this training, None without; sets --core-metric-every where it was left to us."""
    automatic = args.core_metric_every == "auto"
    if automatic:
        args.core_metric_every = CORE_EVERY if runtime.device.type == "cuda" else None
        print0(f"CORE: every {CORE_EVERY} steps and at the end" if args.core_metric_every else
               "CORE: not during this training; it is slow without a GPU (--core-metric-every)")
    if automatic and args.core_metric_every and not bundle_in_reach():
        print0("CORE: left out, its data is out of reach (NANOCHAT_EVAL_BUNDLE names a copy)")
        args.core_metric_every = None
    return CoreEvaluation(tokenizer, args.core_metric_max_per_task, keep=True) if args.core_metric_every else None


@contextlib.contextmanager
def plain_weights(model, fp8: bool):
    """For evaluation and sampling: weights cast once, without float8."""
    with fp8_disabled(model) if fp8 else contextlib.nullcontext(), model.weights_cast_once():
        yield


def print_samples(model, tokenizer) -> None:
    """Print what the model makes of a few openings."""
    engine = Engine(model, tokenizer)
    for prompt in SAMPLE_PROMPTS:
        ids = tokenizer.encode(prompt, prepend="<|bos|>")
        (result,), _ = engine.generate_batch(ids, max_tokens=24, temperature=0)
        print0(f"  {tokenizer.decode(result[1:])!r}")


if __name__ == "__main__":
    run_script(main)
