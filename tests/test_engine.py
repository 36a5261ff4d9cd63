"""Generation: sampling, the tool state machine, batches, the stream of characters."""

import random

import pytest
import torch

from nanochat.engine import Engine, TextStream, sample_tokens
from nanochat.gpt import GPTConfig, build_model


@pytest.fixture(scope="module")
def engine(tokenizer):
    torch.manual_seed(0)
    config = GPTConfig(sequence_len=128, vocab_size=tokenizer.get_vocab_size(), n_layer=3, n_head=2, n_kv_head=1,
                       n_embd=32, window_pattern="SL")
    model = build_model(config, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "c_proj" in name or "lm_head" in name:
                p.normal_(std=0.3)
    return Engine(model.for_inference(), tokenizer)


class Script:
    """Stands in for a model: proposes given tokens one after the other, whatever it is fed."""

    def __init__(self, engine, tokens):
        self.config, self.device, self.dtype = engine.model.config, engine.model.device, torch.float32
        self.tokens, self.fed = list(tokens), []

    def next_logits(self, idx, cache):
        self.fed.extend(idx[0].tolist())
        cache.last_embedding = torch.zeros(idx.size(0), 1)
        cache.advance(idx.size(1))
        logits = torch.zeros(idx.size(0), self.config.vocab_size)
        logits[:, self.tokens.pop(0) if self.tokens else 0] = 10.0
        return logits


def test_greedy_equals_argmax_of_the_full_forward(engine):
    prompt = [engine.tokenizer.get_bos_token_id(), 65, 66, 67]
    (ids,), (mask,) = engine.generate_batch(prompt, max_tokens=30, temperature=0)
    assert mask[:4] == [0] * 4
    expected = list(prompt)
    for _ in range(len(ids) - 4):
        with torch.no_grad():
            expected.append(engine.model(torch.tensor([expected]))[0, -1].argmax().item())
    assert ids == expected


def test_many_prompts_equal_one_by_one(engine):
    """Different lengths, more prompts than places, sampled: the same tokens as alone."""
    rng = random.Random(0)
    prompts = [[rng.randrange(500) for _ in range(rng.randrange(1, 60))] for _ in range(11)]
    together = engine.generate_many(prompts, max_tokens=25, temperature=0.8, top_k=20, batch_size=4)
    for i, prompt in enumerate(prompts):
        batch = engine.generate_many(prompts[:i] + [prompt], max_tokens=25, temperature=0.8, top_k=20, batch_size=1)
        assert batch[i].tokens == together[i].tokens and batch[i].finish_reason == together[i].finish_reason


def test_same_seed_same_tokens(engine):
    prompt = [1, 2, 3]
    first = engine.generate_batch(prompt, num_samples=3, max_tokens=20, seed=7)
    assert first == engine.generate_batch(prompt, num_samples=3, max_tokens=20, seed=7)
    assert first != engine.generate_batch(prompt, num_samples=3, max_tokens=20, seed=8)
    streamed = [column for column, _ in engine.generate(prompt, num_samples=3, max_tokens=20, seed=7)]
    assert [[c[i] for c in streamed if c[i] >= 0 and c[i] not in engine.stop_tokens] for i in range(3)] == \
        [ids[3:] for ids in first[0]]


def test_samples_of_a_prompt_do_not_share_their_first_token(engine):
    results, _ = engine.generate_batch([1, 2, 3], num_samples=32, max_tokens=1, temperature=1.0)
    assert len({ids[3] for ids in results if len(ids) > 3}) > 5


def test_sampling_follows_the_distribution():
    logits = torch.tensor([[1.0, 2.0, 0.0, -1.0]]).expand(20000, 4)
    uniforms = torch.rand(20000, generator=torch.Generator().manual_seed(0))
    for temperature, top_k in ((1.0, None), (0.5, None), (1.0, 2)):
        probabilities = torch.softmax(logits[0] / temperature, 0)
        if top_k:
            probabilities = torch.where(probabilities >= probabilities.topk(top_k).values[-1], probabilities, 0.0)
            probabilities /= probabilities.sum()
        counts = torch.bincount(sample_tokens(logits, uniforms, temperature, top_k), minlength=4) / 20000
        torch.testing.assert_close(counts, probabilities, atol=0.015, rtol=0)
    assert (sample_tokens(logits, uniforms, 0.0) == 1).all()
    assert (sample_tokens(logits, torch.full((20000,), 0.99999994), 1.0) <= 3).all()


def test_tool_call(engine):
    """The calculator's result is forced after a call; forced tokens have mask 0 and are fed to the model."""
    t, s = engine.tokenizer, engine.tokenizer.encode_special
    call = [s("<|python_start|>"), *t.encode("12*3"), s("<|python_end|>")]
    result = [s("<|output_start|>"), *t.encode("36"), s("<|output_end|>")]
    ending = [*t.encode(" ok"), s("<|assistant_end|>")]
    ignored = [0] * len(result)  # what the model proposes while the tool speaks
    model = Script(engine, call + ignored + ending)
    (ids,), (mask,) = Engine(model, t).generate_batch([1, 2], temperature=0)
    assert ids == [1, 2, *call, *result, *ending[:-1]]
    assert mask == [0, 0, *[1] * len(call), *[0] * len(result), *[1] * (len(ending) - 1)]
    assert model.fed == ids


def test_call_without_result_is_left_alone(engine):
    t, s = engine.tokenizer, engine.tokenizer.encode_special
    tokens = [s("<|python_start|>"), *t.encode("import os"), s("<|python_end|>"), 65, s("<|bos|>")]
    (ids,), (mask,) = Engine(Script(engine, tokens), t).generate_batch([1], temperature=0)
    assert ids == [1, *tokens[:-1]] and mask == [0] + [1] * (len(tokens) - 1)


def test_finish_reasons(engine):
    t = engine.tokenizer
    end = t.encode_special("<|assistant_end|>")
    for tokens, limit, prompt, reason, count in (([65, 66, end], None, [1], "stop", 2), ([65] * 9, 4, [1], "length", 4),
                                                 ([65] * 200, None, [1] * 100, "context", 28),
                                                 ([65] * 9, None, [1] * 128, "context", 0), ([65], 0, [1], "length", 0)):
        scripted = Engine(Script(engine, tokens), t)
        (completion,) = scripted.generate_many([prompt], max_tokens=limit, temperature=0)
        assert (completion.finish_reason, len(completion.tokens)) == (reason, count)
    scripted = Engine(Script(engine, [65, end]), t)
    assert [c for c, _ in scripted.generate([1], temperature=0)] == [[65], [end]]
    assert scripted.finish_reasons == ["stop"]


def test_stream_gives_whole_characters(tokenizer):
    text = "naïve 서울 🙂 end"
    stream, pieces = TextStream(tokenizer), []
    for token in tokenizer.encode(text):
        pieces.append(stream.push(token))
    assert "".join(pieces) + stream.flush() == text and "\ufffd" not in "".join(pieces)
    broken = TextStream(tokenizer)
    first_byte = tokenizer.encode("서")[0]
    assert broken.push(first_byte) == "" and broken.flush() == "\ufffd" and broken.flush() == ""
