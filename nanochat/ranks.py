"""What ranks tell each other beside collectives: small values, and failures, over the key-value store of the job.

A rank that fails publishes why before it leaves; a thread in every other rank sees that within seconds and ends it,
whatever it is waiting for. Rank 0 also notices ranks that fall silent (killed, or their machine gone), and all notice
when the store itself is gone.
"""

import os
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as dist

POLL_S = 1.0
SILENCE_S = 60.0  # a rank that has not been heard of for so long is taken for dead
TIMEOUT = timedelta(hours=1)  # of collectives: generous, since failures are noticed by the thread

_store: dist.Store | None = None
_gathered = 0
_leaving = threading.Event()


def place() -> dict[str, int]:
    """This process's rank, local_rank, world_size, local_world_size and node, from torchrun's environment; ValueError
    if that makes no sense."""
    names = {"rank": ("RANK", 0), "local_rank": ("LOCAL_RANK", 0), "world_size": ("WORLD_SIZE", 1), "node": ("GROUP_RANK", 0)}
    values = {}
    for key, (variable, default) in names.items():
        text = os.environ.get(variable, str(default))
        if not text.isdigit():
            raise ValueError(f"{variable}={text}: expected a whole number, as torchrun sets it; unset it for one process")
        values[key] = int(text)
    values["local_world_size"] = int(os.environ.get("LOCAL_WORLD_SIZE") or values["world_size"])
    if values["rank"] >= values["world_size"]:
        raise ValueError(f"RANK={values['rank']} with WORLD_SIZE={values['world_size']}: start several processes with "
                         "torchrun, and unset both for one")
    if values["world_size"] > 1 and not (os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT", "").isdigit()):
        raise ValueError(f"WORLD_SIZE={values['world_size']}, but MASTER_ADDR and MASTER_PORT are not set: start the program "
                         "with torchrun, or unset WORLD_SIZE")
    return values


def _connect() -> dist.Store:
    """A connection of its own to the job's store, which torchrun's agent holds, or rank 0."""
    here = place()
    holds = here["rank"] == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and _store is None
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), here["world_size"], holds,
                          timeout=timedelta(minutes=10), wait_for_workers=False, multi_tenant=True)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"nanochat/{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{attempt}", store)


def join() -> None:
    """Connect to the other ranks and begin to watch them; nothing to do for one process, or the second time."""
    global _store
    if place()["world_size"] > 1 and _store is None:
        _store = _connect()
        threading.Thread(target=_watch, args=(place(), _connect()), daemon=True).start()


def init_process_group(backend: str, device_id=None) -> None:
    """Join the process group over the same store."""
    here = place()
    join()
    dist.init_process_group(backend, store=dist.PrefixStore("group", _store), rank=here["rank"],
                            world_size=here["world_size"], timeout=TIMEOUT, device_id=device_id)


def gather(value: str) -> list[str]:
    """Every rank's value, by rank; all ranks must call it. Needs no process group."""
    global _gathered
    here = place()
    if here["world_size"] == 1:
        return [value]
    join()
    _gathered += 1
    _store.set(f"gather{_gathered}/{here['rank']}", value)
    return [_store.get(f"gather{_gathered}/{rank}").decode() for rank in range(here["world_size"])]


def leave() -> None:
    """Wait for the others, then stop watching them: the end of a program that went well."""
    if _store is not None and not _leaving.is_set():
        gather("done")
        _leaving.set()
        if dist.is_initialized():
            dist.destroy_process_group()


def publish_failure(reason: str) -> str | None:
    """Tell the other ranks why this one ends -> what another rank told before, None if this one is the first."""
    _leaving.set()
    try:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            join()  # failures before the first contact, such as wrong flags, are told once too
        if _store is None:
            return None
        mine = f"rank {place()['rank']}: {reason}"
        told = _store.compare_set("failure", "", mine).decode()
        return None if told == mine else told
    except (RuntimeError, ValueError):  # the store is gone too
        return None


def is_lost_contact(error: BaseException) -> bool:
    """True for the errors of collectives whose other side has gone."""
    return isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and any(
        sign in str(error) for sign in ("gloo", "Connection closed by peer", "NCCL", "Socket", "Connection reset"))


def _watch(here: dict[str, int], store: dist.Store) -> None:
    heard = {rank: (0, time.monotonic()) for rank in range(1, here["world_size"])} if here["rank"] == 0 else {}
    while not _leaving.wait(POLL_S):
        try:
            store.add(f"beat{here['rank']}", 1)
            if store.check(["failure"]):
                return _end(here, store.get("failure").decode())
            for rank, (count, since) in heard.items():
                now = store.add(f"beat{rank}", 0)
                if now != count:
                    heard[rank] = (now, time.monotonic())
                elif time.monotonic() - since > SILENCE_S:
                    reason = f"rank {rank}: not heard of for {SILENCE_S:.0f} s; it was killed, or its machine is gone"
                    store.compare_set("failure", "", reason)
        except RuntimeError:
            return _end(here, "rank 0: its machine, or torchrun there, is gone")


def _end(here: dict[str, int], reason: str) -> None:
    """End this process unless it is about to end itself; one line from each machine."""
    if not _leaving.wait(2.0):
        if here["local_rank"] == 0:
            print(f"[rank {here['rank']}] stopping, because another rank failed: {reason}", file=sys.stderr, flush=True)
        os._exit(1)
