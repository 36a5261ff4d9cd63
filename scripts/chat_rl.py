"""Reinforcement learning on top of a finetuned model: sampled answers that are right are made likelier.

python -m scripts.chat_rl --task=SpellingBee --num-iterations=60
torchrun --standalone --nproc_per_node=8 -m scripts.chat_rl -- --run=rl
"""

import math
import random
import time
from dataclasses import asdict, replace

from nanochat.checkpoint_manager import (CheckpointWriter, build_from_state, check_tokenizer, config_from_meta,
                                         config_to_meta, environment, find_resume_step, find_run, find_step, load_meta,
                                         load_optimizer_states, load_tensors, source_dir)
from nanochat.common import (DTYPES, Parser, UserError, add_model_flags, add_runtime_flags, add_training_output_flags,
                             compute_cleanup, compute_init, integer, number, print0, run_script)
from nanochat.optim import build_optimizer
from nanochat.progress import Progress
from nanochat.rollout import Sampler, Settings, is_informative, pass_at_k, policy_gradient
from nanochat.tokenizer import get_tokenizer
from nanochat.train_step import (LoopState, StopRequest, apply_gradients, check_dtype, collect_garbage, get_rng_state,
                                 make_scaler, set_rng_state, set_schedules, start_compile)
from tasks.registry import RL_TASKS, make_task

MUON_MOMENTUM = 0.85  # answers are noisy, runs are short
KEPT_BY_RESUME = ("task", "num_iterations", "num_epochs", "examples_per_step", "num_samples", "max_new_tokens", "temperature",
                  "top_k", "embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr", "weight_decay", "init_lr_frac", "seed")


def parse_args(argv):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", default="dummy", help="name of the wandb run; dummy: no wandb")
    add_runtime_flags(parser)
    add_model_flags(parser)  # of the finetuned model
    # horizon
    parser.add_argument("--task", choices=RL_TASKS, default="GSM8K", help="whose training problems are asked")
    parser.add_argument("--num-epochs", type=integer(1), default=1, help="times through the task's training problems")
    parser.add_argument("--num-iterations", type=integer(1, off=-1), default="-1", help="optimizer steps; -1 by the epochs")
    # answers
    parser.add_argument("--examples-per-step", type=integer(1), default=16, help="questions a step, all ranks together")
    parser.add_argument("--num-samples", type=integer(2), default=16, help="answers a question")
    parser.add_argument("--max-new-tokens", type=integer(1), default=256, help="of an answer")
    parser.add_argument("--temperature", type=number(0.01, 10), default=1.0, help="of sampling, and of what is learnt")
    parser.add_argument("--top-k", type=integer(0), default=50, help="sample, and learn, among so many tokens; 0: all")
    parser.add_argument("--sample-batch-size", type=integer(1), default=64, help="answers a device writes at a time")
    parser.add_argument("--device-batch-size", type=integer(1), default=8, help="answers a device learns from at a time")
    parser.add_argument("--seed", type=integer(0), default=42, help="of the order of the questions, and of the answers")
    # learning rates: those of pretraining at batch 2^19, times init-lr-frac
    parser.add_argument("--embedding-lr", type=number(), default=0.2, help="at width 768")
    parser.add_argument("--unembedding-lr", type=number(), default=0.004, help="at width 768")
    parser.add_argument("--matrix-lr", type=number(), default=0.02, help="of Muon")
    parser.add_argument("--scalar-lr", type=number(), default=0.0, help="of the few scalars; 0 leaves them as they are")
    parser.add_argument("--weight-decay", type=number(), default=0.0, help="of Muon")
    parser.add_argument("--init-lr-frac", type=number(), default=0.05, help="factor on all of them; it falls to 0 linearly")
    # evaluation, output
    parser.add_argument("--eval-every", type=integer(1, off=-1), default=60, help="steps; -1 before the first and after the last only")
    parser.add_argument("--eval-examples", type=integer(1), default=400, help="held-out problems")
    parser.add_argument("--eval-samples", type=integer(1), default=8, help="answers to each: pass@1 to pass@this")
    add_training_output_flags(parser)
    return parser.parse_args(argv)


def questions_of_step(step: int, total: int, per_step: int, seed: int) -> list[int]:
    """Numbers of the problems of a step: every epoch has an order of its own."""
    places, orders = range(step * per_step, (step + 1) * per_step), {}
    for epoch in {place // total for place in places}:
        orders[epoch] = random.Random(f"{seed} {epoch}").sample(range(total), total)
    return [orders[place // total][place % total] for place in places]


def evaluate(sampler: Sampler, task, settings: Settings, examples: int, runtime) -> dict[str, float]:
    """pass@1, 2, 4, ... over the first `examples` held-out problems, shared among the ranks."""
    numbers = range(min(examples, len(task)))
    groups = sampler.sample(task, list(numbers)[runtime.rank::runtime.world_size], settings, "eval")
    right = [sum(sample.reward > 0 for sample in group) for group in groups]
    ks = sorted({2**i for i in range(settings.num_samples.bit_length())} | {settings.num_samples})
    return {f"pass@{k}": runtime.sum(sum(pass_at_k(c, settings.num_samples, k) for c in right)) / len(numbers) for k in ks}


def main(argv=None) -> dict:
    args = parse_args(argv)

    # --- everything that needs no device ---
    tokenizer = get_tokenizer()
    sft_dir = find_run("sft", args.model_tag)
    sft_step = find_step(sft_dir, args.step)
    sft_meta = load_meta(sft_dir, sft_step)
    check_tokenizer(tokenizer, sft_meta)
    config = config_from_meta(sft_meta["model_config"])
    if args.max_new_tokens >= config.sequence_len:
        raise UserError(f"--max-new-tokens={args.max_new_tokens} leaves no room for a question in the context of {config.sequence_len}")
    directory = source_dir("rl") / sft_dir.name
    sft_id = [sft_step, sft_meta["environment"]["time"]]
    meta = None
    step = find_resume_step(directory, args.resume)
    if step is not None:
        meta = load_meta(directory, step)
        check_resume(meta, args, sft_id, directory)
    task, held_out = RL_TASKS[args.task](), make_task(args.task)
    if args.examples_per_step > len(task):
        raise UserError(f"--examples-per-step={args.examples_per_step}: {args.task} has only {len(task)} training problems")
    num_iterations = args.num_iterations or math.ceil(args.num_epochs * len(task) / args.examples_per_step)
    if meta and meta["step"] == num_iterations:
        print0(f"{directory} is finished already: {num_iterations} steps, pass@1 {meta['pass_at_1']:.1%}")
        return {"step": num_iterations, "pass@1": meta["pass_at_1"], "directory": str(directory), "finished": True}
    state, scores = LoopState(**meta["loop"]) if meta else LoopState(), meta["scores"] if meta else {}

    # --- runtime ---
    runtime = compute_init(args.device_type, DTYPES[(meta or sft_meta)["dtype"]])
    check_dtype(meta, runtime)
    settings = Settings(args.num_samples, args.max_new_tokens, args.temperature, args.top_k or None, args.sample_batch_size)
    eval_settings = replace(settings, num_samples=args.eval_samples)
    print0(f"device: {runtime.device} | world size {runtime.world_size} | {runtime.dtype_name} ({runtime.dtype_reason})")
    print0(f"plan: {num_iterations:,} steps of {args.examples_per_step} questions of {args.task} ({len(task):,}) x "
           f"{args.num_samples} answers; from {sft_dir.name} step {sft_step}")

    # --- model, optimizer ---
    source_directory, source_step = (directory, step) if meta else (sft_dir, sft_step)
    model = build_from_state(config, load_tensors(source_directory / f"model_{source_step:06d}.pt"), runtime.device, runtime.dtype)
    compiled = runtime.device.type == "cuda" and start_compile(model, math.inf)  # a CPU gains less than each length costs
    optimizer = build_optimizer(model, embedding_lr=args.embedding_lr, unembedding_lr=args.unembedding_lr,
                                matrix_lr=args.matrix_lr, scalar_lr=args.scalar_lr, weight_decay=args.weight_decay,
                                compile=compiled)
    for group in optimizer.param_groups:
        share = args.scalar_lr / 0.5 if group["names"][0].startswith(("smear_", "backout_")) else 1.0  # 0.5: of pretraining
        group["initial_lr"] *= share * args.init_lr_frac
        group["weight_decay"] = args.weight_decay if group["kind"] == "muon" else 0.0
    scaler = make_scaler(runtime)
    if meta:
        states = load_optimizer_states(directory, step, meta, runtime)
        optimizer.load_state_dict([s["optimizer"] for s in states])
        set_rng_state(states[0]["rng"], scaler)
        del states
        print0(f"resumed from {directory} at step {step}")
    sampler = Sampler(model, tokenizer)

    record = {"model_config": config_to_meta(config), "user_config": vars(args) | {"num_iterations": num_iterations},
              "max_seq_len": config.sequence_len, "dtype": runtime.dtype_name, "world_size": runtime.world_size,
              "effective_lrs": {group["names"][0]: group["initial_lr"] for group in optimizer.param_groups},
              "tokenizer_hash": tokenizer.content_hash(), "environment": environment(), "sft": sft_id}

    # --- loop ---
    writer = CheckpointWriter(directory, runtime, args.keep_last)
    progress = Progress(runtime, directory, num_iterations=num_iterations, first_step=state.step, run=args.run,
                        config=vars(args), flops_per_token=0.0, peak_flops=None)
    writer.start(step)
    started_s = state.trained_s

    def save():
        state.saved_step = state.step
        writer.save(state.step, model.state_dict(), {"optimizer": optimizer.state_dict(), "rng": get_rng_state(scaler)},
                    record | {"step": state.step, "pass_at_1": scores.get("pass@1"), "scores": scores, "loop": asdict(state)})

    with StopRequest() as stop:
        while True:
            last = state.step == num_iterations
            stopping = stop.agreed(runtime) and not last

            if not stopping and state.evaluated_step != state.step and (state.step == 0 or state.due(args.eval_every, last)):
                sampler.refresh()
                scores = evaluate(sampler, held_out, eval_settings, args.eval_examples, runtime)
                progress.log(state.step, **scores)
                print0(f"step {state.step:,} | " + " | ".join(f"{name} {score:.1%}" for name, score in scores.items()))
                state.evaluated_step = state.step
            if (stopping or state.due(args.save_every, last)) and state.saved_step != state.step:
                save()
            if last or stopping:
                break

            lr = 1.0 - state.step / num_iterations
            set_schedules(optimizer, lr, MUON_MOMENTUM)
            progress.begin_step()
            sampler.refresh()
            questions = questions_of_step(state.step, len(task), args.examples_per_step, args.seed)
            mine = questions[runtime.rank::runtime.world_size]
            groups = sampler.sample(task, mine, settings, f"{args.seed}-{state.step}")
            sampling_s = time.perf_counter() - progress.started
            samples = [sample for group in groups for sample in group]
            tokens = runtime.sum(sum(sum(sample.chosen) for sample in samples))
            reward = runtime.sum(sum(sample.reward for sample in samples)) / (len(questions) * args.num_samples)
            informative = runtime.sum(sum(map(is_informative, groups)))
            loss = 0.0  # where all answers are as good there is nothing to learn, and no step is taken
            if informative:
                share = policy_gradient(model, samples, tokens, args.device_batch_size, settings, scaler)
                loss = apply_gradients(model, optimizer, share, runtime, scaler)
            progress.end_step(state.step, loss, lr, int(tokens), f" | reward {reward:.3f}", reward=reward,
                              informative=informative / len(questions), sampling_s=sampling_s,
                              answer_tokens=tokens / (len(questions) * args.num_samples))
            state.trained_s = started_s + progress.trained_s
            state.count(loss, writer)
            writer.check()
            collect_garbage(progress.steps_done)

    # --- finish ---
    writer.close()
    progress.close()
    state.farewell(last, directory, runtime, stop.name, f"pass@1 {scores.get('pass@1', math.nan):.1%}")
    results = {"step": state.step, **scores, "losses": progress.losses, "finished": last, "directory": str(directory)}
    compute_cleanup()
    return results


def check_resume(meta: dict, args, sft_id: list, directory) -> None:
    """UserError unless the run that is resumed has the same model and the same settings."""
    if meta["sft"] != sft_id:
        raise UserError(f"--resume: {directory} was trained from another finetuned model; leave out --resume (it is kept)")
    before, now = meta["user_config"], vars(args)
    if now["num_iterations"] is None:  # then the epochs decide
        before = before | {"num_iterations": None}
    differing = [f"{name.replace('_', '-')} {before[name]} there, {now[name]} now" for name in KEPT_BY_RESUME
                 if before[name] != now[name]]
    if differing:
        raise UserError(f"--resume needs the settings of the checkpoint: {'; '.join(differing)}. Without --resume the run "
                        "starts afresh (the old one is kept)")


if __name__ == "__main__":
    run_script(main)
