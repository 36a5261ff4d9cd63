"""Write identity conversations from a knowledge file: from templates, or through an OpenAI-compatible endpoint.

python -m dev.gen_synthetic_data
OPENAI_BASE_URL=http://localhost:8000/v1 OPENAI_API_KEY=... python -m dev.gen_synthetic_data --endpoint --model NAME
"""

import json
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from nanochat import synthetic
from nanochat.common import Parser, UserError, get_base_dir, integer, print0, run_script
from nanochat.tokenizer import check_conversation

MOODS = ("a curious child", "a busy engineer", "a student", "someone who writes in lower case and in a hurry",
         "a sceptical journalist", "a polite elderly person", "a researcher", "somebody who greets first")
INSTRUCTIONS = """You write training conversations for a small chat model called nanochat. Everything that the assistant
says about itself must agree with these facts, question and answer pairs by topic:

{facts}

Write one conversation of {turns} exchanges between {mood} and the assistant, in plain English, about the topics:
{topics}. Use other words than the facts do, and short answers. Reply with JSON only:
{{"messages": [{{"role": "user", "content": "..."}}, {{"role": "assistant", "content": "..."}}]}}"""


def from_templates(count: int, topics: dict, seed: int) -> list[dict]:
    rng = random.Random(seed)
    return [synthetic.identity(rng, topics) for _ in range(count)]


def from_endpoint(count: int, topics: dict, seed: int, model: str) -> list[dict]:
    """Ask the endpoint in $OPENAI_BASE_URL; UserError if it cannot be used."""
    base, key = os.environ.get("OPENAI_BASE_URL"), os.environ.get("OPENAI_API_KEY", "none")
    if not base:
        raise UserError("--endpoint needs OPENAI_BASE_URL, for example http://localhost:8000/v1")
    facts = "\n".join(f"[{name}] {topic['ask'][0]} {' / '.join(topic['tell'])}" for name, topic in topics.items())

    def one(number: int) -> dict | None:
        rng = random.Random(f"{seed} {number}")
        chosen = rng.sample(sorted(topics), min(len(topics), rng.choice((1, 2, 3))))
        text = INSTRUCTIONS.format(facts=facts, turns=len(chosen), mood=rng.choice(MOODS), topics=", ".join(chosen))
        response = httpx.post(f"{base.rstrip('/')}/chat/completions", timeout=120, headers={"Authorization": f"Bearer {key}"},
                              json={"model": model, "messages": [{"role": "user", "content": text}], "temperature": 1.0})
        response.raise_for_status()
        try:
            reply = response.json()["choices"][0]["message"]["content"]
            chat = json.loads(reply[reply.index("{"):reply.rindex("}") + 1])
            check_conversation(chat)
            return {"messages": chat["messages"]}
        except (ValueError, KeyError, TypeError, UserError):  # not what was asked for: left out, and counted
            return None

    try:
        with ThreadPoolExecutor(4) as pool:
            written = list(pool.map(one, range(count)))
    except httpx.HTTPError as error:
        raise UserError(f"{base}: {error}; check OPENAI_BASE_URL, OPENAI_API_KEY and --model") from error
    good = [chat for chat in written if chat is not None]
    if len(good) < count:
        print0(f"{count - len(good)} replies were no conversations and are left out")
    if not good:
        raise UserError(f"{base}: no reply of {model} was a conversation")
    return good


def main(argv=None) -> dict:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", "--count", type=integer(1), default=1500, help="conversations to write")
    parser.add_argument("--knowledge", default=str(synthetic.KNOWLEDGE_FILE), help="knowledge file")
    parser.add_argument("--output", default=None, help="jsonl file (identity_conversations.jsonl in the base directory)")
    parser.add_argument("--seed", type=integer(0), default=0, help="another seed, other conversations")
    parser.add_argument("--endpoint", action="store_true", help="let the model behind $OPENAI_BASE_URL write them")
    parser.add_argument("--model", default="gpt-4o-mini", help="its name there")
    args = parser.parse_args(argv)
    topics = synthetic.read_knowledge(Path(args.knowledge))
    output = Path(args.output) if args.output else get_base_dir() / "identity_conversations.jsonl"
    temporary = output.with_name(output.name + ".tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    temporary.touch()  # before an endpoint is paid
    chats = from_endpoint(args.count, topics, args.seed, args.model) if args.endpoint else \
        from_templates(args.count, topics, args.seed)
    temporary.write_text("".join(json.dumps(chat, ensure_ascii=False) + "\n" for chat in chats), encoding="utf-8")
    temporary.replace(output)
    print0(f"{len(chats):,} identity conversations over {len(topics)} topics in {output}")
    return {"count": len(chats), "output": str(output)}


if __name__ == "__main__":
    run_script(main)
