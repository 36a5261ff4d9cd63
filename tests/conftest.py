"""What every test shares: no network, no compilation, an empty base directory, a tiny corpus and its tokenizer."""

import os

os.environ.update(GOMP_SPINCOUNT="2000", HF_HUB_OFFLINE="1", TORCHDYNAMO_DISABLE="1", NANOCHAT_DTYPE="float32", WANDB_MODE="offline")
for name in ("NANOCHAT_DATA_DIR", "NANOCHAT_DATASETS_DIR", "NANOCHAT_ATTENTION", "NANOCHAT_CPU_KERNELS", "HF_ENDPOINT"):
    os.environ.pop(name, None)

import random  # noqa: E402
import threading  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

from nanochat import synthetic  # noqa: E402
from nanochat.common import Runtime  # noqa: E402
from nanochat.dataset import write_parquet  # noqa: E402
from nanochat.tokenizer import RustBPETokenizer  # noqa: E402
from dev.parrot import serve, teach  # noqa: E402

WORDS = ("table apple letter window garden yellow summer butter coffee dinner pepper rabbit kitten mirror pillow "
         "banana cherry orange silver copper planet rocket engine bridge castle forest island jungle meadow river "
         "valley desert harbor market museum palace temple school office studio").split()
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def needs_shared_data(*parts: str) -> Path:
    path = SHARED_DATA.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs {'/'.join(parts)} of the shared data, which is not here")
    return path


def make_documents(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return ["\n\n".join(synthetic.as_text(synthetic.chat(rng, WORDS)) for _ in range(rng.randrange(1, 6)))
            for _ in range(count)]


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory) -> Path:
    """A folder with two training files and one validation file, several row groups each."""
    folder = tmp_path_factory.mktemp("corpus")
    write_parquet(folder / "a.parquet", make_documents(700, 0))
    write_parquet(folder / "b.parquet", make_documents(300, 1))
    write_parquet(folder / "val.parquet", make_documents(200, 2))
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> RustBPETokenizer:
    return RustBPETokenizer.train_from_iterator(iter(make_documents(500, 3)), 600)


@pytest.fixture
def base_dir(tmp_path, monkeypatch, tokenizer, corpus_dir) -> Path:
    """An empty base directory with the tokenizer in it, and the tiny corpus as the person's own data."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setenv("NANOCHAT_DATA_DIR", str(corpus_dir))
    tokenizer.save(tmp_path / "base" / "tokenizer")
    return tmp_path / "base"


@pytest.fixture
def cpu() -> Runtime:
    return Runtime(torch.device("cpu"), torch.float32, "test")


@pytest.fixture(scope="session")
def parrot(tmp_path_factory) -> Path:
    """A base directory with a chat model that knows the conversations of dev/parrot.py by heart."""
    base = tmp_path_factory.mktemp("parrot")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        return teach(base)


@pytest.fixture(scope="session")
def server(parrot) -> str:
    """Address of a chat server with that model, a process of its own."""
    process, port = serve(parrot, "--slots", "8", "--max-queue", "8")
    reader = threading.Thread(target=lambda: list(process.stdout), daemon=True)  # so that its log never blocks it
    reader.start()
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    assert process.wait(20) == 0
