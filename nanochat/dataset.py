"""The pretraining corpus: find it, download it, or build it; and read its documents in order.

Three corpora, the first that applies: a person's own folder (--data-dir or $NANOCHAT_DATA_DIR), ClimbMix shards,
the built-in corpus. All are read as parquet files with a column "text"; the validation split is explicit.

python -m nanochat.dataset -n 8       download 8 training shards of ClimbMix and the validation shard
python -m nanochat.dataset --builtin  write the built-in corpus
python -m nanochat.dataset --auto     what the network allows
"""

import ast
import hashlib
import importlib.metadata
import inspect
import json
import os
import random
import re
import shutil
import sys
import sysconfig
from bisect import bisect_right
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from nanochat import hub, synthetic
from nanochat.common import (Parser, UserError, announced, get_base_dir, integer, print0, read_json, read_jsonl,
                             run_script)

CLIMBMIX_REPO = "karpathy/climbmix-400b-shuffle"
CLIMBMIX_LAST = 6542  # the validation shard; 0 to 6541 are for training
BUILTIN_MAX_CHARS = 12_000_000  # of prose; generated text comes on top
BUILTIN_VERSION = 1
ROW_GROUP = 256  # documents
TXT_PIECE_CHARS = 8000  # longer text files are cut at paragraph ends into documents of about this size
VAL_NAME = re.compile(r"(^|[-_.])(val|valid|validation)([-_.]|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Corpus:
    """Parquet files of the two splits, disjoint, in reading order."""

    name: str
    train: tuple[Path, ...]
    val: tuple[Path, ...]


# --- find ---------------------------------------------------------------------------------------------------------


def climbmix_dir() -> Path:
    return get_base_dir() / "base_data_climbmix"


def builtin_dir() -> Path:
    return get_base_dir() / "base_data_builtin"


def shard_name(index: int) -> str:
    """shard_name(7) -> "shard_00007.parquet"."""
    return f"shard_{index:05d}.parquet"


def find_corpus(data_dir: str | None = None) -> Corpus:
    """The corpus to train on: own folder, else ClimbMix, else built-in; UserError if there is none."""
    data_dir = data_dir or os.environ.get("NANOCHAT_DATA_DIR")
    if data_dir:
        return _own_corpus(Path(data_dir).expanduser())
    has_builtin = read_json(builtin_dir() / "done.json") is not None
    if climbmix_dir().is_dir() and list(climbmix_dir().glob("shard_*.parquet")):
        try:
            return _climbmix_corpus()
        except UserError as error:
            if not has_builtin:
                raise
            print0(f"ClimbMix is not complete ({error}): taking the built-in corpus, which is here too")
    if has_builtin:
        return Corpus("built-in corpus", *_split_by_name(sorted(builtin_dir().glob("*.parquet"))))
    raise UserError("no corpus: run python -m nanochat.dataset -n 8 (ClimbMix), or python -m nanochat.dataset --builtin "
                    "(no network needed), or give --data-dir")


def _climbmix_corpus() -> Corpus:
    shards = sorted(climbmix_dir().glob("shard_*.parquet"))
    val = climbmix_dir() / shard_name(CLIMBMIX_LAST)
    if val not in shards:
        raise UserError(f"{climbmix_dir()} lacks the validation shard {val.name}: run python -m nanochat.dataset -n 1")
    if len(shards) == 1:
        raise UserError(f"no training shard in {climbmix_dir()}: run python -m nanochat.dataset -n 8")
    return Corpus("ClimbMix", tuple(p for p in shards if p != val), (val,))


def _split_by_name(files: list[Path]) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """(training files, validation files): those under a folder val/ or with val, valid, validation in their name."""
    val = [f for f in files if VAL_NAME.search(f.stem) or VAL_NAME.search(f.parent.name)]
    return tuple(f for f in files if f not in val), tuple(val)


def _own_corpus(folder: Path) -> Corpus:
    if not folder.is_dir():
        what = "is a file: give the folder that holds it" if folder.exists() else "does not exist"
        raise UserError(f"data directory {folder} {what}")
    files = sorted(f for pattern in ("*", "*/*") for f in folder.glob(pattern)
                   if f.suffix in (".parquet", ".jsonl", ".txt") and (f.is_file() or f.is_symlink()))
    for lost in (f for f in files if not f.is_file()):
        raise UserError(f"{lost} is a link to no file; put the file in its place, or remove the link")
    train, val = _split_by_name(files)
    if not files:
        raise UserError(f"no parquet, jsonl or txt file in {folder}")
    if not val:
        raise UserError(f"{folder} has no validation split: name one of its files val.* (or validation_*, or put it into "
                        "a folder val/); its documents are never trained on")
    if not train:
        raise UserError(f"{folder} has validation files only; training files are those without val in their name")
    return Corpus(str(folder), _as_parquet(train, folder), _as_parquet(val, folder))


def _as_parquet(files: tuple[Path, ...], folder: Path) -> tuple[Path, ...]:
    """Parquet files as they are; jsonl and txt converted once into the base directory."""
    cache = get_base_dir() / "base_data_converted"
    converted = []
    for file in files:
        if file.suffix == ".parquet":
            converted.append(file)
            continue
        status = file.stat()
        key = hashlib.sha256(f"{file.resolve()}|{status.st_size}|{status.st_mtime_ns}".encode()).hexdigest()[:16]
        target = cache / f"{file.stem}-{key}.parquet"
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):  # once per machine, however many ranks ask
            if not target.exists():
                print0(f"converting {file} to parquet")
                write_parquet(target, _read_jsonl(file) if file.suffix == ".jsonl" else _read_txt(file))
        converted.append(target)
    return tuple(converted)


def _read_jsonl(file: Path) -> list[str]:
    documents = []
    for number, value in read_jsonl(file):
        if not isinstance(value, dict) or not isinstance(value.get("text"), str):
            raise UserError(f'{file}, line {number}: expected a JSON object with a key "text" that is a string')
        documents.append(value["text"])
    return documents


def _read_txt(file: Path) -> list[str]:
    """Documents of a text file: separated by <|endoftext|> where it has that, cut at paragraph ends where long."""
    documents = []
    for text in file.read_text(encoding="utf-8", errors="replace").split("<|endoftext|>"):
        piece = ""
        for paragraph in re.split(r"\n\s*\n", text):
            if piece and len(piece) + len(paragraph) > TXT_PIECE_CHARS:
                documents.append(piece)
                piece = ""
            piece = f"{piece}\n\n{paragraph}" if piece else paragraph
        documents.append(piece)
    return [document.strip() for document in documents if document.strip()]


# --- read ---------------------------------------------------------------------------------------------------------


class DocumentReader:
    """Random and sequential access to the documents of parquet files, by their number in reading order."""

    def __init__(self, files: tuple[Path, ...]):
        self.files = files
        self._groups: list[tuple[int, int, int]] = []  # first document, file, row group
        self._open: tuple[int, pq.ParquetFile] | None = None
        self._cached: tuple[int, list[str]] | None = None
        self.names, count = [], 0
        for i, file in enumerate(files):
            metadata = _open_parquet(file).metadata
            for g in range(metadata.num_row_groups):
                self._groups.append((count, i, g))
                count += metadata.row_group(g).num_rows
            self.names.append([file.name, metadata.num_rows])
        self.num_documents = count
        if count == 0:
            raise UserError(f"no documents in {', '.join(str(f) for f in files) or 'an empty list of files'}")

    def read(self, first: int, count: int) -> list[str]:
        """Documents first ... first + count - 1, going round at the end of the corpus."""
        documents = []
        while len(documents) < count:
            number = (first + len(documents)) % self.num_documents
            start, texts = self._group_of(number)
            documents.extend(texts[number - start:number - start + count - len(documents)])
        return documents

    def _group_of(self, number: int) -> tuple[int, list[str]]:
        index = bisect_right(self._groups, (number, len(self.files), 0)) - 1
        start, file, group = self._groups[index]
        if self._cached is None or self._cached[0] != start:
            if self._open is None or self._open[0] != file:
                self._open = (file, _open_parquet(self.files[file]))
            try:
                texts = self._open[1].read_row_group(group, columns=["text"])["text"].to_pylist()
            except (pa.ArrowException, OSError) as error:
                raise UserError(_damaged(self.files[file], error)) from error
            if not all(isinstance(text, str) for text in texts):
                raise UserError(f"{self.files[file]}: the column 'text' holds something else than text (empty rows?) in "
                                f"row group {group}; leave those rows out")
            self._cached = (start, texts)
        return self._cached


def check_readable(files: tuple[Path, ...]) -> None:
    """UserError unless every file opens and has documents."""
    DocumentReader(files)


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: download it again (python -m nanochat.dataset)") from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(_damaged(path, error)) from error
    if "text" not in file.schema_arrow.names:
        raise UserError(f"{path} has no column 'text'; it has {', '.join(file.schema_arrow.names)}")
    return file


def _damaged(path: Path, error: Exception) -> str:
    return (f"{path} is truncated or damaged ({str(error).splitlines()[0]}): put a whole copy in its place "
            "(a shard of ClimbMix: delete it, then python -m nanochat.dataset)")


def write_parquet(path: Path, documents: list[str]) -> None:
    """Documents as a parquet file with one column "text", under its name only when complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    pq.write_table(pa.table({"text": pa.array(documents, pa.string())}), temporary, row_group_size=ROW_GROUP,
                   compression="zstd")
    temporary.replace(path)


# --- download -----------------------------------------------------------------------------------------------------


def _missing_shards(num_shards: int | None) -> list[int]:
    """Of the first `num_shards` training shards (None: all) and the validation shard, those that are not here."""
    wanted = [CLIMBMIX_LAST, *range(CLIMBMIX_LAST if num_shards is None else num_shards)]
    return [i for i in wanted if not (climbmix_dir() / shard_name(i)).exists()]


def download_climbmix(num_shards: int | None, workers: int = 4) -> None:
    """The first `num_shards` training shards and the validation shard; DownloadError if one cannot be had."""
    missing = _missing_shards(num_shards)
    print0(f"ClimbMix: {len(missing)} shards to download, the validation shard included" if missing else
           "ClimbMix: all wanted shards are here")

    def fetch(index: int) -> None:
        hub.download(hub.hub_url(CLIMBMIX_REPO, shard_name(index)), climbmix_dir() / shard_name(index))
        print0(f"  {shard_name(index)}")

    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(fetch, missing):
            pass


# --- built-in corpus ----------------------------------------------------------------------------------------------


def _clean_docstring(text: str) -> str | None:
    """A docstring as prose: examples and tables left out; None if little is left."""
    lines = []
    for line in inspect.cleandoc(text).splitlines():
        bare = line.strip()
        if not bare.startswith((">>>", "...", "|", "+-", "===", "---", "~~~", ".. ", ":param", ":type")):
            lines.append(line.rstrip())
    prose = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
    letters = sum(c.isalpha() or c == " " for c in prose)
    return prose if len(prose) >= 120 and letters > 0.8 * len(prose) else None


def _docstrings(path: Path) -> list[str]:
    """Documents of one Python file: its module's, classes' and functions' docstrings, one document a class."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError, RecursionError):
        return []
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, nodes))
    return [prose for doc in found if doc and len(doc) >= 120 and (prose := _clean_docstring(doc))]


def harvest_prose(max_chars: int = BUILTIN_MAX_CHARS) -> list[str]:
    """English prose from this Python installation: docstrings and package descriptions, shuffled, no duplicates."""
    roots = {Path(sysconfig.get_paths()[key]) for key in ("stdlib", "purelib", "platlib")}
    files = sorted({f for root in roots for f in root.rglob("*.py")
                    if not {"test", "tests", "_vendor", "idlelib"} & set(f.parts)})
    random.Random(0).shuffle(files)
    documents, chars, seen = [], 0, set()

    def keep(found):
        nonlocal chars
        for document in found:
            key = hashlib.sha1(document[:200].encode("utf-8", "replace")).digest()
            if key not in seen and chars < max_chars:
                seen.add(key)
                chars += len(document)
                documents.append(document)

    for distribution in sorted(importlib.metadata.distributions(), key=lambda d: d.metadata["Name"] or ""):
        description = distribution.metadata.get_payload() or distribution.metadata.get("Description") or ""
        keep(filter(None, map(_clean_docstring, re.split(r"\n(?=#)", description))))
    with ProcessPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for i in range(0, len(files), 512):  # in pieces, so that reading stops when there is enough
            if chars < max_chars:
                for found in pool.map(_docstrings, files[i:i + 512], chunksize=16):
                    keep(found)
    random.Random(1).shuffle(documents)
    return documents


def harvest_words(documents: list[str]) -> list[str]:
    """Lower-case words of 3 to 12 letters that occur in at least two documents, sorted."""
    counts: dict[str, int] = {}
    for document in documents:
        for word in set(re.findall(r"(?<![\w'])[a-z]{3,12}(?![\w'])", document)):
            counts[word] = counts.get(word, 0) + 1
    return sorted(word for word, n in counts.items() if n >= 2)


def builtin_words() -> list[str]:
    """The words of the built-in corpus; harvested on their own where that corpus is not in use."""
    path = builtin_dir() / "words.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(get_base_dir() / "words.lock"):
        if not path.exists():
            with announced("word list: harvesting words from this Python installation"):
                words = harvest_words(harvest_prose())
            path.write_text("\n".join(words) + "\n")
    return path.read_text().split()


def write_builtin_corpus() -> None:
    """Write the built-in corpus and its word list, unless they are there; the same for one Python installation."""
    done = builtin_dir() / "done.json"
    if (read_json(done) or {}).get("version") == BUILTIN_VERSION:
        return
    shutil.rmtree(builtin_dir(), ignore_errors=True)
    with announced("built-in corpus: harvesting prose from this Python installation"):
        prose = harvest_prose()
    words = harvest_words(prose)
    train_words = [word for word in words if not synthetic.is_test_word(word)]
    rng, topics, generated = random.Random(2), synthetic.read_knowledge(), []
    prose_chars, chars = sum(map(len, prose)), 0
    while chars < prose_chars // 2:
        lines = [synthetic.as_text(synthetic.identity(rng, topics) if rng.random() < 0.15
                                   else synthetic.chat(rng, train_words)) for _ in range(rng.randrange(3, 8))]
        generated.append("\n\n".join(lines))
        chars += len(generated[-1])
    documents = prose + generated
    random.Random(3).shuffle(documents)
    held_out = max(ROW_GROUP, len(documents) // 50)
    write_parquet(builtin_dir() / "val.parquet", documents[:held_out])
    train = documents[held_out:]
    for i in range(4):
        write_parquet(builtin_dir() / shard_name(i), train[i::4])
    (builtin_dir() / "words.txt").write_text("\n".join(words) + "\n")
    done.write_text(json.dumps({"version": BUILTIN_VERSION, "python": sys.version, "documents": len(documents),
                                "prose_chars": prose_chars, "generated_chars": chars, "words": len(words)}))
    print0(f"built-in corpus: {len(documents):,} documents, {prose_chars / 1e6:.1f}M characters of prose and "
           f"{chars / 1e6:.1f}M generated, {len(words):,} words, in {builtin_dir()}")


def main(argv=None) -> dict:
    parser = Parser(description="Get the pretraining corpus.")
    parser.add_argument("-n", "--num-shards", type=integer(0, CLIMBMIX_LAST, off=-1), default=8,
                        help="training shards of ClimbMix to download, about 90 MB each; -1 all")
    parser.add_argument("-w", "--workers", type=integer(1, 32), default=4, help="downloads at a time")
    parser.add_argument("--builtin", action="store_true", help="write the built-in corpus, which needs no network")
    parser.add_argument("--auto", action="store_true", help="ClimbMix if the hub answers, else the built-in corpus")
    args = parser.parse_args(argv)
    own = os.environ.get("NANOCHAT_DATA_DIR")
    if args.auto and own:
        print0(f"NANOCHAT_DATA_DIR is set: training on {own}")
    elif args.builtin or (args.auto and _missing_shards(args.num_shards) and not hub.is_reachable()):
        if args.auto:
            print0(f"{hub.endpoint()} is out of reach" + (" (HF_HUB_OFFLINE is set)" if hub.is_offline() else "")
                   + ": training on the built-in corpus")
        write_builtin_corpus()
    else:
        download_climbmix(args.num_shards, args.workers)
    corpus = find_corpus()
    print0(f"corpus: {corpus.name}, {len(corpus.train)} training and {len(corpus.val)} validation files")
    return {"corpus": corpus.name, "train": len(corpus.train), "val": len(corpus.val)}


if __name__ == "__main__":
    run_script(main)
