"""Decoding on GPUs: the Triton kernel (in Triton's interpreter where there is no GPU), and the graphs' way through the cache."""

import os
import subprocess
import sys

import pytest
import torch

from nanochat import gpu_kernels
from nanochat.decode_graph import DecodeGraphs
from nanochat.engine import Engine
from nanochat.gpt import GPTConfig, build_model
from nanochat.kv_cache import CacheRows, KVCache

CONFIG = GPTConfig(sequence_len=256, vocab_size=300, n_layer=3, n_head=4, n_kv_head=2, n_embd=128, window_pattern="SL")
COMPARE = """
import itertools, sys, torch
from nanochat.flash_attention import _sdpa_with_kvcache
from nanochat.gpu_kernels import attention, fits
torch.manual_seed(0)
device = sys.argv[1]
for (H, Hkv), window, D, dtype in itertools.product(((2, 2), (6, 2)), (-1, 0, 100), (16, 64),
                                                    (torch.float32, torch.bfloat16)):
    caches = [torch.randn(5, Hkv, 1100, D, device=device).to(dtype).transpose(1, 2) for _ in range(2)]
    q, k, v = (torch.randn(3, 1, heads, D, device=device).to(dtype) for heads in (H, Hkv, Hkv))
    slots, lengths = torch.tensor([[4, 0, 2], [0, 70, 1090]], device=device)
    copies = [cache.clone() for cache in caches]
    assert fits(q)
    out = attention(q, k, v, *caches, slots, lengths, window)
    expected = _sdpa_with_kvcache(q, *copies, k, v, lengths, slots, True, (window, 0))
    assert all(map(torch.equal, caches, copies))
    error = (out - expected).abs().max().item()
    assert error < (1e-5 if dtype == torch.float32 else 2e-2), (H, Hkv, window, D, dtype, error)
"""


@pytest.mark.skipif(gpu_kernels.triton is None, reason="needs triton, which this build of PyTorch comes without")
def test_triton_attention_equals_pytorchs():
    gpu = torch.cuda.is_available()
    environment = os.environ | ({} if gpu else {"TRITON_INTERPRET": "1"})
    done = subprocess.run([sys.executable, "-c", COMPARE, "cuda" if gpu else "cpu"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def filled(device="cpu"):
    torch.manual_seed(0)
    model = build_model(CONFIG, torch.device(device), torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.5 if parameter.ndim < 2 else parameter.size(-1) ** -0.5))
    model.for_inference()
    cache = KVCache.for_model(model, 4, CONFIG.sequence_len)
    for slot, length in enumerate((1, 20, 150, 7)):
        model.features(torch.randint(300, (1, length), generator=torch.Generator().manual_seed(slot)).to(device), cache.rows([slot]))
    return model, cache


@torch.inference_mode()
def test_rows_that_only_the_device_knows():
    """What a graph runs: slots in a tensor, filled up with the spare one; step after step, equal to rows from the host."""
    model, cache = filled()
    _, again = filled()
    slots, tokens = [2, 0, 3], torch.tensor([[5], [6], [7]])
    spare = torch.tensor([*slots, 4, 4])
    for _ in range(3):
        logits = model.next_logits(torch.cat((tokens, torch.zeros(2, 1, dtype=torch.int64))), CacheRows.on_device(cache, spare))
        cache.forget_spare()
        expected = model.next_logits(tokens, again.rows(slots))
        torch.testing.assert_close(logits[:3], expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(cache._lengths, again._lengths) and cache._lengths[-1] == 0
        tokens = expected.argmax(dim=-1, keepdim=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@torch.inference_mode()
def test_graphs_equal_eager_decoding(tokenizer):
    model, cache = filled("cuda")
    _, again = filled("cuda")
    graphs = DecodeGraphs(model, cache)
    tokens = [5, 6, 7]
    for _ in range(4):
        logits = graphs.next_logits(tokens, [2, 0, 3])
        expected = model.next_logits(torch.tensor(tokens, device="cuda")[:, None], again.rows([2, 0, 3]))
        torch.testing.assert_close(logits, expected, rtol=2e-3, atol=2e-3)
        tokens = expected.argmax(dim=-1).tolist()
    assert not graphs.failed and cache.lengths == again.lengths
    prompts = [[1, 2, 3, 4], [5] * 40, [7, 8]]
    by_graphs, eager = (Engine(model, tokenizer, graphs=flag).generate_many(prompts, max_tokens=20, temperature=0)
                        for flag in (True, False))
    assert [c.tokens for c in by_graphs] == [c.tokens for c in eager]
