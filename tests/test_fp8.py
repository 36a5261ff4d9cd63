"""Float8 layers, emulated on CPU: close to the plain ones, trainable, and switched off exactly."""

import copy

import pytest
import torch

from nanochat.common import Runtime, UserError
from nanochat.fp8 import check_fp8, convert_to_fp8, fp8_disabled
from nanochat.gpt import GPTConfig, build_model


def test_conversion():
    torch.manual_seed(0)
    config = GPTConfig(sequence_len=64, vocab_size=300, n_layer=2, n_head=2, n_kv_head=2, n_embd=128, window_pattern="L")
    plain = build_model(config, torch.device("cpu"), torch.bfloat16)
    with torch.no_grad():
        for name, p in plain.named_parameters():
            if "c_proj" in name or "lm_head" in name:
                p.normal_(std=0.05)
    model = copy.deepcopy(plain)
    assert convert_to_fp8(model, emulate=True) == 2 * 6
    assert set(model.state_dict()) == set(plain.state_dict())
    x, y = torch.randint(0, 300, (2, 2, 32))
    with torch.no_grad():
        expected = plain(x)
        quantised = model(x)
        with fp8_disabled(model):
            assert torch.equal(model(x), expected)
        assert torch.equal(model(x), quantised)
    error = (quantised - expected).norm() / expected.norm()
    assert 0 < error < 0.2
    model(x, y).backward()
    plain(x, y).backward()
    for (name, a), b in zip(model.named_parameters(), plain.parameters()):
        assert a.grad is not None and a.grad.dtype == b.grad.dtype, name
    a, b = (m.transformer.h[0].mlp.c_fc.weight.grad.flatten() for m in (model, plain))
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.9


def test_refused_on_cpu():
    with pytest.raises(UserError, match="NVIDIA"):
        check_fp8(Runtime(torch.device("cpu"), torch.bfloat16, "test"))
