"""Ask a chat model twenty questions about itself, worded otherwise than in training, and look for the right fact.

python -m dev.identity_check
"""

import re

from nanochat.checkpoint_manager import SOURCES, load_model
from nanochat.common import Parser, add_model_flags, add_runtime_flags, compute_init, print0, run_script
from nanochat.engine import Engine
from nanochat.synthetic import read_knowledge

PROBES = (  # question, what a right answer contains
    ("Could you tell me what your name is?", "nanochat"),
    ("By what name do you go?", "nanochat"),
    ("I'd like to know who you are.", "nanochat"),
    ("Are you a person or a program?", "not a human|not a person|program|language model"),
    ("Is a human being typing these answers?", "not a human|not a person|program|language model"),
    ("Who was it that made you?", "nanochat project|open-source|made with nanochat"),
    ("Which people created this model?", "nanochat project|open-source|made with nanochat"),
    ("What licence is your code under?", "MIT"),
    ("May I modify your source code?", "MIT|open source|free"),
    ("What is the reason you were made?", "learn|show|purpose|how a chat model|how chat models"),
    ("What things can you help me with?", "spell|count|arithmetic|calculat"),
    ("Do you sometimes get things wrong?", "mistakes|wrong|check"),
    ("What sort of neural net are you?", "Transformer"),
    ("How many parameters are in your network?", "million"),
    ("What texts were used to train you?", "English text|conversations"),
    ("Could we talk in Portuguese?", "English"),
    ("Are you able to use the internet?", "no access|can't go online|no internet|No"),
    ("Will you still know me tomorrow?", "forget|don't remember|only know|no memory|only see"),
    ("Are you the same as ChatGPT?", "nanochat|No"),
    ("Which programming language were you written in?", "Python"),
)


def main(argv=None) -> dict:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("-i", "--source", choices=SOURCES, default="sft", help="which stage's model")
    add_model_flags(parser)
    add_runtime_flags(parser)
    args = parser.parse_args(argv)
    asked = {ask.lower().rstrip("?.!") for topic in read_knowledge().values() for ask in topic["ask"]}
    seen = [question for question, _ in PROBES if question.lower().rstrip("?.!") in asked]
    assert not seen, f"these are training questions: {seen}"

    runtime = compute_init(args.device_type)
    model, tokenizer, _ = load_model(args.source, runtime.device, "eval", args.model_tag, args.step, runtime.dtype)
    prompts = [tokenizer.render_for_completion({"messages": [{"role": "user", "content": question}]})
               for question, _ in PROBES]
    completions = Engine(model, tokenizer).generate_many(prompts, max_tokens=64, temperature=0)
    right = 0
    for (question, pattern), completion in zip(PROBES, completions):
        answer = tokenizer.decode(completion.tokens)
        good = re.search(pattern, answer, re.IGNORECASE) is not None
        right += good
        print0(f"{'right' if good else 'WRONG'}  {question}\n       {answer}")
    print0(f"{right} of {len(PROBES)} answers have the right fact")
    return {"right": right, "of": len(PROBES)}


if __name__ == "__main__":
    run_script(main)
