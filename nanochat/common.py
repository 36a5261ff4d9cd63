"""What every program needs: the base directory, errors for people, command-line parsing, and the runtime."""

import argparse
import contextlib
import ctypes
import errno
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from nanochat import hardware, ranks

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEVICE_TYPES = ("cuda", "cpu", "mps")
MENDABLE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR}


class UserError(Exception):
    """A mistake that a person can mend: what was got, what was expected, what to run."""


def get_base_dir() -> Path:
    """Directory of everything that runs write: $NANOCHAT_BASE_DIR, else ~/.cache/nanochat."""
    path = Path(os.environ.get("NANOCHAT_BASE_DIR") or "~/.cache/nanochat").expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"base directory {path} cannot be made ({error.strerror}); set NANOCHAT_BASE_DIR") from error
    if not os.access(path, os.W_OK):
        raise UserError(f"base directory {path} cannot be written to; set NANOCHAT_BASE_DIR")
    return path


def read_jsonl(path: Path) -> list[tuple[int, object]]:
    """(line number, value) of a jsonl file's lines that are not blank; UserError names a line that is not JSON."""
    values = []
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                values.append((number, json.loads(line.decode("utf-8-sig"))))
            except ValueError as error:
                raise UserError(f"{path}, line {number}: not JSON in UTF-8 ({error})") from None
    return values


def read_json(path: Path):
    """Contents of a small JSON record, None where it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError):
        return None


def repo_dir() -> Path:
    """Root of this checkout."""
    return Path(__file__).resolve().parent.parent


# --- programs -----------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are UserErrors, one line each."""

    def __init__(self, **kwargs):
        kwargs.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str):
        raise UserError(f"{message} (--help lists the flags)")


def integer(low: int, high: int | None = None, off: int | None = None):
    """Argument type: an int in [low, high]; `off` (usually -1) is accepted too and becomes None."""

    def parse(text: str) -> int | None:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
        if off is not None and value == off:
            return None
        if value < low or (high is not None and value > high):
            bounds = f"at least {low}" if high is None else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"expected a number {bounds}, got {value}")
        return value

    return parse


def number(low: float = 0.0, high: float = math.inf, off: float | None = None):
    """Argument type: a finite float in [low, high]; `off` is accepted too and becomes None."""

    def parse(text: str) -> float | None:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None
        if off is not None and value == off:
            return None
        if not math.isfinite(value) or not low <= value <= high:
            bounds = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
            raise argparse.ArgumentTypeError(f"expected a finite number {bounds}, got {text}")
        return value

    return parse


def batch_size(text: str) -> int | str:
    """Argument type: a number of rows, or "auto"."""
    return text if text == "auto" else integer(1)(text)


def add_training_output_flags(parser: "Parser") -> None:
    """Flags of saving and resuming that every training shares."""
    parser.add_argument("--save-every", type=integer(1, off=-1), default="-1", help="steps; -1 at the end only")
    parser.add_argument("--keep-last", type=integer(1, off=-1), default="-1", help="checkpoints to keep; -1 all")
    parser.add_argument("--resume", type=lambda text: text if text == "latest" else integer(0)(text), nargs="?",
                        const="latest", default=None, metavar="STEP",
                        help="go on from the last checkpoint, or from STEP; starts afresh if there is none yet")


def steps_or_auto(text: str) -> int | None | str:
    """Argument type: a number of steps, -1 for never, or "auto"."""
    return text if text == "auto" else integer(1, off=-1)(text)


def run_name(text: str) -> str:
    """Argument type: the name of a run, which becomes a directory's."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,99}", text) or ".previous" in text or text.endswith(".lock"):
        raise argparse.ArgumentTypeError(f"expected at most 100 of the letters a to z, digits, '-', '_' and '.', got {text!r}")
    return text


def add_runtime_flags(parser: Parser) -> None:
    """Flags that every program with a model shares."""
    parser.add_argument("--device-type", default="", choices=("", *DEVICE_TYPES), help="empty: the best one here")


def add_model_flags(parser: Parser) -> None:
    """Flags that say which trained model to load."""
    parser.add_argument("-g", "--model-tag", default=None, help="which run; the most recent one when left out")
    parser.add_argument("-s", "--step", "--model-step", type=integer(0), default=None, help="which step; the last when left out")


def run_script(main) -> None:
    """Run a script's main: a UserError becomes one line on stderr and exit code 2. The rank that fails first says so;
    the others end with it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # set by scripts/__init__.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        ranks.place()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    try:
        main()
        ranks.leave()
    except UserError as error:
        _fail(str(error), 2)
    except BrokenPipeError:  # the reader of our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in MENDABLE:
            _fail(f"{error.filename or 'the disk of ' + str(get_base_dir())}: {error.strerror}; mend that and run the same "
                  "command again (trainings: with --resume)", 2)
        if ranks.is_lost_contact(error) and ranks.place()["world_size"] > 1:
            time.sleep(3)  # the rank that failed tells why, if it still can
            detail = re.sub(r"^\[\S+\] ", "", str(error).splitlines()[0])[:120]
            _fail(f"lost contact with another rank ({detail}); if no rank says why, one was killed; run the same command again "
                  "(trainings: with --resume)", 1)
        if hardware.is_out_of_memory(error):
            _fail("out of memory: take a smaller model (--depth), fewer rows at a time (--device-batch-size), or a machine "
                  f"with more ({str(error).splitlines()[0][-90:]})", 2)
        traceback.print_exc()
        _fail(f"{type(error).__name__}: {error}", 1)


def _fail(reason: str, code: int):
    """Leave with one line that says why, unless another rank was the first to fail."""
    rank = f"[rank {os.environ['RANK']}] " if ranks.place()["world_size"] > 1 else ""
    earlier = ranks.publish_failure(reason)
    if earlier is None:
        print(f"{rank}error: {reason}", file=sys.stderr, flush=True)
    elif not earlier.endswith(f": {reason}"):
        print(f"{rank}stopping, because another rank failed: {earlier}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    if rank:  # no waiting for threads and process groups that wait for others
        os._exit(code)
    sys.exit(code)


# --- runtime ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Runtime:
    """Where this process computes, in which dtype, and its place among the ranks."""

    device: torch.device
    dtype: torch.dtype
    dtype_reason: str
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, value: float) -> float:
        """Sum of one number over all ranks, in float64 where the device has it."""
        if self.world_size == 1:
            return value
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        total = torch.tensor(value, dtype=dtype, device=self.device)
        dist.all_reduce(total)
        return total.item()

    def sum_tensor(self, values: torch.Tensor) -> torch.Tensor:
        """Sum of a host tensor over all ranks."""
        if self.world_size > 1:
            on_device = values.to(self.device)
            dist.all_reduce(on_device)
            values = on_device.cpu()
        return values

    def any(self, value: bool) -> bool:
        """True on every rank if it is on one."""
        return self.sum(float(value)) > 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()

    def synchronize(self) -> None:
        """Wait for the device, so that wall-clock times mean something."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def peak_memory_bytes(self) -> int:
        """Peak memory so far: of the device's allocator on CUDA, of the process elsewhere."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    """x in fp32, or in its own dtype if that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def print0(*args, **kwargs) -> None:
    """Print on rank 0 only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*args, **kwargs, flush=True)


def autodetect_device_type() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def compute_init(device_type: str = "", dtype: torch.dtype | None = None, seed: int = 42, index: int = 0) -> Runtime:
    """Seed, pick device and dtype, join the process group (NCCL on CUDA, gloo elsewhere) under torchrun.

    Give `dtype` to go on with what a checkpoint was made in; NANOCHAT_DTYPE has the last word. `index`: which GPU, outside
    torchrun.
    """
    device_type = device_type or autodetect_device_type()
    available = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}.get(device_type)
    if available and not available():
        raise UserError(f"--device-type={device_type}, but PyTorch sees no such device here; leave the flag out")
    here = ranks.place()
    rank, local_rank, world_size = here["rank"], here["local_rank"] or index, here["world_size"]
    if device_type == "cuda" and local_rank >= torch.cuda.device_count():
        raise UserError(f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} here; "
                        f"use torchrun --nproc_per_node={torch.cuda.device_count()}")
    device = torch.device(device_type, local_rank) if device_type == "cuda" else torch.device(device_type)
    torch.manual_seed(seed)
    if device_type == "cpu":
        _keep_freed_memory()
    if device_type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world_size > 1 and not dist.is_initialized():
        ranks.init_process_group("nccl" if device_type == "cuda" else "gloo", device if device_type == "cuda" else None)
    dtype, reason = (dtype, "as in the checkpoint") if dtype else pick_compute_dtype(device)
    dtype = DTYPES[ranks.gather(str(dtype).removeprefix("torch."))[0]]  # speed may differ between ranks, dtype must not
    if os.environ.get("NANOCHAT_DTYPE"):
        dtype, reason = dtype_from_environment(), "NANOCHAT_DTYPE"
    return Runtime(device, dtype, reason, rank, local_rank, world_size, here["local_world_size"])


def _keep_freed_memory() -> None:
    """Make glibc keep freed memory instead of returning it to the kernel: big tensors come and go on every step, and
    faulting their pages in again costs CPU training a third of its time."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # not glibc
        return
    mallopt(-4, 0)  # M_MMAP_MAX: no allocation by mmap
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never trim


def compile_problem(device: torch.device) -> str | None:
    """Why torch.compile cannot be used here, None if it can."""
    if any(os.environ.get(name, "0") not in ("", "0") for name in ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE")):
        return "switched off by the environment"
    if device.type == "mps":
        return "not used on mps"
    if device.type == "cpu" and not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")):
        return "no C++ compiler here (install g++)"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


def compute_cleanup() -> None:
    ranks.leave()


def dtype_from_environment() -> torch.dtype | None:
    """The dtype that NANOCHAT_DTYPE names, None where it is unset."""
    name = os.environ.get("NANOCHAT_DTYPE")
    if name and name not in DTYPES:
        raise UserError(f"NANOCHAT_DTYPE={name}: expected one of {', '.join(DTYPES)}")
    return DTYPES[name] if name else None


def pick_compute_dtype(device: torch.device) -> tuple[torch.dtype, str]:
    """bf16 where the device multiplies it natively and faster than fp32, fp32 elsewhere; with the reason."""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        name = f"compute capability {capability[0]}.{capability[1]}"
        return (torch.bfloat16, name) if capability >= (8, 0) else (torch.float32, f"{name} has no native bf16")
    if device.type == "cpu" and _cpu_has_bf16():
        speedup = _matmul_seconds(torch.float32) / _matmul_seconds(torch.bfloat16)
        reason = f"bf16 matrix products run {speedup:.1f}x as fast as fp32 here"
        return (torch.bfloat16 if speedup > 1.2 else torch.float32), reason
    return torch.float32, "no native bf16 here"


def _cpu_has_bf16() -> bool:
    if platform.machine() in ("x86_64", "AMD64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and " bf16" in cpuinfo.read_text()


def _matmul_seconds(dtype: torch.dtype, size: int = 512, repeats: int = 5) -> float:
    a = torch.full((size, size), 0.5, dtype=dtype)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(a, a)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


@contextlib.contextmanager
def announced(name: str):
    """Announce a silent wait and say how long it took."""
    print0(f"{name} ...")
    start = time.perf_counter()
    yield
    print0(f"{name}: {time.perf_counter() - start:.1f} s")
