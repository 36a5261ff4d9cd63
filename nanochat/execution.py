"""Runs Python that a model wrote, without trusting it: in its own processes, with limits, apart from the machine.

Where the kernel grants namespaces (Linux) it sees no network, no other process and a read-only file system; elsewhere limits
and the killing of all its processes have to do, and that is said once.
"""

import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

SANDBOX = Path(__file__).with_name("sandbox.py")
GRACE_S = 2.0  # beyond the program's time: for starting and ending
MAX_PROCESSES = 16

_told = False


@dataclass(frozen=True)
class ExecutionResult:
    """What became of a program; `success`: it ran to its last line."""

    success: bool
    stdout: str
    stderr: str
    timeout: bool = False
    memory_exceeded: bool = False
    error: str | None = None  # why it was ended, or how it ended itself
    isolation: str = ""  # what could not be isolated


def execute_code(code: str, timeout: float = 5.0, maximum_memory_bytes: int = 256 * 2**20, maximum_disk_bytes: int = 16 * 2**20,
                 maximum_output_bytes: int = 2**16, namespaces: bool = True) -> ExecutionResult:
    """Run a program to its end or to a limit: seconds of wall time and of each process's CPU time, memory in all, files in
    all, output. Nothing of it is left afterwards. Safe in any thread."""
    with tempfile.TemporaryDirectory(prefix="nanochat-program-", ignore_cleanup_errors=True) as folder:
        reading, writing = os.pipe()
        limits = {"report_fd": writing, "secret": secrets.token_hex(8), "folder": folder, "namespaces": namespaces,
                  "seconds": timeout, "memory_bytes": maximum_memory_bytes, "disk_bytes": maximum_disk_bytes,
                  "processes": MAX_PROCESSES, "user_processes": 4096}
        process = _start(folder, writing)
        os.close(writing)
        try:
            process.stdin.write(json.dumps(limits).encode() + b"\n" + code.encode("utf-8", "replace"))
            process.stdin.close()
        except BrokenPipeError:
            pass
        outputs, too_much = _collect(process, reading, time.monotonic() + timeout + GRACE_S, maximum_output_bytes)
        _end(process, reading, outputs["report"])
        os.close(reading)
    stdout, stderr = (outputs[name][:maximum_output_bytes].decode("utf-8", "replace") for name in ("stdout", "stderr"))
    return _result(stdout, stderr, outputs["report"], too_much)


def _start(folder: str, report: int) -> subprocess.Popen:
    """The sandbox, which inherits the pipe for its report."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": folder, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
    return subprocess.Popen([sys.executable, "-I", "-S", "-B", str(SANDBOX)], stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/", env=environment, start_new_session=True,
                            pass_fds=(report,))


def _collect(process, report: int, deadline: float, limit: int) -> tuple[dict[str, bytearray], bool]:
    """Output and report until all have ended, time is over, or there is too much of it."""
    names = {process.stdout.fileno(): "stdout", process.stderr.fileno(): "stderr", report: "report"}
    outputs = {name: bytearray() for name in names.values()}
    with selectors.DefaultSelector() as selector:
        for fd in names:
            selector.register(fd, selectors.EVENT_READ)
        while selector.get_map() and time.monotonic() < deadline:
            for key, _ in selector.select(deadline - time.monotonic()):
                chunk = os.read(key.fd, 65536)
                outputs[names[key.fd]] += chunk
                if not chunk:
                    selector.unregister(key.fd)
                if len(outputs[names[key.fd]]) > limit:
                    return outputs, True
            if outputs["report"] and not selector.get_map().get(report):  # the sandbox is through; nobody else is left
                break
    return outputs, False


def _end(process: subprocess.Popen, reading: int, report: bytearray) -> None:
    """The launcher's death ends the supervisor, which ends everything else; its report comes last."""
    process.kill()
    process.wait()
    with selectors.DefaultSelector() as selector:
        selector.register(reading, selectors.EVENT_READ)
        while selector.select(GRACE_S) and (chunk := os.read(reading, 65536)):
            report += chunk
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.stdout.close()
    process.stderr.close()


def _result(stdout: str, stderr: str, report: bytearray, too_much: bool) -> ExecutionResult:
    global _told
    try:
        facts = json.loads(report)
    except ValueError:
        facts = {"isolation": "", "reason": "output" if too_much else "timeout", "finished": False, "code": -9}
    if facts["isolation"] and facts["isolation"] != "switched off" and not _told:
        _told = True
        print(f"programs run with limits, but not apart from this machine: {facts['isolation']}", flush=True)
    reason, code = "output" if too_much else facts["reason"], facts["code"]
    error = {"timeout": "out of time", "memory": "out of memory", "processes": f"more than {MAX_PROCESSES} processes",
             "output": "too much output"}.get(reason)
    if error is None and not facts["finished"]:
        error = (stderr.strip().splitlines() or [f"ended with exit code {code} before its last line"])[-1]
    return ExecutionResult(facts["finished"] and not too_much, stdout, stderr, reason == "timeout", reason == "memory", error,
                           facts["isolation"])
