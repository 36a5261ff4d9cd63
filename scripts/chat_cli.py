"""Chat in the terminal.

python -m scripts.chat_cli -p "Why is the sky blue?"
python -m scripts.chat_cli
"""

import random
import signal
import sys

from nanochat.checkpoint_manager import SOURCES, load_model, locate_model
from nanochat.common import (Parser, UserError, add_model_flags, add_runtime_flags, compute_init, integer, number,
                             run_script)
from nanochat.engine import Engine, Request, join_pieces, prompt_limit

HELP = "/clear forgets the conversation, /quit (or Ctrl-D) leaves, Ctrl-C stops an answer"


class Printer:
    """Writes the pieces of an answer as they come, a tool call as [expression = result]."""

    def __init__(self, out):
        self.out, self.in_call = out, False

    def push(self, kind: str, text: str) -> None:
        if kind == "text" and text:
            self.close()
        if not text and kind == "python":
            self.close()
            self.in_call = True
        self.out(text or {"python": "[", "python_output": " = "}.get(kind, ""))

    def close(self) -> None:
        self.out("]" if self.in_call else "")
        self.in_call = False


def answer(engine: Engine, messages: list[dict], args, out) -> tuple[list[dict], list[dict]]:
    """Stream one answer to `out` -> (messages that were still in context, parts of the answer)."""
    limit = prompt_limit(engine.context, args.max_tokens)
    prompt, kept, tokens = engine.tokenizer.fit_conversation(messages, limit)
    if len(kept) < len(messages):
        out(f"[the context of {engine.context} tokens is full: the {(len(messages) - len(kept)) // 2} oldest exchange(s) "
            "are forgotten]\n")
    if tokens > limit:
        out(f"[your message has {tokens} tokens, the context {engine.context}: only its end is read]\n")
    seed = random.randrange(2**32) if args.seed is None else args.seed
    sequence = engine.submit(Request(prompt, args.max_tokens, args.temperature, args.top_k or None, args.top_p, seed,
                                     text=True))
    printer, shown = Printer(out), 0
    with Interruption() as interruption:
        while not sequence.done:
            engine.step()
            if interruption.asked:
                engine.cancel(sequence)
            for piece in sequence.completion.pieces[shown:]:
                printer.push(*piece)
            shown = len(sequence.completion.pieces)
    printer.close()
    out({"length": f"\n[stopped at --max-tokens={args.max_tokens}]", "cancelled": "\n[stopped]",
         "context": "\n[stopped: the context is full; /clear starts anew]"}.get(sequence.completion.finish_reason, "") + "\n")
    return kept, join_pieces(sequence.completion.pieces)


class Interruption:
    """Turns Ctrl-C into a question that is answered between two tokens; a second one ends the program."""

    def __enter__(self):
        self.asked, self._previous = False, signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *exc):
        signal.signal(signal.SIGINT, self._previous)

    def _note(self, signum, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


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
        except KeyboardInterrupt:
            print("\n(/quit or Ctrl-D leaves)")
            continue
        if text.lower() in ("/quit", "/exit", "quit", "exit"):
            return
        if text.lower() in ("/clear", "clear"):
            messages = []
            print("(forgotten)")
            continue
        if text.startswith("/"):
            print(f"unknown command {text}; {HELP}")
            continue
        if not text:
            continue
        write("nanochat: ")
        messages, parts = answer(engine, messages + [{"role": "user", "content": text}], args, write)
        messages = messages + [{"role": "assistant", "content": parts}]


def main(argv=None) -> dict:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("-p", "--prompt", default=None, help="answer this and leave; a conversation when left out")
    parser.add_argument("-i", "--source", choices=SOURCES, default="sft", help="which stage's model")
    add_model_flags(parser)
    add_runtime_flags(parser)
    parser.add_argument("-t", "--temperature", type=number(0, 2), default=0.6, help="0: always the likeliest token")
    parser.add_argument("-k", "--top-k", type=integer(0), default=50, help="sample among so many tokens; 0: all")
    parser.add_argument("--top-p", type=number(0, 1), default=1.0, help="sample among the likeliest with this probability in all")
    parser.add_argument("-m", "--max-tokens", type=integer(1), default=256, help="of each answer")
    parser.add_argument("--seed", type=integer(0), default=None, help="fix it to get the same answers again; random else")
    args = parser.parse_args(argv)
    if args.prompt is not None and not args.prompt.strip():
        raise UserError("-p: the prompt is empty")
    locate_model(args.source, args.model_tag, args.step)
    runtime = compute_init(args.device_type)
    model, tokenizer, meta = load_model(args.source, runtime.device, "eval", args.model_tag, args.step, runtime.dtype)
    engine = Engine(model, tokenizer, slots=1)  # keeps what a conversation has had so far
    if args.prompt is None:
        converse(engine, args, f"nanochat {meta['tag']}, step {meta['step']}, on {runtime.device}")
        return {}
    _, parts = answer(engine, [{"role": "user", "content": args.prompt}], args, write)
    return {"answer": "".join(part["text"] for part in parts)}


if __name__ == "__main__":
    run_script(main)
