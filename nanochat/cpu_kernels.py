"""C kernels for CPUs (cpu_decoding.c, cpu_training.c): compiled once, in two seconds, and called through ctypes.

B rows, T positions, N outputs, K inputs, C channels, H query heads, Hkv key/value heads, D head dim, V vocabulary.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from ctypes import c_float, c_int, c_int64, c_void_p
from pathlib import Path

import torch

HERE = Path(__file__).parent
SOURCES = HERE / "cpu_kernels.h", HERE / "cpu_decoding.c", HERE / "cpu_training.c"
FLAGS = "-O3 -march=native -fno-math-errno -fno-trapping-math -shared -fPIC".split()
THREADS = (["-fopenmp"], ["-fopenmp-simd"])  # Apple's clang has no OpenMP: one thread then
DTYPE_FLAGS = {torch.float32: [], torch.bfloat16: ["-DBFLOAT16"]}
MAX_ROWS = 64  # beyond that PyTorch's matrix products are faster


def _fields(pointers: str, integers: str, floats: str) -> list:
    return [(name, kind) for kind, names in ((c_void_p, pointers), (c_int64, integers), (c_float, floats))
            for name in names.split()]


class BlockArguments(ctypes.Structure):
    """What a layer needs, as in cpu_decoding.c."""

    _fields_ = _fields("x x0 c_q c_k c_v c_proj ve_gate c_fc mlp_c_proj value_embedding cos sin k_cache v_cache scratch "
                       "out slots lengths",
                       "B C F H Hkv D gate_channels window slot_stride head_stride place_stride threads",
                       "resid_lambda x0_lambda qk_scale epsilon")


class AttentionArguments(ctypes.Structure):
    """What attention needs, as in cpu_training.c."""

    _fields_ = _fields("q k v grad out grad_q grad_k grad_v normalizer", "B T H Hkv D window threads", "scale")


def _build(dtype: torch.dtype) -> Path:
    """The library compiled for this processor; OSError where that cannot be done."""
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("gcc", "clang", "cc")), None)
    if compiler is None:
        raise OSError("no C compiler here (install gcc)")
    processor = next((line for line in _cpuinfo() if line.startswith(("flags", "Features"))), platform.processor())
    flags = [*FLAGS, *DTYPE_FLAGS[dtype]]
    key = hashlib.sha256("\n".join((*(s.read_text() for s in SOURCES), compiler, *flags, processor)).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"nanochat-kernels-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise OSError(f"{folder} belongs to someone else")
    library = folder / f"{key}.so"
    if not library.exists():
        handle, fresh = tempfile.mkstemp(suffix=".so", dir=folder)
        os.close(handle)
        for threads in THREADS:
            done = subprocess.run([*shlex.split(compiler), *flags, *threads, *map(str, SOURCES[1:]), "-o", fresh, "-lm"],
                                  capture_output=True)
            if done.returncode == 0:
                break
        else:
            raise OSError(f"{compiler}: {done.stderr.decode(errors='replace').strip()[:300]}")
        os.replace(fresh, library)
    return library


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


@functools.cache
def load(dtype: torch.dtype):
    """The library for a dtype, None where there is none and PyTorch has to do; NANOCHAT_CPU_KERNELS=0 switches it off."""
    if os.environ.get("NANOCHAT_CPU_KERNELS") == "0" or dtype not in DTYPE_FLAGS:
        return None
    try:
        library = ctypes.CDLL(str(_build(dtype)))
    except (OSError, AttributeError) as error:  # AttributeError: no os.getuid on Windows
        print(f"going on with PyTorch alone, several times slower: the C kernels cannot be had here ({error})", flush=True)
        return None
    for name, kinds in (("linear", [c_void_p] * 3 + [c_int64] * 3 + [c_int]),
                        ("softcap", [c_void_p] * 2 + [c_int64, c_float, c_int]),
                        ("block", [ctypes.POINTER(BlockArguments)]), ("attention", [ctypes.POINTER(AttentionArguments)]),
                        ("softmax_gradient", [c_void_p] * 3 + [c_int64] * 2 + [c_float, c_int])):
        getattr(library, name).argtypes = kinds
    return library


def fits_linear(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `linear` takes this product: on the CPU, without gradients, few rows, N a multiple of 4 and K of 32."""
    if torch.is_grad_enabled() or not x.is_cpu or x.numel() > MAX_ROWS * x.size(-1):
        return False
    N, K = weight.shape
    return (K % 32 == 0 and N % 4 == 0 and x.dtype == weight.dtype and weight.is_contiguous()
            and not torch.compiler.is_compiling() and load(x.dtype) is not None)


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (..., K) times weight (N, K) transposed -> (..., N), for what `fits_linear`."""
    x = x.contiguous()
    N, K = weight.shape
    out = x.new_empty(*x.shape[:-1], N)
    load(x.dtype).linear(x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // K, N, K, torch.get_num_threads())
    return out


def softcap(x: torch.Tensor, cap: float) -> torch.Tensor:
    """cap * tanh(x / cap) in fp32, for what `linear` gave."""
    out = torch.empty_like(x, dtype=torch.float32)
    load(x.dtype).softcap(x.data_ptr(), out.data_ptr(), x.numel(), cap, torch.get_num_threads())
    return out


def fits_block(x: torch.Tensor, head_dim: int) -> bool:
    """Whether `block` takes x (B, T, C): on the CPU, without gradients, one position a row, C and D multiples of 32."""
    return (x.is_cpu and x.size(1) == 1 and x.size(2) % 32 == 0 and head_dim % 32 == 0 and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling() and load(x.dtype) is not None)


def block(layer, x, x0, lambdas: tuple[float, float], value_embedding, cos_sin, window: int, cache, qk_scale: float,
          epsilon: float) -> torch.Tensor:
    """Block.begin, attention and Block.close in one for x (B, 1, C); stores keys and values in `cache` -> (B, 1, C)."""
    assert cache.rows.longest < cache.k_cache.size(1), "the cache is full"
    attention, mlp, dtype, rows = layer.attn, layer.mlp, x.dtype, cache.rows
    B, _, C = x.shape
    H, Hkv, D = attention.n_head, attention.n_kv_head, attention.head_dim
    gate = attention.ve_gate
    weights = [None if linear is None else linear.weight_as(dtype).contiguous() for linear in (
        attention.c_q, attention.c_k, attention.c_v, attention.c_proj, gate, mlp.c_fc, mlp.c_proj)]
    F = len(weights[5])
    out, scratch = torch.empty_like(x), x.new_empty(B * (3 * C + 2 * Hkv * D + F))
    tensors = [x.contiguous(), x0.contiguous(), *weights, value_embedding, *(t.contiguous() for t in cos_sin),
               cache.k_cache, cache.v_cache, scratch, out, rows.slot_index, rows.lengths]
    slot_stride, place_stride, head_stride, _ = cache.k_cache.stride()
    load(dtype).block(BlockArguments(
        *(None if t is None else t.data_ptr() for t in tensors), B, C, F, H, Hkv, D,
        0 if gate is None else weights[4].size(1), window, slot_stride, head_stride, place_stride,
        torch.get_num_threads(), *lambdas, qk_scale, epsilon))
    return out


# --- training -----------------------------------------------------------------------------------------------------


def trains(dtype: torch.dtype) -> bool:
    """Whether `attention` and `softmax_gradient` can be had, and with as many threads as PyTorch has."""
    library = load(dtype)
    return library is not None and (bool(library.threaded()) or torch.get_num_threads() == 1)


def _check(failed: int) -> None:
    if failed:
        raise RuntimeError("a C kernel can't allocate memory")  # words that `train_step` knows


def _attend(window: int, **tensors) -> None:
    B, T, H, D = tensors["q"].shape
    pointers = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    _check(load(tensors["q"].dtype).attention(AttentionArguments(
        **pointers, B=B, T=T, H=H, Hkv=tensors["k"].size(2), D=D, window=window, threads=torch.get_num_threads(),
        scale=D**-0.5)))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, window):
        q, k, v = (t.contiguous() for t in (q, k, v))
        out = torch.empty_like(q)
        normalizer = torch.empty(q.size(0), q.size(2), q.size(1), dtype=torch.float32)
        _attend(window, q=q, k=k, v=v, out=out, normalizer=normalizer)
        ctx.save_for_backward(q, k, v, out, normalizer)
        ctx.window = window
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        q, k, v, out, normalizer = ctx.saved_tensors
        grad_q, grad_k, grad_v = (torch.empty_like(t) for t in (q, k, v))
        _attend(ctx.window, q=q, k=k, v=v, grad=grad.contiguous(), out=out, grad_q=grad_q, grad_k=grad_k, grad_v=grad_v,
                normalizer=normalizer)
        return grad_q, grad_k, grad_v, None


def attention(q, k, v, window: int) -> torch.Tensor:
    """Causal attention of q (B, T, H, D) over k and v (B, T, Hkv, D) -> (B, T, H, D), with gradients, where `trains`."""
    B, T, H, D = q.shape
    assert k.shape == v.shape == (B, T, k.size(2), D) and H % k.size(2) == 0 and q.dtype == k.dtype == v.dtype
    return _Attention.apply(q, k, v, window)


def softmax_gradient_(raw: torch.Tensor, valid: torch.Tensor, cap: float) -> torch.Tensor:
    """`loss.softmax_gradient_` for raw (n, V), valid (n, 1) -> (n, 1), where `trains`."""
    n, V = raw.shape
    valid, sums = valid.float(), torch.empty(n, 1, dtype=torch.float32)
    _check(load(raw.dtype).softmax_gradient(raw.data_ptr(), valid.data_ptr(), sums.data_ptr(), n, V, cap,
                                            torch.get_num_threads()))
    return sums
