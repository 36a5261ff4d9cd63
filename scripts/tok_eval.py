"""Compare our tokenizer with GPT-2's and GPT-4's: bytes per token on several kinds of text.

python -m scripts.tok_eval
"""

import json
import os

from nanochat import hub
from nanochat.common import Parser, get_base_dir, print0, run_script
from nanochat.dataset import DocumentReader, find_corpus
from nanochat.tokenizer import RustBPETokenizer, get_tokenizer

TIKTOKEN_HOST = "https://openaipublic.blob.core.windows.net"  # where tiktoken gets its vocabularies
SAMPLES = {
    "news": "The city council voted on Tuesday to extend the tram line to the harbour. Construction is expected to "
            "begin next spring and will cost about 240 million euros, according to the mayor's office. Residents of "
            "the old town had asked for a stop near the market, which the final plan now includes. ",
    "code": "def moving_average(values, width):\n    total = sum(values[:width])\n    averages = [total / width]\n"
            "    for i in range(width, len(values)):\n        total += values[i] - values[i - width]\n"
            "        averages.append(total / width)\n    return averages\n",
    "maths": "Let $f(x) = x^2 + 3x - 10$. The roots satisfy $x = \\frac{-3 \\pm \\sqrt{9 + 40}}{2}$, hence $x_1 = 2$ and "
             "$x_2 = -5$; the vertex lies at $(-1.5, -12.25)$ and $\\int_0^1 f(x)\\,dx = -\\frac{49}{6}$. ",
    "science": "Mitochondria produce adenosine triphosphate by oxidative phosphorylation: electrons pass along the inner "
               "membrane while protons are pumped into the intermembrane space, and the resulting gradient drives the "
               "enzyme ATP synthase. ",
    "chat": "hey, are you free on saturday? we could go to the lake if it doesn't rain :) i'll bring sandwiches, you "
            "bring the frisbee. lmk! ",
    "korean": "서울의 아침은 일찍 시작된다. 지하철은 사람들로 가득하고, 거리의 작은 가게들은 벌써 문을 열었다. ",
    "german": "Der Nebel lag noch über dem Fluss, als die ersten Boote ablegten. Niemand sprach, nur das Wasser schlug "
              "leise gegen die Planken, und weit draußen rief eine Möwe. ",
}


def bytes_per_token(tokenizer: RustBPETokenizer, text: str) -> float:
    return len(text.encode()) / len(tokenizer.encode(text))


def main(argv=None) -> dict:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", default=None, help="folder in place of the corpus")
    args = parser.parse_args(argv)

    tokenizers = {"nanochat": get_tokenizer()}
    online = bool(os.environ.get("TIKTOKEN_CACHE_DIR")) or hub.is_reachable(TIKTOKEN_HOST)
    for label, name in (("GPT-2", "gpt2"), ("GPT-4", "cl100k_base")):
        try:
            if not online:
                raise ConnectionError(f"{TIKTOKEN_HOST} is out of reach")
            tokenizers[label] = RustBPETokenizer.from_pretrained(name)
        except Exception as error:  # tiktoken downloads it; any network error means: compare without
            print0(f"{label}'s tokenizer cannot be loaded here ({str(error)[:90]}): left out")
    texts = dict(SAMPLES)
    corpus = find_corpus(args.data_dir)
    for split in ("train", "val"):
        reader = DocumentReader(getattr(corpus, split))
        texts[f"corpus {split}"] = "\n".join(reader.read(0, min(200, reader.num_documents)))

    results = {label: {kind: bytes_per_token(t, text) for kind, text in texts.items()}
               for label, t in tokenizers.items()}
    ours = results["nanochat"]
    for label, tokenizer in tokenizers.items():
        print0(f"{label}: {tokenizer.get_vocab_size():,} tokens")
    print0(f"\n{'bytes per token':<16}{'bytes':>9}" + "".join(f"{label:>10}" for label in tokenizers)
           + "".join(f"{'vs ' + label:>10}" for label in list(tokenizers)[1:]))
    for kind, text in texts.items():
        row = f"{kind:<16}{len(text.encode()):>9,}" + "".join(f"{results[label][kind]:>10.2f}" for label in tokenizers)
        row += "".join(f"{ours[kind] / results[label][kind] - 1:>+10.0%}" for label in list(tokenizers)[1:])
        print0(row)
    (get_base_dir() / "tokenizer" / "tok_eval.json").write_text(json.dumps(results))
    return results


if __name__ == "__main__":
    run_script(main)
