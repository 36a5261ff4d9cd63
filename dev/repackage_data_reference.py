"""Any text dataset as shuffled shards that the data loader likes: parquet, zstd, row groups of 256 documents, about 250
million characters each; the last shard becomes the validation split.

python -m dev.repackage_data_reference --dataset HuggingFaceFW/fineweb-edu --subset sample-100BT --output shards
python -m dev.repackage_data_reference --files 'my_texts/*.parquet' --output shards
python -m scripts.base_train --data-dir shards

The shuffle is a true one, of the whole dataset, in bounded memory: documents are dealt to buckets on disk at random, then each
bucket is shuffled by itself. Memory: one bucket and one shard. Disk: the text once more, beside the shards.
"""

import json
import random
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from nanochat.common import Parser, UserError, integer, run_script
from nanochat.dataset import write_parquet
from nanochat.progress import human

BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text"}
SAY_EVERY = 500_000  # documents


def stream(args) -> Iterator[str]:
    """The documents, one after the other, never all in memory."""
    import datasets  # slow to import

    try:
        if args.files:
            paths = sorted(Path().glob(args.files) if not Path(args.files).is_absolute() else
                           Path("/").glob(str(Path(args.files).relative_to("/"))))
            kinds = {BUILDERS.get(path.suffix) for path in paths}
            if len(kinds) != 1 or None in kinds:
                raise UserError(f"--files={args.files}: expected files of one kind ({', '.join(BUILDERS)}), got "
                                f"{', '.join(sorted({p.suffix or p.name for p in paths})) or 'none'}")
            rows = datasets.load_dataset(kinds.pop(), data_files=[str(path) for path in paths], split="train", streaming=True)
        else:
            rows = datasets.load_dataset(args.dataset, args.subset, split=args.split, streaming=True)
        for row in rows:
            if args.column not in row:
                raise UserError(f"no column {args.column!r}; there are: {', '.join(row)} (--column)")
            if row[args.column]:
                yield row[args.column]
    except UserError:
        raise
    except Exception as error:  # the library raises many kinds
        raise UserError(f"{args.files or args.dataset} cannot be read: {str(error).splitlines()[0]}") from error


def deal(documents: Iterable[str], folder: Path, buckets: int, rng: random.Random) -> tuple[int, int]:
    """Write every document to one of the bucket files at random -> documents, characters."""
    count = chars = 0
    files = [open(folder / f"{i:05d}.jsonl", "w", buffering=1 << 16, encoding="utf-8") for i in range(buckets)]
    try:
        for text in documents:
            files[rng.randrange(buckets)].write(json.dumps(text) + "\n")
            count, chars = count + 1, chars + len(text)
            if count % SAY_EVERY == 0:
                print(f"read {count:,} documents, {human(chars)} characters", flush=True)
    finally:
        for file in files:
            file.close()
    return count, chars


def shuffled(folder: Path, rng: random.Random) -> Iterator[str]:
    """The documents of all buckets, each bucket shuffled; a bucket is deleted when it has been read."""
    for path in sorted(folder.glob("*.jsonl")):
        with open(path, encoding="utf-8") as file:
            documents = [json.loads(line) for line in file]
        path.unlink()
        rng.shuffle(documents)
        yield from documents


def write_shards(documents: Iterable[str], output: Path, chars: int, shard_chars: int) -> list[int]:
    """Shards of equal size, near `shard_chars`, the last one as val.parquet -> characters of each."""
    number = max(2, round(chars / shard_chars))
    sizes, shard, size, written = [], [], 0, 0
    for text in documents:
        if shard and len(sizes) < number - 1 and written + size + len(text) / 2 > chars * (len(sizes) + 1) / number:
            write_parquet(output / f"shard_{len(sizes):05d}.parquet", shard)
            print(f"shard {len(sizes) + 1}/{number}: {len(shard):,} documents, {human(size)} characters", flush=True)
            sizes.append(size)
            shard, size, written = [], 0, written + size
        shard.append(text)
        size += len(text)
    write_parquet(output / "val.parquet", shard)
    return [*sizes, size]


def main(argv=None) -> dict:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default=None, help="on the Hugging Face hub, as org/name")
    parser.add_argument("--subset", default=None, help="of the dataset")
    parser.add_argument("--split", default="train", help="of the dataset")
    parser.add_argument("--files", default=None, help="local files instead: parquet, jsonl or txt (a line a document), with *")
    parser.add_argument("--column", default="text", help="that holds the text")
    parser.add_argument("--output", required=True, help="folder of the shards")
    parser.add_argument("--shard-chars", type=integer(1), default=250_000_000, help="characters of a shard, about")
    parser.add_argument("--buckets", type=integer(1, 4000), default=256, help="so many that a bucket fits into memory")
    parser.add_argument("--max-documents", type=integer(2, off=-1), default="-1", help="stop after so many; -1 all")
    parser.add_argument("--seed", type=integer(0), default=42, help="of the shuffle")
    args = parser.parse_args(argv)
    if bool(args.dataset) == bool(args.files):
        raise UserError("give one of --dataset and --files")
    output = Path(args.output)
    if output.exists() and any(output.iterdir()):
        raise UserError(f"{output} is not empty; give another --output, or empty it")

    start, rng = time.perf_counter(), random.Random(args.seed)
    folder = output / "buckets"
    folder.mkdir(parents=True)
    try:
        documents = stream(args)
        if args.max_documents:
            documents = (text for _, text in zip(range(args.max_documents), documents))
        count, chars = deal(documents, folder, args.buckets, rng)
        if count < 2:
            raise UserError(f"{args.files or args.dataset}: {count} documents with text; a training and a validation split need two")
        sizes = write_shards(shuffled(folder, rng), output, chars, args.shard_chars)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{count:,} documents, {human(chars)} characters in {len(sizes) - 1} shards and val.parquet in {output}, "
          f"{time.perf_counter() - start:.0f} s; train on them with --data-dir {output}")
    return {"documents": count, "chars": chars, "shards": sizes}


if __name__ == "__main__":
    run_script(main)
