"""The chunked loss against PyTorch's cross entropy of the full logits."""

import pytest
import torch
import torch.nn.functional as F

from nanochat import cpu_kernels
from nanochat.loss import softcap_cross_entropy, softmax_gradient_, softmax_gradient_on


def plain(hidden, weight, targets, reduction):
    logits = 15 * torch.tanh((hidden @ weight.T) / 15)
    return F.cross_entropy(logits, targets, ignore_index=-1, reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("chunk", [7, 64, 1000])
def test_value_and_gradients(reduction, chunk):
    torch.manual_seed(0)
    hidden, weight = torch.randn(100, 16), 3 * torch.randn(50, 16)
    targets = torch.randint(0, 50, (100,))
    targets[::9] = -1
    ours = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    exact = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    loss = softcap_cross_entropy(*ours, targets, reduction, chunk_tokens=chunk)
    expected = plain(*exact, targets, reduction)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    factors = torch.rand_like(expected)
    for got, want in zip(torch.autograd.grad(loss, ours, factors.float()), torch.autograd.grad(expected, exact, factors)):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype,tolerance", [(torch.bfloat16, 0.02), (torch.float16, 0.005)])
def test_half_precision(dtype, tolerance):
    """The gradients of both half precisions stay close to those in float64, large logits included."""
    torch.manual_seed(0)
    hidden, weight = (4 * torch.randn(64, 32)).to(dtype), torch.randn(500, 32)
    targets = torch.randint(0, 500, (64,))
    ours = [hidden.clone().requires_grad_(), weight.to(dtype).float().requires_grad_()]
    exact = [hidden.double().requires_grad_(), weight.to(dtype).double().requires_grad_()]
    loss, expected = softcap_cross_entropy(*ours, targets), plain(*exact, targets, "mean")
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for got, want in zip(torch.autograd.grad(loss, ours), torch.autograd.grad(expected, exact)):
        assert (got.double() - want).norm() < tolerance * want.norm()


def test_extreme_logits_stay_finite():
    hidden = torch.full((4, 8), 100.0, requires_grad=True)
    weight = torch.randn(30, 8, requires_grad=True)
    loss = softcap_cross_entropy(hidden, weight, torch.tensor([0, 1, 2, -1]))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(hidden.grad).all() and torch.isfinite(weight.grad).all()


def test_all_targets_ignored_is_zero():
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    loss = softcap_cross_entropy(hidden, weight, torch.full((4,), -1))
    loss.backward()
    assert loss.item() == 0 and not hidden.grad.any() and not weight.grad.any()


def test_no_fp32_logits_of_a_whole_batch():
    """Neither training nor evaluation makes a tensor as large as tokens x vocabulary."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor):
                    self.numel = max(self.numel, tensor.numel())
            return out

    hidden, weight = torch.randn(4096, 8, requires_grad=True), torch.randn(300, 8, requires_grad=True)
    targets = torch.randint(0, 300, (4096,))
    with Largest() as training:
        softcap_cross_entropy(hidden, weight, targets, "sum").backward()
    with Largest() as evaluation, torch.no_grad():
        softcap_cross_entropy(hidden, weight, targets, "none")
    assert max(training.numel, evaluation.numel) <= 1024 * 300 < 4096 * 300


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 2**-8)])
def test_softmax_gradient_in_c(dtype, tolerance):
    """The C pass over the logits against float64: logits beyond the cap, rows that do not count, a row that is not finite."""
    if not cpu_kernels.trains(dtype):
        pytest.skip("no C compiler here")
    torch.manual_seed(0)
    raw, valid = (6 * torch.randn(9, 1003)).to(dtype), torch.ones(9, 1, dtype=torch.bool)
    raw[2, :3] = torch.tensor([300.0, -300.0, 119.0])
    valid[4] = False
    squashed = torch.tanh(raw.double() / 15)
    exponentials = torch.exp(15 * squashed)
    sums = exponentials.sum(dim=1, keepdim=True)
    expected = valid * exponentials / sums * (1 - squashed.square())
    for function in (softmax_gradient_, softmax_gradient_on(torch.device("cpu"), dtype)):
        gradient = raw.clone()
        torch.testing.assert_close(function(gradient, valid).double(), sums, rtol=2e-6, atol=0)
        torch.testing.assert_close(gradient.double(), expected, rtol=tolerance, atol=5e-7)
    raw[7, 5] = float("nan")
    totals = softmax_gradient_on(torch.device("cpu"), dtype)(raw, valid)
    assert totals.isnan().flatten().tolist() == [row == 7 for row in range(9)]
