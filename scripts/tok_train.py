"""Train the tokenizer on the training split of the corpus.

python -m scripts.tok_train --vocab-size 32768
"""

import json
import time

from nanochat.common import Parser, get_base_dir, integer, print0, read_json, run_script
from nanochat.dataset import DocumentReader, find_corpus
from nanochat.tokenizer import FILE_NAME, RustBPETokenizer


def documents(files, max_chars: int, doc_cap: int):
    """Texts of the corpus in order, each cut to `doc_cap` characters, `max_chars` in all."""
    reader, chars, first = DocumentReader(files), 0, 0
    while first < reader.num_documents and chars < max_chars:
        batch = reader.read(first, min(512, reader.num_documents - first))
        first += len(batch)
        for text in batch:
            text = text[:min(doc_cap, max_chars - chars)]
            chars += len(text)
            if text:
                yield text


def main(argv=None) -> dict:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-chars", type=integer(1), default=2_000_000_000, help="characters to train on")
    parser.add_argument("--doc-cap", type=integer(1), default=10_000, help="characters used of one document")
    parser.add_argument("--vocab-size", type=integer(265, 2**24), default=32768, help="tokens, the 9 specials included")
    parser.add_argument("--first-files", type=integer(1, off=-1), default="-1",
                        help="train on the first so many files of the corpus, the others may still be on their way; -1 all")
    parser.add_argument("--data-dir", default=None, help="folder of parquet, jsonl or txt files in place of the corpus")
    parser.add_argument("--resume", action="store_true",
                        help="keep a tokenizer that was trained with the same settings on the same files")
    args = parser.parse_args(argv)

    corpus = find_corpus(args.data_dir)
    files = corpus.train[:args.first_files]
    directory = get_base_dir() / "tokenizer"
    settings = {"max_chars": args.max_chars, "doc_cap": args.doc_cap, "vocab_size": args.vocab_size,
                "files": DocumentReader(files).names}
    record = directory / "settings.json"
    if args.resume and read_json(record) == settings:
        tokenizer = RustBPETokenizer.from_directory(directory)
        print0(f"tokenizer: {directory / FILE_NAME} was trained with these settings already")
        return {"vocab_size": tokenizer.get_vocab_size(), "seconds": 0.0}

    print0(f"training a tokenizer of {args.vocab_size:,} tokens on {corpus.name}")
    start = time.perf_counter()
    tokenizer = RustBPETokenizer.train_from_iterator(documents(files, args.max_chars, args.doc_cap),
                                                     args.vocab_size)
    seconds = time.perf_counter() - start
    record.unlink(missing_ok=True)  # never beside a tokenizer of other settings
    tokenizer.save(directory)
    record.write_text(json.dumps(settings))
    if tokenizer.get_vocab_size() < args.vocab_size:
        print0(f"the text has no more to merge: the vocabulary ends at {tokenizer.get_vocab_size():,} tokens")
    sizes = tokenizer.token_bytes()
    mean = sizes[sizes > 0].float().mean().item()
    print0(f"tokenizer: {tokenizer.get_vocab_size():,} tokens, {mean:.2f} bytes each on average, {seconds:.1f} s, in "
           f"{directory / FILE_NAME}")
    return {"vocab_size": tokenizer.get_vocab_size(), "seconds": seconds}


if __name__ == "__main__":
    run_script(main)
