"""The loaders: exact state, the same stream for every world size, packing, and the traps of SFT at short contexts."""

import json
import os

import numpy as np
import pytest
import torch

from nanochat.common import Runtime, UserError
from nanochat.dataloader import PretrainLoader, SFTLoader, fixed_rows, fixed_sft_rows
from nanochat.dataset import DocumentReader, find_corpus, write_parquet
from nanochat.loss_eval import evaluate_bpb
from tasks.builtin import BuiltinChat, Identity
from tasks.common import Task, TaskMixture


def runtime(rank=0, world_size=1):
    return Runtime(torch.device("cpu"), torch.float32, "test", rank, rank, world_size)


def batches(loader, count):
    out = [loader.next_batch() for _ in range(count)]
    loader.close()
    return out


def make(kind, tokenizer, corpus_dir, state=None, rank=0, world_size=1, rows=4):
    if kind == "pretrain":
        files = [corpus_dir / "a.parquet", corpus_dir / "b.parquet"]
        return PretrainLoader(tokenizer, files, runtime(rank, world_size), rows, 64, state)
    dataset = TaskMixture([BuiltinChat("facts", 300), BuiltinChat("arithmetic", 200), Identity(50)])
    return SFTLoader(tokenizer, dataset, runtime(rank, world_size), rows, 96, state)


@pytest.mark.parametrize("kind", ["pretrain", "sft"])
def test_state_is_exact_at_any_batch_and_epoch(kind, tokenizer, corpus_dir):
    loader = make(kind, tokenizer, corpus_dir)
    expected, states = [], []
    for _ in range(260):
        expected.append(loader.next_batch())
        states.append(json.dumps(loader.state_dict()))
    loader.close()
    assert json.loads(states[-1])["next"] > 1300  # beyond the first epoch, the buffer of 1000 included
    for at in (0, 1, 57, 130, 250):
        resumed = batches(make(kind, tokenizer, corpus_dir, json.loads(states[at])), 6)
        for (x, y, n), (ex, ey, en) in zip(resumed, expected[at + 1:at + 7]):
            assert torch.equal(x, ex) and torch.equal(y, ey) and n == en


@pytest.mark.parametrize("kind", ["pretrain", "sft"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_one_global_stream(kind, world_size, tokenizer, corpus_dir):
    """Six rows a step: one rank with 6, two with 3 each, three with 2 each see the same rows in the same order."""
    whole = batches(make(kind, tokenizer, corpus_dir, rows=6), 5)
    parts = [batches(make(kind, tokenizer, corpus_dir, rank=r, world_size=world_size, rows=6 // world_size), 5)
             for r in range(world_size)]
    for step, (x, y, supervised) in enumerate(whole):
        assert torch.equal(x, torch.cat([part[step][0] for part in parts]))
        assert torch.equal(y, torch.cat([part[step][1] for part in parts]))
        assert all(part[step][2] == supervised for part in parts) and supervised == (y >= 0).sum().item()


def test_pretraining_rows(tokenizer, corpus_dir):
    bos = tokenizer.get_bos_token_id()
    for x, y, _ in batches(make("pretrain", tokenizer, corpus_dir), 20):
        assert x.shape == y.shape == (4, 64) and x.dtype == torch.int64
        assert (x[:, 0] == bos).all() and torch.equal(x[:, 1:], y[:, :-1]) and (y >= 0).all()


def test_every_document_is_used_before_any_comes_again(tokenizer, corpus_dir):
    reader = DocumentReader((corpus_dir / "a.parquet",))
    assert reader.num_documents == 700 and reader.read(698, 4) == reader.read(698, 2) + reader.read(0, 2)
    assert len(set(reader.read(0, 700))) > 690


def test_changed_data_is_noticed(tokenizer, corpus_dir):
    state = make("pretrain", tokenizer, corpus_dir).state_dict()
    with pytest.raises(UserError, match="not what the checkpoint"):
        PretrainLoader(tokenizer, [corpus_dir / "a.parquet"], runtime(), 4, 64, state)


def test_fixed_rows_end_with_the_split(tokenizer, corpus_dir):
    files = (corpus_dir / "val.parquet",)
    rows = fixed_rows(tokenizer, files, 64, 10)
    assert rows.shape == (10, 65) and torch.equal(fixed_rows(tokenizer, files, 64, 5), rows[:5])
    everything = fixed_rows(tokenizer, files, 64, 10**9)
    texts = DocumentReader(files).read(0, 200)
    tokens = sum(len(tokenizer.encode(t)) + 1 for t in texts)
    assert 0.3 * tokens < everything.numel() <= tokens
    with pytest.raises(UserError, match="fewer than"):
        fixed_rows(tokenizer, files, 10**6, 1)


def test_empty_split_is_an_error(tokenizer, tmp_path):
    write_parquet(tmp_path / "empty.parquet", [])
    with pytest.raises(UserError, match="no documents"):
        PretrainLoader(tokenizer, [tmp_path / "empty.parquet"], runtime(), 4, 64)


def test_more_ranks_than_row_groups(tokenizer, tmp_path):
    write_parquet(tmp_path / "one.parquet", ["the only document there is, read again and again"])
    (x, _, _), = batches(PretrainLoader(tokenizer, [tmp_path / "one.parquet"], runtime(6, 7), 2, 16), 1)
    assert (x[:, 0] == tokenizer.get_bos_token_id()).all()


def test_errors_of_the_background_thread_reach_the_caller(tokenizer, tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, [f"document {i}" for i in range(600)])
    loader = PretrainLoader(tokenizer, [path], runtime(), 1, 16)
    damaged = bytearray(path.read_bytes())
    damaged[100:len(damaged) // 2] = b"\0" * (len(damaged) // 2 - 100)
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="damaged"):
        for _ in range(2000):
            loader.next_batch()


class Fixed(Task):
    def __init__(self, chats):
        super().__init__()
        self.chats = chats

    def num_examples(self):
        return len(self.chats)

    def get_example(self, index):
        return self.chats[index]


def chat(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def test_sft_rows_are_whole_conversations(tokenizer):
    chats = [chat("Spell rabbit.", "r, a, b, b, i, t"), chat("Hi", "Hello there")]
    loader = SFTLoader(tokenizer, Fixed(chats), runtime(), 2, 64)
    (x, y, supervised), = batches(loader, 1)
    rendered = {tuple(tokenizer.render_conversation(c)[0]) for c in chats}
    bos = tokenizer.get_bos_token_id()
    for row in x.tolist():
        while row[-1] == bos:  # padding
            row.pop()
        starts = [i for i, t in enumerate(row) if t == bos]
        pieces = {tuple(row[a:b]) for a, b in zip(starts, starts[1:] + [len(row)])}
        assert pieces and pieces <= rendered
    assert supervised == (y >= 0).sum() > 0


def test_long_conversations_neither_clog_nor_starve(tokenizer):
    """Most conversations exceed the row: they are cut and counted, those that then teach nothing are left out, and no
    batch is without supervised tokens."""
    long_answer = [chat(f"Question {i}", "word " * 300) for i in range(30)]
    long_question = [chat("word " * 300, f"Answer {i}") for i in range(30)]
    loader = SFTLoader(tokenizer, Fixed(long_answer + long_question + [chat("Hi", "Hello")]), runtime(), 2, 48)
    for _, y, supervised in batches(loader, 60):
        assert ((y >= 0).sum(dim=1) > 0).all() and supervised > 0
    assert loader.truncated > 0 and loader.dropped > 0
    hopeless = SFTLoader(tokenizer, Fixed(long_question), runtime(), 2, 48)
    with pytest.raises(UserError, match="max-seq-len"):
        hopeless.next_batch()
    with pytest.raises(UserError, match="max-seq-len"):
        hopeless.count_rows()


def test_count_rows_is_exact_for_small_sets(tokenizer):
    dataset = BuiltinChat("facts", 500)
    loader = SFTLoader(tokenizer, dataset, runtime(), 1, 96)
    inputs, targets = fixed_sft_rows(tokenizer, dataset, 96)
    assert loader.count_rows() == len(inputs)
    assert loader.count_rows(sample=100) == pytest.approx(len(inputs), rel=0.1)
    total = sum(sum(tokenizer.render_conversation(dataset[i])[1]) for i in range(500))
    assert (targets >= 0).sum() == total  # every supervised token is there, once


def test_bits_per_byte(tokenizer, corpus_dir, cpu):
    """A model that gives every token the same probability needs log2(V) bits a token; specials are not counted."""
    vocab = tokenizer.get_vocab_size()

    def uniform(x, y, loss_reduction):
        return torch.full((y.numel(),), float(np.log(vocab)))

    rows = fixed_rows(tokenizer, (corpus_dir / "val.parquet",), 64, 20)
    sizes = tokenizer.token_bytes()
    targets = rows[:, 1:].clone()
    targets[0, :10] = -1
    counted = [t for t in targets.flatten().tolist() if t >= 0 and sizes[t] > 0]
    expected = np.log2(vocab) * len(counted) / sum(sizes[t].item() for t in counted)
    for batch in (1, 7, 64):
        assert evaluate_bpb(uniform, rows[:, :-1], targets, sizes, cpu, batch) == pytest.approx(expected, rel=1e-6)


# --- where the corpus comes from ---


def test_own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    folder = tmp_path / "own"
    (folder / "val").mkdir(parents=True)
    (folder / "books.txt").write_text("one\n\ntwo<|endoftext|>three " + "\n\n".join(["paragraph " * 100] * 30))
    (folder / "web.jsonl").write_text('{"text": "first"}\n\n{"text": "second", "more": 1}\n')
    with pytest.raises(UserError, match="no validation split"):
        find_corpus(str(folder))
    (folder / "val" / "x.jsonl").write_text('{"text": "held out"}\n')
    corpus = find_corpus(str(folder))
    reader = DocumentReader(corpus.train)
    texts = reader.read(0, reader.num_documents)
    assert texts[0] == "one\n\ntwo" and texts[-2:] == ["first", "second"] and max(map(len, texts)) < 9000
    assert DocumentReader(corpus.val).read(0, 1) == ["held out"]
    assert find_corpus(str(folder)) == corpus  # converted once
    (folder / "web.jsonl").write_text('{"text": "first"}\n{"body": "no text"}\n')
    with pytest.raises(UserError, match="line 2"):
        find_corpus(str(folder))


def test_climbmix_needs_its_own_validation_shard(tmp_path, monkeypatch):
    """The last file found is not taken for validation: the shard is chosen by name."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.delenv("NANOCHAT_DATA_DIR", raising=False)
    with pytest.raises(UserError, match="nanochat.dataset"):
        find_corpus()
    shards = tmp_path / "base_data_climbmix"
    for i in (0, 1, 2):
        write_parquet(shards / f"shard_{i:05d}.parquet", ["text"])
    with pytest.raises(UserError, match="shard_06542"):
        find_corpus()
    write_parquet(shards / "shard_06542.parquet", ["held out"])
    corpus = find_corpus()
    assert [p.name for p in corpus.val] == ["shard_06542.parquet"] and len(corpus.train) == 3


def test_own_files_that_are_none(base_dir, tmp_path):
    (tmp_path / "val.txt").write_text("words " * 300)
    (tmp_path / "train.jsonl").write_bytes('{"text": "written by an editor that marks UTF-8"}\n'.encode("utf-8-sig"))
    (tmp_path / "folder.txt").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    assert [path.stem.split("-")[0] for path in find_corpus(tmp_path).train] == ["train"]
    (tmp_path / "lost.txt").symlink_to(tmp_path / "nothing")
    with pytest.raises(UserError, match="lost.txt is a link to no file"):
        find_corpus(tmp_path)
