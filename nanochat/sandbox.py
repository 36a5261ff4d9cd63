"""Runs one untrusted program. execution.py starts this file as a script of its own; on standard input come a line of JSON,
the limits, and the program. It imports nothing but the standard library.

Three processes: the launcher, which enters new namespaces; the supervisor, first process in them, which watches; the worker,
which runs the program. When the supervisor ends, the kernel ends everything that is left in its namespace.
"""

import ctypes
import json
import os
import resource
import signal
import sys
import time
import traceback

NEW_USER, NEW_PID, NEW_NET, NEW_MOUNTS, NEW_IPC = 0x10000000, 0x20000000, 0x40000000, 0x00020000, 0x08000000
READ_ONLY, NO_SUID, NO_DEVICES, PRIVATE, RECURSIVE = 1, 2, 4, 1 << 18, 1 << 14
SET_DEATH_SIGNAL, SET_SUBREAPER, SET_NO_NEW_PRIVILEGES = 1, 36, 38
MOUNT_SETATTR = 442  # system call, the same number on all processors; Linux 5.12
COVERED = ("/tmp", "/var/tmp", "/run", "/dev/shm")  # empty in there: other programs' files and sockets
POLL_S = 0.005

libc = ctypes.CDLL(None, use_errno=True)


def call(function, *args) -> None:
    if function(*args) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


# --- isolation ------------------------------------------------------------------------------------------------------


def enter_namespaces() -> str:
    """Leave the machine's processes, network and mounts behind -> "" or why not (then limits alone have to do)."""
    user, group = os.getuid(), os.getgid()
    everything = NEW_PID | NEW_NET | NEW_MOUNTS | NEW_IPC
    try:
        try:
            call(libc.unshare, NEW_USER | everything)
        except OSError:
            call(libc.unshare, everything)  # root where user namespaces are switched off
            return ""
        for name, text in (("setgroups", "deny"), ("uid_map", f"1000 {user} 1"), ("gid_map", f"1000 {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        return ""
    except (OSError, AttributeError) as error:  # no such call outside Linux
        return f"the kernel grants no namespaces ({getattr(error, 'strerror', None) or error})"


def close_file_system(folder: str, disk_bytes: int) -> str:
    """Everything read-only, an empty folder in memory to work in, only own processes in /proc -> that folder."""
    def mount(what, where, flags, data=""):
        call(libc.mount, what, where.encode(), what, flags, data.encode())

    call(libc.mount, None, b"/", None, RECURSIVE | PRIVATE, None)
    attributes = (ctypes.c_uint64 * 4)(READ_ONLY | NO_SUID, 0, 0, 0)
    call(libc.syscall, MOUNT_SETATTR, -100, b"/", 0x8000, ctypes.byref(attributes), ctypes.sizeof(attributes))
    try:
        mount(b"proc", "/proc", READ_ONLY | NO_SUID | NO_DEVICES)
    except OSError:  # where parts of the outer /proc are hidden: none at all
        mount(b"tmpfs", "/proc", READ_ONLY | NO_SUID)
    size = f"size={disk_bytes},mode=777"
    for place in COVERED:
        if os.path.isdir(place) and not os.path.islink(place) and not os.path.realpath(sys.base_prefix).startswith(place + "/"):
            mount(b"tmpfs", place, NO_SUID | NO_DEVICES | (0 if place == "/tmp" else READ_ONLY), size)
            folder = "/tmp" if place == "/tmp" else folder
    if folder != "/tmp":
        mount(b"tmpfs", folder, NO_SUID | NO_DEVICES, size)
    return folder


def drop_privileges() -> None:
    libc.prctl(SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc.capset(ctypes.byref(header), ctypes.byref(none))


def set_limits(limits: dict) -> None:
    seconds = int(limits["seconds"]) + 1
    for name, value in (("RLIMIT_CPU", seconds), ("RLIMIT_AS", limits["memory_bytes"]), ("RLIMIT_FSIZE", limits["disk_bytes"]),
                        ("RLIMIT_NOFILE", 64), ("RLIMIT_CORE", 0), ("RLIMIT_MEMLOCK", 0), ("RLIMIT_NPROC", limits["user_processes"])):
        try:
            resource.setrlimit(getattr(resource, name), (value, value))
        except (OSError, ValueError, AttributeError):  # a lower limit is in force, or this system has no such limit
            pass


# --- the processes -----------------------------------------------------------------------------------------------------


def work(program: str, limits: dict, done: int) -> None:
    """Run the program in this process, then say that it came to its end."""
    os.setsid()
    set_limits(limits)
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_DFL)
    sys.argv = ["program.py"]
    code = 1
    try:
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
        code = 0
    except MemoryError:
        code = 77
    except BaseException:
        traceback.print_exc(limit=-5)
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):
        pass
    if code == 0:
        os.write(done, limits["secret"].encode())
    os._exit(code)


def processes() -> dict[int, tuple[int, int]]:
    """Process -> (parent, resident bytes) of all that /proc shows."""
    found = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
            found[int(name)] = int(fields[1]), int(fields[21]) * resource.getpagesize()
        except (OSError, IndexError, ValueError):
            continue
    return found


def descendants(root: int) -> dict[int, int]:
    """Process -> resident bytes of all that come from `root`."""
    everything, found, grown = processes(), {}, True
    while grown:
        new = {pid: size for pid, (parent, size) in everything.items() if pid not in found and (parent == root or parent in found)}
        found |= new
        grown = bool(new)
    return found


def supervise(worker: int, limits: dict, stopped: list) -> tuple[str, int]:
    """Wait for the worker, or end it for a reason -> (reason, exit status)."""
    deadline, has_proc = time.monotonic() + limits["seconds"], os.path.exists("/proc/1/stat")
    while True:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == worker:
            return ("memory" if os.waitstatus_to_exitcode(status) == 77 else ""), status
        if time.monotonic() > deadline or stopped:
            return "timeout", 0
        if has_proc:
            family = descendants(os.getpid())
            if len(family) > limits["processes"]:
                return "processes", 0
            if sum(family.values()) > limits["memory_bytes"]:
                return "memory", 0
        if pid == 0:
            time.sleep(POLL_S)


def end_all() -> None:
    """Kill what is left of the program, whatever session it is in: all are descendants of this process."""
    for _ in range(100):
        family = descendants(os.getpid()) if os.path.isdir("/proc/self") else {}
        for pid in family:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                pass
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            if not family:
                return
        time.sleep(0.002)


def main() -> None:
    limits = json.loads(sys.stdin.buffer.readline())
    program, report_fd = sys.stdin.buffer.read().decode("utf-8", "replace"), limits["report_fd"]
    problem = enter_namespaces() if limits["namespaces"] else "switched off"
    supervisor = os.fork()
    if supervisor:
        os.close(report_fd)
        os.waitpid(supervisor, 0)
        os._exit(0)
    # when the launcher dies: at once with the namespace, else after the program's processes have been killed one by one
    libc.prctl(SET_DEATH_SIGNAL, signal.SIGTERM if problem else signal.SIGKILL, 0, 0, 0)
    stopped: list = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    report = {"isolation": problem}
    folder = limits["folder"]
    if not problem:
        try:
            folder = close_file_system(folder, limits["disk_bytes"])
        except OSError as error:
            report["isolation"] = f"the file system could not be closed ({error.strerror})"
    else:
        libc.prctl(SET_SUBREAPER, 1, 0, 0, 0)
    drop_privileges()
    os.chdir(folder)
    there, done = os.pipe()
    worker = os.fork()
    if worker == 0:
        os.close(report_fd)
        os.close(there)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        work(program, limits, done)
    os.close(done)
    reason, status = supervise(worker, limits, stopped)
    end_all()
    os.set_blocking(there, False)
    try:
        finished = os.read(there, 100).decode("utf-8", "replace") == limits["secret"]
    except BlockingIOError:
        finished = False
    report |= {"reason": reason, "finished": finished and not reason, "code": os.waitstatus_to_exitcode(status)}
    os.write(report_fd, json.dumps(report).encode())
    os._exit(0)


if __name__ == "__main__":
    main()
