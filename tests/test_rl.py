"""Reinforcement learning: the policy gradient against a slow loop in float64, what is learnt, and the script."""

import json
import os
import subprocess
import sys
from math import comb
from pathlib import Path

import pytest
import torch

from nanochat.checkpoint_manager import find_steps, load_tensors
from nanochat.common import UserError
from nanochat.engine import Engine
from nanochat.gpt import GPTConfig, build_model
from nanochat.rollout import Sample, Sampler, Settings, collate, is_informative, pass_at_k, policy_gradient
from scripts import base_train, chat_eval, chat_rl, chat_sft
from tasks.builtin import Arithmetic
from tests.test_engine import chatty, random_model

REPO = Path(__file__).resolve().parents[1]
SETTINGS = Settings(num_samples=3, max_new_tokens=8, temperature=0.7, top_k=20, batch_size=8)


def float64_model():
    torch.manual_seed(0)
    config = GPTConfig(sequence_len=64, vocab_size=100, n_layer=3, n_head=2, n_kv_head=1, n_embd=32, window_pattern="SL")
    model = build_model(config, torch.device("cpu"), torch.float64).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "c_proj" in name or "lm_head" in name or "smear_lambda" in name:
                p.normal_(std=0.2)
    return model


def random_samples(count: int = 11) -> list[Sample]:
    generator = torch.Generator().manual_seed(1)
    samples = []
    for i in range(count):
        prompt, answer = (int(torch.randint(2, n, (), generator=generator)) for n in (9, 40))
        tokens = torch.randint(0, 100, (prompt + answer,), generator=generator).tolist()
        chosen = [0] * prompt + (torch.rand(answer, generator=generator) < 0.8).int().tolist()  # the others: a tool's
        samples.append(Sample(tokens, chosen, 0.0, 0.0 if i % 4 == 3 else i / 7 - 0.6, ""))
    return samples


def loop_gradient(model, samples, settings) -> dict[str, torch.Tensor]:
    """The formula, one answer and one token after the other."""
    model.zero_grad()
    tokens = sum(sum(sample.chosen) for sample in samples)
    for sample in samples:
        logits = model(torch.tensor([sample.tokens[:-1]]))[0] / settings.temperature
        loss = torch.zeros((), dtype=torch.float64)
        for place, (token, chosen) in enumerate(zip(sample.tokens[1:], sample.chosen[1:])):
            if chosen:
                row = logits[place]
                allowed = row >= row.sort(descending=True).values[settings.top_k - 1]
                allowed[token] = True
                loss = loss - sample.advantage * (row[token] - row[allowed].logsumexp(0)) / tokens
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(gradients, expected):
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).abs().max() <= 1e-10 * expected[name].abs().max() + 1e-15, name


@pytest.mark.parametrize("device_batch_size", [1, 2, 4, 100])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_gradient_equals_a_loop(device_batch_size, ranks):
    model, samples = float64_model(), random_samples()
    expected = loop_gradient(model, samples, SETTINGS)
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    model.zero_grad(set_to_none=True)
    tokens = sum(sum(sample.chosen) for sample in samples)
    for rank in range(ranks):  # gradients of ranks are summed
        policy_gradient(model, samples[rank::ranks], tokens, device_batch_size, SETTINGS)
    assert_same({name: p.grad for name, p in model.named_parameters()}, expected)


def test_gradient_of_three_processes():
    program = f"""
import sys; sys.path.insert(0, {str(REPO)!r})
import torch, torch.distributed as dist
from tests.test_rl import *
from nanochat.common import compute_cleanup, compute_init
runtime, model, samples = compute_init("cpu"), float64_model(), random_samples(2)  # fewer answers than ranks
mine = samples[runtime.rank::runtime.world_size]
policy_gradient(model, mine, runtime.sum(sum(sum(s.chosen) for s in mine)), 2, SETTINGS)
for p in model.parameters():
    dist.all_reduce(p.grad)
assert_same({{n: p.grad.clone() for n, p in model.named_parameters()}}, loop_gradient(model, samples, SETTINGS))
compute_cleanup()
"""
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3",
                           "--no-python", sys.executable, "-c", program], capture_output=True, text=True, timeout=120,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_sampled_distribution_is_the_one_that_is_learnt(tokenizer):
    """Frequencies of 2,000 first tokens against the probabilities in the loss."""
    model, prompt = random_model(tokenizer, 0, 128, 3, 32), list(range(100, 120))
    settings = {"temperature": 1.5, "top_k": 5}
    completions = Engine(model.for_inference(), tokenizer).generate_many([prompt] * 2000, max_tokens=1, batch_size=64, **settings)
    first = [c.tokens[0] if c.tokens else c.closing for c in completions]
    seen = sorted(set(first))
    inputs = torch.tensor([prompt] * len(seen))
    targets = torch.full_like(inputs, -1)
    targets[:, -1] = torch.tensor(seen)
    probabilities = model.log_probabilities(inputs, targets, **settings).exp()
    assert 2 <= len(seen) <= 5 and probabilities.sum() == pytest.approx(1.0, abs=1e-3)
    for token, probability in zip(seen, probabilities.tolist()):
        assert first.count(token) / 2000 == pytest.approx(probability, abs=4 * (probability * (1 - probability) / 2000) ** 0.5)


def test_closing_token_is_learnt_and_forced_tokens_are_not(tokenizer):
    model, task = chatty(tokenizer), Arithmetic(10, "train")
    call, end = map(tokenizer.encode_special, ("<|python_start|>", "<|assistant_end|>"))
    with torch.no_grad():  # it ends its answers as often as it calls the calculator
        model.lm_head.weight[end] = model.lm_head.weight[call]
    sampler = Sampler(model, tokenizer)
    groups = sampler.sample(task, list(range(10)), Settings(4, 60, 1.0, None, 16), 0)
    samples, forced, closed = [s for g in groups for s in g], 0, 0
    ends = sampler.engine.stop_tokens
    start = tokenizer.encode_special("<|output_start|>")
    for sample in samples:
        prompt = sample.chosen.index(1)
        assert tokenizer.encode_special("<|assistant_start|>") == sample.tokens[prompt - 1]
        for place in range(prompt, len(sample.tokens)):
            if sample.tokens[place] == start and not sample.chosen[place]:
                forced += 1
                assert sample.tokens[place - 1] == tokenizer.encode_special("<|python_end|>")
        if sample.tokens[-1] in ends:
            closed += 1
            assert sample.chosen[-1] == 1
        inputs, targets, advantages = collate([sample], 3, 8, "cpu")
        learnt = targets[0][targets[0] >= 0].tolist()
        assert learnt == [t for t, c in zip(sample.tokens, sample.chosen) if c] and len(advantages) == len(learnt)
        assert len(inputs) == 3 and inputs.shape[1] % 8 == 0 and inputs[0, :len(sample.tokens) - 1].tolist() == sample.tokens[:-1]
    assert forced > 0 and closed > 0
    again = sampler.sample(task, [7, 3], Settings(4, 60, 1.0, None, 3), 0)
    assert again == [groups[7], groups[3]]  # whatever else is asked, and however many at a time


def test_advantages_are_rewards_above_the_mean(tokenizer):
    class Lengths(Arithmetic):
        def reward(self, conversation, response):
            return float(len(response) % 3)

    groups = Sampler(chatty(tokenizer), tokenizer).sample(Lengths(6, "train"), list(range(6)), Settings(5, 12, 1.0, 50, 8), 1)
    for group in groups:
        mean = sum(s.reward for s in group) / 5
        assert [s.advantage for s in group] == pytest.approx([s.reward - mean for s in group])
        assert is_informative(group) == (len({s.reward for s in group}) > 1)


def test_sampler_follows_the_trained_model(tokenizer):
    model = random_model(tokenizer, 0, 128, 3, 32)
    sampler, prompt = Sampler(model, tokenizer), list(range(100, 130))
    before = sampler.engine.generate_many([prompt], max_tokens=10, temperature=0)
    model.load_state_dict(random_model(tokenizer, 1, 128, 3, 32).state_dict())
    sampler.refresh()
    after = sampler.engine.generate_many([prompt], max_tokens=10, temperature=0)
    assert after == Engine(model, tokenizer).generate_many([prompt], max_tokens=10, temperature=0) != before


def test_pass_at_k():
    assert pass_at_k(0, 8, 4) == 0 and pass_at_k(8, 8, 1) == 1 and pass_at_k(2, 8, 1) == pytest.approx(0.25)
    assert pass_at_k(2, 8, 4) == pytest.approx(1 - comb(6, 4) / comb(8, 4)) and pass_at_k(5, 8, 4) == 1


def test_every_question_once_an_epoch():
    steps = [chat_rl.questions_of_step(step, 10, 4, 0) for step in range(5)]
    asked = [number for step in steps for number in step]
    assert sorted(asked[:10]) == sorted(asked[10:]) == list(range(10)) and asked[:10] != asked[10:]


RL = ["--task", "SpellingBee", "--num-iterations", "4", "--examples-per-step", "3", "--num-samples", "4", "--max-new-tokens",
      "24", "--eval-examples", "5", "--eval-samples", "2", "--eval-every", "2", "--sample-batch-size", "5",
      "--device-batch-size", "3", "--save-every", "2"]


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory, tokenizer, corpus_dir):
    """A base directory with a finetuned model."""
    base = tmp_path_factory.mktemp("rl")
    tokenizer.save(base / "tokenizer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        patch.setenv("NANOCHAT_DATA_DIR", str(corpus_dir))
        finetune(base)
        yield base


def finetune(base):
    (base / "words_alpha.txt").write_text("\n".join(f"{a}{b}ter" for a in "abcdefghijkl" for b in "aeiou"))
    base_train.main(["--depth", "2", "--head-dim", "32", "--aspect-ratio", "32", "--max-seq-len", "128", "--num-iterations", "2",
                     "--device-batch-size", "2", "--total-batch-size", "256", "--eval-tokens", "512", "--sample-every", "-1"])
    chat_sft.main(["--builtin", "--num-iterations", "2", "--eval-rows", "16", "--spelling-rows", "50"])


def test_script_and_resume(finetuned, monkeypatch):
    """Rewards by the length of the answer, so that a model that knows nothing has something to learn; the run in one go
    equals the run that stops half way."""
    monkeypatch.setattr("tasks.spellingbee.SpellingBee.reward", lambda self, conversation, response: float(len(response) % 2))
    whole = chat_rl.main(RL)
    assert whole["step"] == 4 and {"pass@1", "pass@2"} <= whole.keys() and any(whole["losses"])
    directory = Path(whole["directory"])
    expected = load_tensors(directory / "model_000004.pt")
    metrics = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics if "reward" in m] == [0, 1, 2, 3]
    assert [m["step"] for m in metrics if "pass@1" in m] == [0, 2, 4] and find_steps(directory) == [2, 4]
    meta, sft = (json.loads(next((finetuned / folder).glob(f"*/meta_{step:06d}.json")).read_text())
                 for folder, step in (("chatrl_checkpoints", 4), ("chatsft_checkpoints", 2)))
    assert meta["step"] == 4 and meta["model_config"] == sft["model_config"] and meta["tokenizer_hash"] == sft["tokenizer_hash"]
    again = chat_rl.main([*RL, "--resume", "2"])
    assert again["losses"] == whole["losses"][2:]
    for name, tensor in load_tensors(directory / "model_000004.pt").items():
        assert torch.equal(tensor, expected[name]), name
    assert chat_rl.main([*RL, "--resume"])["finished"]
    with pytest.raises(UserError, match="temperature 1.0 there, 0.5 now"):
        chat_rl.main([*RL, "--resume", "--temperature", "0.5"])
    assert chat_eval.main(["-i", "rl", "-a", "SpellingBee", "-x", "3", "-m", "8"]).keys() == {"SpellingBee"}


@pytest.mark.parametrize("flags, message", [
    (["--temperature", "0"], "temperature"), (["--num-samples", "1"], "at least 2"), (["--max-new-tokens", "128"], "no room"),
    (["--examples-per-step", "30000"], "20000 training problems"), (["--task", "Chess"], "invalid choice"),
    (["-g", "never"], "no checkpoint 'never'"), (["--matrix-lr", "nan"], "finite")])
def test_bad_input(finetuned, flags, message):
    with pytest.raises(UserError, match=message):
        chat_rl.main(["--task", "SpellingBee", "--max-new-tokens", "24", *flags])
