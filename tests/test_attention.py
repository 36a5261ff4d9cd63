"""Every attention backend against a float64 softmax over an explicit mask, forward and backward."""

import pytest
import torch

from nanochat import flash_attention
from nanochat.common import UserError


def reference(q, k, v, window):
    """Causal windowed attention in float64, (B, T, H, D)."""
    T, repeats = q.size(1), q.size(2) // k.size(2)
    k, v = k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2)
    scores = torch.einsum("bthd,bshd->bhts", q, k) * q.size(-1) ** -0.5
    distance = torch.arange(T)[:, None] - torch.arange(T)[None]
    mask = (distance >= 0) & ((distance <= window) if window >= 0 else True)
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(~mask, float("-inf")).softmax(-1), v)


def needs_c(dtype):
    if not flash_attention.C.usable(torch.device("cpu"), dtype):
        pytest.skip("no C compiler here")


def check(backend, T, window, heads, kv_heads, head_dim, dtype, tolerance, size=1):
    """Output and gradients against the reference; the tolerance is a share of each tensor's largest."""
    if backend is flash_attention.C:
        needs_c(dtype)
    torch.manual_seed(T + window)
    q, k, v = (torch.randn(2, T, h, head_dim).mul(factor).to(dtype).requires_grad_()
               for h, factor in ((heads, size), (kv_heads, size), (kv_heads, 1)))
    grad = torch.randn(2, T, heads, head_dim).to(dtype)
    out = backend.func(q, k, v, True, (window, 0))
    grads = torch.autograd.grad(out, (q, k, v), grad, allow_unused=True, materialize_grads=True)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = reference(*exact, window)
    for got, want in zip((out, *grads), (expected, *torch.autograd.grad(expected, exact, grad.double()))):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance * max(1, want.abs().max().item()))


@pytest.mark.parametrize("backend", flash_attention.BACKENDS, ids=lambda b: b.name)
@pytest.mark.parametrize("T,window", [(1, -1), (37, -1), (300, -1), (300, 128), (256, 128), (129, 128), (300, 7),
                                      (300, 299), (50, 0), (2100, 512)])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_forward_and_backward(backend, T, window, kv_heads):
    if T > 1000 and kv_heads == 4:
        pytest.skip("one long case is enough")
    check(backend, T, window, 4, kv_heads, 16, torch.float32, 1e-5)


@pytest.mark.parametrize("head_dim", [6, 32, 40, 64, 128])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_head_dims_and_bf16(head_dim, dtype, tolerance):
    check(flash_attention.C, 150, 40, 4, 2, head_dim, dtype, tolerance)
    check(flash_attention.C, 128, -1, 2, 2, head_dim, dtype, tolerance)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 5e-5), (torch.bfloat16, 1e-2)])
def test_scores_far_apart(dtype, tolerance):
    """Scores of more than a hundred, whose exponentials would overflow, the largest anywhere among the keys."""
    check(flash_attention.C, 200, -1, 1, 1, 64, dtype, tolerance, size=7)


def test_c_kernel_rows_do_not_touch_each_other():
    """The same bits alone and in company; a row that is not finite stays alone with it."""
    needs_c(torch.float32)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 3, 100, 2, 32)
    together = flash_attention.C.func(q, k, v, True, (-1, 0))
    assert torch.equal(flash_attention.C.func(q[1:2], k[1:2], v[1:2], True, (-1, 0))[0], together[1])
    k[1, 50] = float("nan")
    spoilt = flash_attention.C.func(q, k, v, True, (-1, 0))
    assert torch.equal(spoilt[[0, 2]], together[[0, 2]]) and torch.equal(spoilt[1, :50], together[1, :50])
    assert spoilt[1, 50:].isnan().all()


@pytest.mark.parametrize("window", [-1, 5])
def test_cache_rows_of_different_lengths(window):
    torch.manual_seed(0)
    lengths, T, S = [0, 3, 20], 4, 32
    k_all, v_all = torch.randn(2, 3, S, 2, 16)
    q = torch.randn(3, T, 4, 16)
    k_cache, v_cache = torch.zeros(3, S, 2, 16), torch.zeros(3, S, 2, 16)
    new_k, new_v = torch.empty(3, T, 2, 16), torch.empty(3, T, 2, 16)
    for row, n in enumerate(lengths):
        k_cache[row, :n], v_cache[row, :n] = k_all[row, :n], v_all[row, :n]
        new_k[row], new_v[row] = k_all[row, n:n + T], v_all[row, n:n + T]
    out = flash_attention.flash_attn.flash_attn_with_kvcache(
        q, k_cache, v_cache, new_k, new_v, cache_seqlens=torch.tensor(lengths, dtype=torch.int32),
        window_size=(window, 0))
    for row, n in enumerate(lengths):
        padded = torch.zeros(1, n + T, 4, 16, dtype=torch.double)
        padded[0, n:] = q[row]
        expected = reference(padded, k_all[row:row + 1, :n + T].double(), v_all[row:row + 1, :n + T].double(), window)
        torch.testing.assert_close(out[row].double(), expected[0, n:], rtol=0, atol=1e-5)
        torch.testing.assert_close(k_cache[row, :n + T], k_all[row, :n + T])


def test_no_quadratic_mask_with_windows(monkeypatch):
    """The windowed SDPA path never sees a mask of T x T."""
    shapes = []
    original = torch.nn.functional.scaled_dot_product_attention

    def spy(*args, attn_mask=None, **kwargs):
        shapes.append(None if attn_mask is None else tuple(attn_mask.shape))
        return original(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(flash_attention.F, "scaled_dot_product_attention", spy)
    q = torch.randn(1, 1024, 1, 16)
    flash_attention.SDPA.func(q, q, q, True, (128, 0))
    assert shapes == [None, (128, 256)]


def test_choice_of_backend(monkeypatch):
    needs_c(torch.float32)

    def fails(*args):
        raise RuntimeError("no kernel image is available")

    broken = flash_attention.SimpleNamespace(name="broken", usable=lambda *a: True, func=fails)
    monkeypatch.setattr(flash_attention, "BACKENDS", (broken, *flash_attention.BACKENDS))
    monkeypatch.setattr(flash_attention, "_chosen", {})
    assert flash_attention.choose_backend("cpu", torch.float32).name == "c"  # probed by a launch, then passed over
    monkeypatch.setattr(flash_attention, "_chosen", {})
    monkeypatch.setenv("NANOCHAT_ATTENTION", "sdpa")
    assert flash_attention.choose_backend("cpu", torch.float32).name == "sdpa"
    monkeypatch.setattr(flash_attention, "_chosen", {})
    for wrong in ("broken", "fa9"):
        monkeypatch.setenv("NANOCHAT_ATTENTION", wrong)
        with pytest.raises(UserError):
            flash_attention.choose_backend("cpu", torch.float32)
