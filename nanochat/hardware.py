"""Peak bf16 FLOP/s and memory bandwidth by device name (vendor data sheets, dense), and a measured peak for CPUs."""

import time
from pathlib import Path

import psutil
import torch

# name fragment (lower case, first match wins): bf16 FLOP/s, bytes/s
PEAKS = (
    ("gb200", 2.5e15, 8.0e12), ("b200", 2.25e15, 8.0e12), ("b100", 1.8e15, 8.0e12),
    ("h200", 989e12, 4.8e12), ("h100 nvl", 835e12, 3.9e12), ("h100 pcie", 756e12, 2.0e12), ("h100", 989e12, 3.35e12),
    ("h800", 989e12, 3.35e12), ("h20", 148e12, 4.0e12), ("a100", 312e12, 2.0e12), ("a800", 312e12, 2.0e12),
    ("l40s", 362e12, 864e9), ("l40", 181e12, 864e9), ("l4", 121e12, 300e9), ("a10g", 70e12, 600e9),
    ("a10", 125e12, 600e9), ("a6000", 155e12, 768e9), ("a40", 150e12, 696e9), ("rtx 5090", 210e12, 1.79e12),
    ("rtx 4090", 165e12, 1.01e12), ("rtx 3090", 71e12, 936e9), ("mi355x", 2.5e15, 8.0e12), ("mi325x", 1.3e15, 6.0e12),
    ("mi300x", 1.3e15, 5.3e12), ("mi250x", 383e12, 3.2e12),
)
MEASURE_S = 0.5


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type} ({threads} thread{'s' * (threads > 1)})" if device.type == "cpu" else device.type


def peak_flops(name: str) -> float | None:
    """bf16 peak in FLOP/s of a device by its name, None where the table does not know it.

    peak_flops("NVIDIA H100 80GB HBM3") -> 9.89e14
    """
    return next((flops for fragment, flops, _ in PEAKS if fragment in name.lower()), None)


def peak_bandwidth(name: str) -> float | None:
    """Memory bandwidth in bytes/s of a device by its name, None where the table does not know it."""
    return next((bandwidth for fragment, _, bandwidth in PEAKS if fragment in name.lower()), None)


def measured_flops(device: torch.device, dtype: torch.dtype, size: int = 2048, repeats: int = 5,
                   best: bool = False) -> float:
    """FLOP/s that a size x size x size matrix product reaches here: the median of `repeats`, or the best; of fewer where
    they take more than half a second."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        if sum(seconds) > MEASURE_S and len(seconds) > 2:
            break
    seconds = sorted(seconds[1:])
    return 2 * size**3 / seconds[0 if best else len(seconds) // 2]


def peak_for(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """The peak that MFU is a share of, and where the number comes from: data sheet, else a measurement."""
    name = device_name(device)
    peak = peak_flops(name)
    if peak is not None and device.type == "cuda":
        return peak, f"{name}, data sheet"
    return measured_flops(device, dtype, repeats=9, best=True), f"{name}, measured {str(dtype).removeprefix('torch.')} matrix product"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch, or a kernel of ours, got no memory on whatever device."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("allocate memory", "not enough memory")))


def free_memory_bytes(device: torch.device, processes: int = 1) -> float:
    """Memory that a new process may take: the GPU's, else a share of the host's, control group limits included."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return host_memory_bytes() / processes


def host_memory_bytes() -> float:
    """Host memory that is free, within the limit of the control group."""
    free = psutil.virtual_memory().available
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        return float(min(free, limit - used))
    except (OSError, ValueError):  # no such file, or "max"
        return float(free)


def measured_bandwidth(device: torch.device, size_bytes: int = 2**29, repeats: int = 5) -> float:
    """Bytes/s at which a big tensor is read here: the median of `repeats` sums over it."""
    x = torch.ones(size_bytes // 4, device=device)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        x.sum().item()
        seconds.append(time.perf_counter() - start)
    return x.nbytes / sorted(seconds[1:])[repeats // 2]
