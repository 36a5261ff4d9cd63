"""The C kernels of decoding against float64, against PyTorch's path through the model, and against themselves."""

import pytest
import torch

from nanochat import cpu_kernels
from nanochat.gpt import GPTConfig, build_model
from nanochat.kv_cache import KVCache

pytestmark = pytest.mark.skipif(cpu_kernels.load(torch.float32) is None, reason="no C compiler here")
DTYPES = (torch.float32, torch.bfloat16)
CONFIGS = {
    "plain": GPTConfig(sequence_len=64, vocab_size=300, n_layer=2, n_head=2, n_kv_head=2, n_embd=64, window_pattern="L"),
    "grouped queries": GPTConfig(sequence_len=64, vocab_size=300, n_layer=3, n_head=4, n_kv_head=2, n_embd=128,
                                 window_pattern="L"),
    "window, wide heads": GPTConfig(sequence_len=512, vocab_size=300, n_layer=3, n_head=2, n_kv_head=1, n_embd=256,
                                    window_pattern="S"),
}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 16, 23])
def test_linear_against_float64(dtype, rows):
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, 1, 96).to(dtype), torch.randn(36, 96).to(dtype)
    assert cpu_kernels.fits_linear(x, weight)
    out, expected = cpu_kernels.linear(x, weight), x.double() @ weight.double().T
    assert out.dtype == dtype and out.shape == (rows, 1, 36)
    torch.testing.assert_close(out.double(), expected, rtol=2**-8 if dtype == torch.bfloat16 else 1e-5, atol=2e-5)
    for row in range(rows):  # the same bits, whatever the batch
        assert torch.equal(cpu_kernels.linear(x[row:row + 1], weight)[0], out[row])


@pytest.mark.parametrize("dtype", DTYPES)
def test_softcap_against_float64(dtype):
    x = torch.cat((torch.linspace(-200, 200, 1001), torch.linspace(-1, 1, 100))).to(dtype)
    torch.testing.assert_close(cpu_kernels.softcap(x, 15.0).double(), 15 * torch.tanh(x.double() / 15), rtol=2e-6, atol=1e-6)


def filled(config, dtype):
    """A model whose every weight counts, and a cache with three rows of different lengths."""
    torch.manual_seed(0)
    model = build_model(config, torch.device("cpu"), dtype)
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * (0.5 if parameter.ndim < 2 else parameter.size(-1) ** -0.5))
    model.for_inference()
    cache = KVCache.for_model(model, 3, config.sequence_len)
    for slot, length in enumerate((1, 20, config.sequence_len - 3)):
        model.features(torch.randint(300, (1, length)), cache.rows([slot]))
    return model, cache


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_block_equals_the_one_in_gpt(name, dtype, monkeypatch):
    model, cache = filled(CONFIGS[name], dtype)
    assert cpu_kernels.fits_block(torch.zeros(3, 1, model.config.n_embd, dtype=dtype), model.config.head_dim)
    tokens, before = torch.tensor([[5], [6], [7]]), cache.k_cache.clone()
    fast = model.next_logits(tokens, cache.rows([2, 0, 1])), cache.k_cache, cache.v_cache
    assert not torch.equal(cache.k_cache, before)
    model, cache = filled(CONFIGS[name], dtype)
    monkeypatch.setattr(cpu_kernels, "load", lambda dtype: None)
    plain = model.next_logits(tokens, cache.rows([2, 0, 1])), cache.k_cache, cache.v_cache
    tolerance = {"rtol": 0.05, "atol": 0.1} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    for a, b in zip(fast, plain):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_others(dtype):
    model, cache = filled(CONFIGS["grouped queries"], dtype)
    _, again = filled(CONFIGS["grouped queries"], dtype)
    together = model.next_logits(torch.tensor([[5], [6], [7]]), cache.rows([2, 0, 1]))
    for row, (slot, token) in enumerate(((2, 5), (0, 6), (1, 7))):
        assert torch.equal(model.next_logits(torch.tensor([[token]]), again.rows([slot]))[0], together[row])


def test_switched_off_and_without_a_compiler(monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_CPU_KERNELS", "0")
    assert cpu_kernels.load.__wrapped__(torch.float32) is None and capsys.readouterr().out == ""
    monkeypatch.delenv("NANOCHAT_CPU_KERNELS")
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setattr(cpu_kernels, "FLAGS", [*cpu_kernels.FLAGS, "-DOTHER"])  # another library than those built already
    assert cpu_kernels.load.__wrapped__(torch.float32) is None
    assert "no-such-compiler" in capsys.readouterr().out
