"""Chat in the terminal.

python -m scripts.chat_cli -p "Why is the sky blue?"
python -m scripts.chat_cli
"""

import random
import sys

from nanochat.checkpoint_manager import SOURCES, load_model, locate_model
from nanochat.common import (Parser, UserError, add_model_flags, add_runtime_flags, compute_init, integer, number,
                             run_script)
from nanochat.engine import Engine, TextStream

MIN_ANSWER_TOKENS = 32  # room that a prompt leaves for the answer
HELP = "/clear forgets the conversation, /quit (or Ctrl-D) leaves"


def forget_oldest(tokenizer, messages: list[dict], limit: int) -> tuple[list[dict], int]:
    """The conversation without its oldest turns, as few as needed to render within `limit` tokens; and how many went."""
    dropped = 0
    while len(messages) > 1 and len(tokenizer.render_for_completion({"messages": messages})) > limit:
        messages, dropped = messages[2:], dropped + 1
    return messages, dropped


def answer(engine: Engine, messages: list[dict], args, out) -> tuple[list[dict], list[dict]]:
    """Stream one answer to `out` -> (messages that were still in context, parts of the answer)."""
    tokenizer = engine.tokenizer
    limit = max(1, engine.context - min(args.max_tokens, max(MIN_ANSWER_TOKENS, engine.context // 4)))
    messages, dropped = forget_oldest(tokenizer, messages, limit)
    if dropped:
        out(f"[the context of {engine.context} tokens is full: the {dropped} oldest exchange(s) are forgotten]\n")
    prompt = tokenizer.render_for_completion({"messages": messages}, max_tokens=limit)
    whole = len(tokenizer.render_for_completion({"messages": messages}))
    if whole > limit:
        out(f"[your message has {whole} tokens, the context {engine.context}: only its end is read]\n")
    seed = random.randrange(2**32) if args.seed is None else args.seed
    markers = {engine.python_start: "python", engine.output_start: "python_output"}
    parts, stream = [{"type": "text", "text": ""}], TextStream(tokenizer)

    def emit(text):
        parts[-1]["text"] += text
        out(text)

    for (token,), _ in engine.generate(prompt, max_tokens=args.max_tokens, temperature=args.temperature,
                                       top_k=args.top_k or None, seed=seed):
        if token in engine.stop_tokens:
            break
        if token in markers or token in (engine.python_end, engine.output_end):
            emit(stream.flush())
            opens = token in markers
            parts.append({"type": markers.get(token, "text"), "text": ""})
            out({engine.python_start: "[", engine.output_start: " = ", engine.output_end: "]"}.get(token, "")
                if opens or token == engine.output_end else "")
            continue
        emit(stream.push(token))
    emit(stream.flush())
    reason = engine.finish_reasons[0]
    if reason == "length":
        out(f"\n[stopped at --max-tokens={args.max_tokens}]")
    elif reason == "context":
        out("\n[stopped: the context is full; /clear starts anew]")
    out("\n")
    return messages, [part for part in parts if part["text"]] or [{"type": "text", "text": ""}]


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def converse(engine: Engine, args, name: str) -> None:
    try:
        import readline  # noqa: F401  arrow keys and history for input()
    except ImportError:
        pass
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    print(f"{name}\n{HELP}")
    messages: list[dict] = []
    while True:
        try:
            text = input("\nYou: ").strip()
        except EOFError:
            print()
            return
        if text in ("/quit", "/exit"):
            return
        if text == "/clear":
            messages = []
            print("(forgotten)")
            continue
        if text.startswith("/"):
            print(f"unknown command {text.split()[0]}; {HELP}")
            continue
        if not text:
            continue
        write("nanochat: ")
        try:
            messages, parts = answer(engine, messages + [{"role": "user", "content": text}], args, write)
        except KeyboardInterrupt:
            write("\n(stopped; this exchange is forgotten)\n")
            continue
        messages = messages + [{"role": "assistant", "content": parts}]


def main(argv=None) -> dict:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("-p", "--prompt", default=None, help="answer this and leave; a conversation when left out")
    parser.add_argument("-i", "--source", choices=SOURCES, default="sft", help="which stage's model")
    add_model_flags(parser)
    add_runtime_flags(parser)
    parser.add_argument("-t", "--temperature", type=number(0, 2), default=0.6, help="0: always the likeliest token")
    parser.add_argument("-k", "--top-k", type=integer(0), default=50, help="sample among so many tokens; 0: all")
    parser.add_argument("-m", "--max-tokens", type=integer(1), default=256, help="of each answer")
    parser.add_argument("--seed", type=integer(0), default=None, help="fix it to get the same answers again; random else")
    args = parser.parse_args(argv)
    if args.prompt is not None and not args.prompt.strip():
        raise UserError("-p: the prompt is empty")
    locate_model(args.source, args.model_tag, args.step)
    runtime = compute_init(args.device_type)
    model, tokenizer, meta = load_model(args.source, runtime.device, "eval", args.model_tag, args.step, runtime.dtype)
    engine = Engine(model, tokenizer)
    if args.prompt is None:
        converse(engine, args, f"nanochat {meta['tag']}, step {meta['step']}, on {runtime.device}")
        return {}
    _, parts = answer(engine, [{"role": "user", "content": args.prompt}], args, write)
    return {"answer": "".join(part["text"] for part in parts)}


if __name__ == "__main__":
    run_script(main)
