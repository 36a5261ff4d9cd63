"""Finetune a base model on conversations (SFT): in one stage, or in two.

python -m scripts.chat_sft
torchrun --standalone --nproc_per_node=8 -m scripts.chat_sft -- --run=sft
python -m scripts.chat_sft --stage=mid && python -m scripts.chat_sft --source=mid
"""

import math
import os
from dataclasses import asdict, replace

from nanochat import hub, ranks, schedule
from nanochat.chat_eval import chatcore_metric, evaluate_task
from nanochat.checkpoint_manager import (CheckpointWriter, build_from_state, check_tokenizer, config_from_meta,
                                         config_to_meta, environment, find_resume_step, find_run, find_step, load_meta,
                                         load_optimizer_states, load_tensors, source_dir)
from nanochat.common import (DTYPES, Parser, UserError, add_model_flags, add_runtime_flags, add_training_output_flags,
                             batch_size, compute_cleanup, compute_init, get_base_dir, integer, number, print0, run_script,
                             steps_or_auto)
from nanochat.dataloader import SFTLoader, fixed_sft_rows
from nanochat.hardware import peak_for
from nanochat.loss_eval import evaluate_bpb
from nanochat.optim import build_optimizer
from nanochat.progress import Progress
from nanochat.scaling import RunPlan, flops_per_token, share_rows
from nanochat.tokenizer import get_tokenizer
from nanochat.train_step import (LoopState, StopRequest, check_dtype, collect_garbage, get_rng_state, make_scaler,
                                 rows_that_fit, set_rng_state, set_schedules, start_compile, train_on_next)
from tasks.builtin import BuiltinChat, Identity
from tasks.common import TaskMixture, hub_data_available
from tasks.customjson import CustomJSON
from tasks.gsm8k import GSM8K
from tasks.mmlu import MMLU
from tasks.registry import CHATCORE, NEEDS_HUB, make_task
from tasks.smoltalk import SmolTalk
from tasks.spellingbee import SimpleSpelling, SpellingBee, load_words

MUON_MOMENTUM = 0.90  # where pretraining ends
WARMDOWN_RATIO = 0.5
CHATCORE_EVERY = 200
# what stands in for a data set that cannot be had: kind of built-in conversation, rows
EPOCHS = {  # of each set, by the model that is finetuned: what midtraining has taught need not be taught again
    "base": {"smoltalk": 1, "mmlu": 3, "gsm8k": 4, "identity": 2, "spelling": 1},
    "mid": {"smoltalk": 1, "mmlu": 0, "gsm8k": 2, "identity": 2, "spelling": 1}}
SPELLING_ROWS = {"base": (200_000, 20_000), "mid": (20_000, 2_000)}  # with the hub's sets, on built-in data
STAND_INS = {"SmolTalk": (("facts", 6000), ("small talk", 1500)), "GSM8K": (("arithmetic", 6000), ("word problems", 4000)),
             "MMLU": ()}


def parse_args(argv):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", default="dummy", help="name of the wandb run; dummy: no wandb")
    add_runtime_flags(parser)
    parser.add_argument("--stage", choices=("sft", "mid"), default="sft",
                        help="mid: an earlier stage of its own, for --source=mid to go on from")
    parser.add_argument("--source", choices=("base", "mid"), default="base", help="the model to finetune")
    add_model_flags(parser)  # of that model
    # mixture
    for name, what in (("smoltalk", "0 leaves the set out"), ("mmlu", "of the auxiliary training split"), ("gsm8k", "0 leaves the set out"),
                       ("identity", "0 leaves the set out"), ("spelling", "of SimpleSpelling and SpellingBee")):
        parser.add_argument(f"--{name}-epochs", type=integer(0), default=None,
                            help=f"{what} ({EPOCHS['base'][name]}; {EPOCHS['mid'][name]} with --source=mid)")
    parser.add_argument("--spelling-rows", type=integer(1), default=None,
                        help="rows of SimpleSpelling an epoch; SpellingBee has 2/5 as many (200,000; 20,000 on built-in data; a "
                             "tenth of that with --source=mid)")
    parser.add_argument("--builtin", action="store_true",
                        help="built-in conversations in place of the hub's sets, even where the hub can be reached")
    parser.add_argument("--conversations", default=None, help="a jsonl file of your own conversations, added once an epoch")
    # horizon and batch
    parser.add_argument("--num-iterations", type=integer(1, off=-1), default="-1",
                        help="optimizer steps; -1: once through the mixture")
    parser.add_argument("--max-seq-len", type=integer(2), default=None, help="row length (that of the base model)")
    parser.add_argument("--device-batch-size", type=batch_size, default=None,
                        help="rows a device takes at a time (that of the base model); auto: by its free memory")
    parser.add_argument("--total-batch-size", type=integer(1, off=-1), default="-1",
                        help="tokens a step, padding included; -1: that of the base model")
    # learning rates: those of pretraining, times init-lr-frac
    parser.add_argument("--init-lr-frac", type=number(), default=0.8, help="share of the pretraining learning rates")
    # evaluation, output
    parser.add_argument("--eval-every", type=integer(1, off=-1), default=200, help="steps; -1 at the end only")
    parser.add_argument("--chatcore-every", type=steps_or_auto, default="auto",
                        help="steps; -1 never; auto: 200 on GPUs, never elsewhere, where it takes too long")
    parser.add_argument("--chatcore-max-cat", type=integer(1, off=-1), default="-1", help="problems of a multiple-choice task; -1 all")
    parser.add_argument("--chatcore-max-sample", type=integer(1, off=-1), default=24, help="problems of a task with written answers")
    parser.add_argument("--eval-rows", type=integer(1), default=1000, help="conversations of the validation mixture")
    add_training_output_flags(parser)
    args = parser.parse_args(argv)
    if args.stage == args.source:
        raise UserError("--stage=mid --source=mid: midtraining begins at a base model; leave out one of them")
    for name, epochs in EPOCHS[args.source].items():
        if getattr(args, f"{name}_epochs") is None:
            setattr(args, f"{name}_epochs", epochs)
    return args


def obtain(name: str, make_train, make_val) -> tuple | None:
    """Both splits of a hub data set; None where it is out of reach (offline, or not in the mirror). With the hub in
    reach a failure is an error: an expensive run is not to train on less than was asked for."""
    try:
        return make_train(), make_val()
    except UserError as error:
        if not (hub.is_offline() or os.environ.get("NANOCHAT_DATASETS_DIR")):
            raise
        print0(f"{name}: {error}")
        return None


def chatcore_tasks(builtin: bool) -> dict:
    """The tasks of ChatCORE that can be had, by name."""
    names = [name for name in CHATCORE if name not in NEEDS_HUB or not builtin and hub_data_available()]
    if len(names) < len(CHATCORE):
        print0(f"ChatCORE: only {', '.join(names)}; the others' data is out of reach")
    return {name: make_task(name) for name in names}


def build_mixtures(args) -> tuple[TaskMixture, TaskMixture, list]:
    """Training and validation mixtures, and what the first is made of: (name, rows, epochs), which is printed, too."""
    from_hub = not args.builtin and hub_data_available()
    if not from_hub:
        print0(("--builtin" if args.builtin else "the hub is out of reach")
               + ": built-in conversations stand in for the hub's data sets")
    own = CustomJSON(args.conversations) if args.conversations else None  # first: its mistakes are quick to find
    words = load_words()
    rows = args.spelling_rows or SPELLING_ROWS[args.source][0 if from_hub else 1]
    held_out = max(1, args.eval_rows // 8)  # of each set
    train, val, table = [], [], []

    def add(name, epochs, train_task, val_task=None):
        if epochs > 0:
            train.extend([train_task] * epochs)
            table.append((name, len(train_task), epochs))
            if val_task is not None:
                val.append(val_task)

    hub_sets = {"SmolTalk": (args.smoltalk_epochs, lambda: SmolTalk("train"), lambda: SmolTalk("test", stop=4 * held_out)),
                "MMLU": (args.mmlu_epochs, lambda: MMLU("auxiliary_train"), lambda: MMLU("test", stop=2 * held_out)),
                "GSM8K": (args.gsm8k_epochs, lambda: GSM8K("train"), lambda: GSM8K("test", stop=2 * held_out))}
    for name, (epochs, make_train, make_val) in hub_sets.items():
        sets = obtain(name, make_train, make_val) if from_hub and epochs > 0 else None
        if sets:
            add(name, epochs, *sets)
        elif epochs > 0:
            for kind, size in STAND_INS[name]:
                add(f"built-in {kind} (for {name})", 1, BuiltinChat(kind, size), BuiltinChat(kind, held_out, "test"))
    identity_file = get_base_dir() / "identity_conversations.jsonl"
    if identity_file.exists():
        add(f"identity ({identity_file.name})", args.identity_epochs, CustomJSON(identity_file))
    else:
        add("identity (dev/self_knowledge.md)", args.identity_epochs, Identity(1000), Identity(held_out, "test"))
    add("SimpleSpelling", args.spelling_epochs, SimpleSpelling(rows, "train", words),
        SimpleSpelling(held_out, "test", words))
    add("SpellingBee", args.spelling_epochs, SpellingBee(rows * 2 // 5, "train", words),
        SpellingBee(held_out, "test", words))
    if own:
        add(args.conversations, 1, own)
    if not train:
        raise UserError("every set of the mixture is at 0 epochs: nothing to train on")

    mixture = TaskMixture(train)
    print0(f"mixture: {len(mixture):,} conversations an epoch")
    for name, size, epochs in table:
        print0(f"  {name:<40}{size:>9,} rows x {epochs}")
    return mixture, TaskMixture(val or [Identity(16, "test")]), table


def main(argv=None) -> dict:
    args = parse_args(argv)

    # --- everything that needs no device ---
    tokenizer = get_tokenizer()
    base_dir = find_run(args.source, args.model_tag)
    base_step = find_step(base_dir, args.step)
    base_meta = load_meta(base_dir, base_step)
    check_tokenizer(tokenizer, base_meta)
    config = config_from_meta(base_meta["model_config"])
    sequence_len = args.max_seq_len or config.sequence_len
    if sequence_len > config.sequence_len:
        raise UserError(f"--max-seq-len={sequence_len}: the {args.source} model has a context of {config.sequence_len}")
    total_batch = args.total_batch_size or base_meta["plan"]["total_batch_size"]
    if total_batch % sequence_len:
        raise UserError(f"--total-batch-size={total_batch} tokens is no multiple of the row length {sequence_len}")
    rows_per_step = total_batch // sequence_len
    wished = args.device_batch_size
    if wished in (None, "auto"):
        wished = next(n for n in range(min(base_meta["device_batch_size"], rows_per_step), 0, -1) if rows_per_step % n == 0)
    device_batch, micro_steps = share_rows(rows_per_step, wished, ranks.place()["world_size"])
    directory = source_dir(args.stage) / base_dir.name
    base_id = [base_step, base_meta["environment"]["time"]]
    meta = None
    step = find_resume_step(directory, args.resume)
    if step is not None:
        meta = load_meta(directory, step)
        check_tokenizer(tokenizer, meta)
        if config_from_meta(meta["model_config"]) != config or meta["base"] != base_id:
            raise UserError(f"--resume: {directory} was finetuned from another {args.source} model; leave out --resume (it is kept)")
        if meta["user_config"]["init_lr_frac"] != args.init_lr_frac:
            raise UserError(f"--resume needs the settings of the checkpoint: init-lr-frac "
                            f"{meta['user_config']['init_lr_frac']} there, {args.init_lr_frac} now")
    mixture, val_mixture, contents = build_mixtures(args)

    # --- runtime ---
    runtime = compute_init(args.device_type, DTYPES[(meta or base_meta)["dtype"]])
    if args.device_batch_size == "auto":
        device_batch, micro_steps = rows_that_fit(config, rows_per_step, runtime)
    peak, peak_source = peak_for(runtime.device, runtime.dtype)  # before the loader's thread takes a core
    loader = SFTLoader(tokenizer, mixture, runtime, device_batch, sequence_len, meta and meta["loader"], rows_per_step)
    num_iterations = args.num_iterations or max(1, round(loader.count_rows() / rows_per_step))
    run_plan = RunPlan(num_iterations, total_batch, device_batch, micro_steps,
                       float(num_iterations * total_batch), 1.0, 0.0, flops_per_token(replace(config, sequence_len=sequence_len)))
    if meta and asdict(run_plan) | {"grad_accum_steps": 0, "device_batch_size": 0} != \
            meta["plan"] | {"grad_accum_steps": 0, "device_batch_size": 0}:
        raise UserError(f"--resume needs the settings of the checkpoint: {meta['plan']['num_iterations']} steps of "
                        f"{meta['plan']['total_batch_size']} tokens there, {num_iterations} of {total_batch} now")
    if meta and meta["step"] == num_iterations:
        print0(f"{directory} is finished already: {num_iterations} steps, val_bpb {meta['val_bpb']:.4f}")
        return {"step": num_iterations, "val_bpb": meta["val_bpb"], "directory": str(directory), "finished": True}
    state = LoopState(**meta["loop"]) if meta else LoopState()
    check_dtype(meta, runtime)
    print0(f"device: {peak_source} | world size {runtime.world_size} | {runtime.dtype_name} "
           f"({runtime.dtype_reason})")
    print0(f"plan: {num_iterations:,} steps of {rows_per_step} rows x {sequence_len} tokens; {device_batch} rows x "
           f"{run_plan.grad_accum_steps} micro-steps; from {args.source} model {base_dir.name} step {base_step}")

    # --- model, optimizer: the base model's, or those of the checkpoint that is resumed ---
    source_directory, source_meta, source_step = (directory, meta, meta["step"]) if meta else \
        (base_dir, base_meta, base_step)
    model = build_from_state(config, load_tensors(source_directory / f"model_{source_step:06d}.pt"), runtime.device,
                             runtime.dtype)
    compiled = start_compile(model, run_plan.total_flops)
    optimizer = build_optimizer(model, compile=compiled and runtime.device.type == "cuda")
    states = load_optimizer_states(source_directory, source_step, source_meta, runtime)
    optimizer.load_state_dict([s["optimizer"] for s in states])  # moments are warm from pretraining
    scaler = make_scaler(runtime)
    if meta:
        set_rng_state(states[0]["rng"], scaler)
        print0(f"resumed from {directory} at step {step}")
    del states
    for group in optimizer.param_groups:
        group["initial_lr"] = base_meta["effective_lrs"][group["names"][0]] * args.init_lr_frac
        group["weight_decay"] = 0.0
    if args.chatcore_every == "auto":
        args.chatcore_every = CHATCORE_EVERY if runtime.device.type == "cuda" else None
    chatcore = chatcore_tasks(args.builtin) if args.chatcore_every else {}
    val_inputs, val_targets = fixed_sft_rows(tokenizer, val_mixture, sequence_len)
    token_bytes = tokenizer.token_bytes()

    record = {"model_config": config_to_meta(config), "user_config": vars(args), "plan": asdict(run_plan),
              "max_seq_len": sequence_len, "dtype": runtime.dtype_name, "world_size": runtime.world_size,
              "effective_lrs": {group["names"][0]: group["initial_lr"] for group in optimizer.param_groups},
              "tokenizer_hash": tokenizer.content_hash(), "environment": environment(), "base": base_id, "mixture": contents}

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
                with model.weights_cast_once():
                    state.val_bpb = evaluate_bpb(model, val_inputs, val_targets, token_bytes, runtime,
                                                 loader.rows_per_rank)
                state.best_val_bpb = min(state.val_bpb, state.best_val_bpb or state.val_bpb)
                progress.log(state.step, val_bpb=state.val_bpb)
                print0(f"step {state.step:,} | val_bpb {state.val_bpb:.4f} (of what the assistant says)")
            if looking and chatcore and state.due(args.chatcore_every, last):
                with model.weights_cast_once():
                    accuracies = {name: evaluate_task(model, tokenizer, task, runtime, max_problems=(
                        args.chatcore_max_cat if task.eval_type == "categorical" else args.chatcore_max_sample),
                        max_new_tokens=sequence_len // 2) for name, task in chatcore.items()}
                metric = chatcore_metric(accuracies, CHATCORE)
                progress.log(state.step, chatcore=metric, **{f"chatcore/{name}": a.accuracy for name, a in accuracies.items()})
                print0(f"step {state.step:,} | ChatCORE {'-' if metric is None else f'{metric:.4f}'} | "
                       + " | ".join(f"{name} {a.accuracy:.1%}" for name, a in accuracies.items()))
            if looking:
                state.evaluated_step = state.step
            if (stopping or state.due(args.save_every, last)) and state.saved_step != state.step:
                save()
            if last or stopping:
                break

            lr = schedule.lr_multiplier(state.step, num_iterations, 0, WARMDOWN_RATIO, 0.0)
            set_schedules(optimizer, lr, MUON_MOMENTUM)
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
    if loader.truncated or loader.dropped:
        print0(f"conversations longer than a row: {loader.truncated} cut, {loader.dropped} of them left out (no answer in "
               "reach)")
    results = {"step": state.step, "val_bpb": state.val_bpb, "losses": progress.losses, "finished": last,
               "directory": str(directory), "peak_memory_bytes": runtime.peak_memory_bytes()}
    compute_cleanup()
    return results


if __name__ == "__main__":
    run_script(main)
