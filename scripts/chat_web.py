"""Serve a chat model: a page for the browser, and an API that OpenAI's client can use.

python -m scripts.chat_web
python -m scripts.chat_web -i sft -p 8000 --host 0.0.0.0 --api-key secret
"""

import asyncio
import os
import re
import resource

import torch

from nanochat.checkpoint_manager import SOURCES, locate_model
from nanochat.common import (Parser, UserError, add_model_flags, add_runtime_flags, autodetect_device_type, integer, number,
                             run_script)
from nanochat.replica import ModelChoice, Replica
from nanochat.server import bind, run
from nanochat.service import Settings

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def allow_many_connections() -> None:
    """As many open files as the system lets this user have: each connection is one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def choices(args, device_type: str) -> list[ModelChoice]:
    """What each engine loads: on GPUs one a device, on CPUs the threads are dealt out."""
    if device_type == "cuda" and args.num_gpus > torch.cuda.device_count():
        raise UserError(f"--num-gpus={args.num_gpus} on cuda, but PyTorch sees {torch.cuda.device_count()} GPUs here")
    threads = max(1, torch.get_num_threads() // args.num_gpus) if device_type == "cpu" else None
    slots = args.slots or (256 if device_type == "cuda" else 64)
    return [ModelChoice(args.source, args.model_tag, args.step, device_type, index, threads, slots)
            for index in range(args.num_gpus)]


def main(argv=None) -> dict:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("-i", "--source", choices=SOURCES, default="sft", help="which stage's model")
    add_model_flags(parser)
    add_runtime_flags(parser)
    parser.add_argument("-n", "--num-gpus", type=integer(1), default=1, help="engines, one a GPU, each with all of the model")
    parser.add_argument("--slots", type=integer(1), default=None,
                        help="conversations at once and engine; left out: 256 on GPUs, 64 on CPUs, fewer if memory is short")
    parser.add_argument("--max-queue", type=integer(0), default=64, help="requests that may wait for a slot; more get 503")
    parser.add_argument("-t", "--temperature", type=number(0, 2), default=0.6, help="where a request names none")
    parser.add_argument("-k", "--top-k", type=integer(0, 200), default=50, help="where a request names none; 0: all tokens")
    parser.add_argument("-m", "--max-tokens", type=integer(1, 4096), default=512, help="where a request names none")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: reachable from other machines")
    parser.add_argument("-p", "--port", type=integer(0, 65535), default=8000, help="0: any free one")
    parser.add_argument("--api-key", default=os.environ.get("NANOCHAT_API_KEY") or None, help="wanted from clients; or NANOCHAT_API_KEY")
    parser.add_argument("--cors-origin", action="append", default=[], metavar="URL",
                        help="lets pages of this origin use the API from browsers; may be repeated")
    parser.add_argument("--log-content", action="store_true", help="log what is asked and answered")
    parser.add_argument("--drain-seconds", type=number(0, 3600), default=30.0, help="that running answers get at shutdown")
    args = parser.parse_args(argv)
    if args.api_key is not None and not re.fullmatch("[!-~]+", args.api_key):
        raise UserError("--api-key: expected one or more ASCII letters, digits and signs, no spaces; browsers send nothing else")
    directory, meta, tokenizer = locate_model(args.source, args.model_tag, args.step)
    name = f"{args.source} {directory.name}, step {meta['step']}"
    device_type = args.device_type or autodetect_device_type()
    args.model_tag, args.step = directory.name, meta["step"]
    replicas = [Replica(choice) for choice in choices(args, device_type)]
    listening = bind(args.host, args.port)
    allow_many_connections()
    settings = Settings(f"nanochat-{directory.name}", args.max_tokens, args.temperature, args.top_k, 1.0, args.max_queue,
                        args.api_key, tuple(origin.rstrip("/") for origin in args.cors_origin), args.log_content, args.drain_seconds)

    def announce(port: int) -> None:
        facts = [replica.facts for replica in replicas]
        print(f"{name} | context {facts[0]['context']} | "
              + ", ".join(f"{f['device']} {f['dtype']}, {f['slots']} slots" for f in facts))
        shown = "localhost" if args.host in (*LOOPBACK, "0.0.0.0", "::") else args.host
        print(f"open http://{shown}:{port} (OpenAI's client: base_url=http://{shown}:{port}/v1)")
        reach = "only from this machine (--host 0.0.0.0 for others)" if args.host in LOOPBACK else \
            "from other machines too" + ("" if args.api_key else ", by anyone: --api-key asks for a key")
        print(f"listening on {args.host}, reachable {reach}; Ctrl-C ends it", flush=True)

    print(f"loading {name} ...", flush=True)
    asyncio.run(run(replicas, tokenizer, settings, listening, announce))
    print("stopped")
    return {}


if __name__ == "__main__":
    run_script(main)
