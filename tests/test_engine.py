"""Generation: sampling, the tool state machine, batches, the stream of characters."""

import random

import pytest
import torch

from nanochat.answer import AnswerStream, TextStream, join_pieces
from nanochat.engine import Engine, Request

from nanochat.gpt import GPTConfig, build_model
from nanochat.sampling import sample_tokens


def random_model(tokenizer, seed: int, context: int, layers: int, channels: int):
    """A model whose every layer counts, not yet cast for inference."""
    torch.manual_seed(seed)
    config = GPTConfig(sequence_len=context, vocab_size=tokenizer.get_vocab_size(), n_layer=layers, n_head=2, n_kv_head=1,
                       n_embd=channels, window_pattern="SL")
    model = build_model(config, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "c_proj" in name or "lm_head" in name:
                p.normal_(std=0.3)
    return model


@pytest.fixture(scope="module")
def engine(tokenizer):
    return Engine(random_model(tokenizer, 0, 128, 3, 32).for_inference(), tokenizer)


class Script:
    """Stands in for a model: proposes given tokens one after the other, whatever it is fed."""

    def __init__(self, engine, tokens):
        self.config, self.device, self.dtype = engine.model.config, engine.model.device, torch.float32
        self.tokens, self.fed = list(tokens), []

    def features(self, idx, rows):
        self.fed.extend(idx[0].tolist())
        rows.advance(idx)

    def next_logits(self, idx, rows):
        self.features(idx, rows)
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


def shares(logits, temperature, top_k, top_p, draws=20000):
    """How often each token is drawn, with evenly spread random numbers."""
    uniforms = [(i + 0.5) / draws for i in range(draws)]
    tokens = sample_tokens(logits.expand(draws, -1), uniforms, [temperature] * draws, [top_k] * draws, [top_p] * draws)
    return torch.bincount(tokens, minlength=logits.size(-1)) / draws


@pytest.mark.parametrize("temperature, top_k, top_p", [(1.0, None, 1.0), (0.5, None, 1.0), (1.0, 2, 1.0),
                                                       (1.0, None, 0.7), (2.0, 3, 0.8), (1.0, None, 1e-9)])
def test_sampling_follows_the_distribution(temperature, top_k, top_p):
    logits = torch.tensor([1.0, 2.0, 0.0, -1.0, 1.5])
    expected = torch.softmax(logits / temperature, 0)
    order = expected.argsort(descending=True).tolist()
    kept = order[:top_k or 5]
    mass, nucleus = sum(expected[i].item() for i in kept), []
    for i in kept:
        if sum(expected[j].item() for j in nucleus) >= top_p * mass:
            break
        nucleus.append(i)
    expected = torch.tensor([expected[i].item() if i in nucleus else 0.0 for i in range(5)])
    torch.testing.assert_close(shares(logits, temperature, top_k, top_p), expected / expected.sum(), atol=1e-3, rtol=0)


def test_sampling_from_a_large_vocabulary():
    """Blocks, candidates and padding: 3,001 tokens, of which four have a chance."""
    logits = torch.full((3001,), -1e9)
    likely = {5: 0.1, 127: 0.2, 128: 0.3, 3000: 0.4}
    for token, probability in likely.items():
        logits[token] = torch.tensor(probability).log()
    for top_k, top_p in ((None, 1.0), (None, 0.999), (50, 1.0)):
        found = shares(logits, 1.0, top_k, top_p)
        assert {i: round(found[i].item(), 2) for i in found.nonzero().flatten().tolist()} == likely
    assert shares(logits, 1.0, None, 0.6).nonzero().flatten().tolist() == [128, 3000]
    assert shares(logits, 0.0, None, 1.0)[3000] == 1


def test_every_row_has_its_own_settings():
    logits = torch.randn(6, 300)
    uniforms = [0.1, 0.9, 0.5, 0.3, 0.999999999, 0.0]
    settings = [(0.0, None, 1.0), (1.0, None, 1.0), (0.7, 5, 1.0), (0.7, 40, 0.9), (1.3, None, 0.5), (0.2, 1, 1.0)]
    together = sample_tokens(logits, uniforms, *map(list, zip(*settings)))
    for i, (temperature, top_k, top_p) in enumerate(settings):
        assert sample_tokens(logits[i:i + 1], uniforms[i:i + 1], [temperature], [top_k], [top_p])[0] == together[i]


def chatty(tokenizer):
    """A model that often calls the calculator, with numbers."""
    model = random_model(tokenizer, 1, 256, 4, 64)
    with torch.no_grad():
        wte, head, digit = model.transformer.wte.weight, model.lm_head.weight, tokenizer.encode("7")[0]
        begin, end = tokenizer.encode_special("<|python_start|>"), tokenizer.encode_special("<|python_end|>")
        for before, after in [(begin, digit), (digit, end)] + [(token, begin) for token in range(0, 500, 10)]:
            head[after] += wte[before]  # makes `after` follow `before`
    return model.for_inference()


def test_busy_batch_equals_each_request_alone(tokenizer):
    """200 greedy requests that come, go and are cancelled while others run, with tools: each as if it were alone."""
    model, rng = chatty(tokenizer), random.Random(0)
    beginning = [rng.randrange(600) for _ in range(90)]  # shared by some, so that prefixes are reused and copied
    prompts = [(beginning[:rng.randrange(90)] if rng.random() < 0.4 else [])
               + [rng.randrange(600) for _ in range(rng.randrange(1, 150))] for _ in range(200)]
    lengths = [rng.choice((1, 5, 20, 60, None)) for _ in prompts]
    engine = Engine(model, tokenizer, slots=8)
    sequences, cancelled = [], set()
    while len(sequences) < 200 or engine.busy:
        for _ in range(rng.randrange(4)):
            if len(sequences) < 200:
                sequences.append(engine.submit(Request(prompts[len(sequences)], lengths[len(sequences)], temperature=0)))
        engine.step()
        if rng.random() < 0.1 and sequences:
            victim = rng.randrange(len(sequences))
            if not sequences[victim].done:
                engine.cancel(sequences[victim])
                cancelled.add(victim)
    assert engine.active == 0 and engine.reused_tokens > 500 and 10 < len(cancelled) < 100
    called = 0
    for i, sequence in enumerate(sequences):
        (alone,) = Engine(model, tokenizer).generate_many([prompts[i]], max_tokens=lengths[i], temperature=0)
        got = sequence.completion
        if i in cancelled:
            assert got.finish_reason == "cancelled" and got.tokens == alone.tokens[:len(got.tokens)]
        else:
            assert got == alone
        called += 0 in got.mask
    assert called > 10


def test_next_turn_does_not_compute_the_earlier_ones_again(tokenizer):
    engine = Engine(chatty(tokenizer), tokenizer, slots=2)
    prompt = list(range(100, 160))
    first = engine.generate_many([prompt], max_tokens=20, temperature=0)[0]
    before = engine.prefilled_tokens
    turn = prompt + first.tokens + [7, 8, 9]
    second = engine.generate_many([turn], max_tokens=20, temperature=0)[0]
    assert engine.prefilled_tokens - before <= 4  # the last token of the answer and the new ones but the last
    assert second == Engine(engine.model, tokenizer).generate_many([turn], max_tokens=20, temperature=0)[0]


def test_long_prompt_does_not_stall_the_others(tokenizer):
    """While 200 tokens are read in pieces, the running sequence gets a token every step."""
    engine = Engine(chatty(tokenizer), tokenizer, slots=2)
    running = engine.submit(Request([1, 2, 3], temperature=0))
    engine.step()
    late = engine.submit(Request(list(range(200)), temperature=0))
    while not late.completion.tokens:
        before = len(running.completion.tokens)
        engine.step()
        assert running.done or len(running.completion.tokens) == before + 1
    assert engine.steps >= 3


def test_sampled_request_does_not_depend_on_the_others(tokenizer):
    model, rng = chatty(tokenizer), random.Random(3)
    requests = [Request([rng.randrange(600) for _ in range(rng.randrange(2, 60))], rng.choice((10, 40)),
                        rng.choice((0.0, 0.7, 1.0)), rng.choice((None, 3, 50)), rng.choice((1.0, 0.8)), seed)
                for seed in range(24)]
    engine = Engine(model, tokenizer, slots=5)
    together = [engine.submit(request) for request in requests]
    while engine.busy:
        engine.step()
    for sequence in together:
        alone = Engine(model, tokenizer)
        single = alone.submit(sequence.request)
        while alone.busy:
            alone.step()
        assert single.completion == sequence.completion


def test_stop_strings(engine):
    prompt = [1, 2, 3]
    free = engine.generate_many([prompt], max_tokens=40, temperature=0)[0]
    text = engine.tokenizer.decode(free.tokens)
    stop = text[len(text) // 2:len(text) // 2 + 3]
    stopped = engine.generate_many([prompt], max_tokens=40, temperature=0, stop=("never there", stop))[0]
    assert stopped.finish_reason == "stop" and stopped.text == text[:text.index(stop)]
    unstopped = engine.generate_many([prompt], max_tokens=40, temperature=0, stop=("never there",))[0]
    assert unstopped.text == text and unstopped.finish_reason == free.finish_reason


def test_answer_stream_holds_back_what_may_become_a_stop_string(tokenizer):
    stream, out = AnswerStream(tokenizer, ("STOP",)), []
    for letter in "say STO-STOP it":
        (token,) = tokenizer.encode(letter)
        out.append("".join(text for _, text in stream.push(token)))
    assert out[4:8] == ["", "", "", "STO-"] and "".join(out) == "say STO-" and stream.stopped
    whole = AnswerStream(tokenizer, ("STOP",))
    pieces = [piece for letter in "a ST" for piece in whole.push(tokenizer.encode(letter)[0])] + whole.flush()
    assert "".join(text for _, text in pieces) == "a ST"


def test_answer_parts(tokenizer):
    s = tokenizer.encode_special
    tokens = [*tokenizer.encode("So: "), s("<|python_start|>"), *tokenizer.encode("6*7"), s("<|python_end|>"),
              s("<|output_start|>"), *tokenizer.encode("42"), s("<|output_end|>"), *tokenizer.encode(" it is")]
    stream = AnswerStream(tokenizer)
    pieces = [piece for token in tokens for piece in stream.push(token)] + stream.flush()
    assert join_pieces(pieces) == [{"type": "text", "text": "So: "}, {"type": "python", "text": "6*7"},
                                   {"type": "python_output", "text": "42"}, {"type": "text", "text": " it is"}]


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
