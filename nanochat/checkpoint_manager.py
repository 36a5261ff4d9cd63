"""Checkpoints: written whole or not at all, found, read, migrated.

A checkpoint is model_{step}.pt, optim_{step}_rank{r}.pt and meta_{step}.json; it exists when its meta file exists,
which is written last.
"""

import errno
import json
import os
import platform
import re
import subprocess
import sys
import threading
import time
import uuid
from dataclasses import asdict
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from nanochat import ranks
from nanochat.common import DTYPES, Runtime, UserError, get_base_dir, print0, read_json, repo_dir
from nanochat.gpt import CONFIG_VERSION, GPT, GPTConfig
from nanochat.tokenizer import RustBPETokenizer, get_tokenizer, kept_tokenizer

SOURCES = {"base": "base_checkpoints", "mid": "mid_checkpoints", "sft": "chatsft_checkpoints",
           "rl": "chatrl_checkpoints"}
RANK_FILES_TIMEOUT_S = 600
LOCK_TIMEOUT_S = 10


def source_dir(source: str) -> Path:
    return get_base_dir() / SOURCES[source]


# --- write --------------------------------------------------------------------------------------------------------


def _to_host(value):
    """A copy in host memory of every tensor in nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {k: _to_host(v) for k, v in value.items()}
    return [_to_host(v) for v in value] if isinstance(value, list) else value


def _write_atomically(path: Path, write) -> None:
    """`write(file)` to a temporary name, flushed to the disk, then renamed."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class CheckpointWriter:
    """Writes a run's checkpoints from a background thread; training waits only for the copy to host memory.

    Every rank writes its optimizer file; model and meta are written once on each file system that the ranks use: by rank
    0 where all machines share one, by the first rank of each machine where they do not.
    """

    def __init__(self, directory: Path, runtime: Runtime, keep_last: int | None = None):
        self.directory, self.runtime, self.keep_last = Path(directory), runtime, keep_last
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{directory} cannot be made: {error.strerror}") from error
        self.neighbours = _ranks_on_this_file_system(self.directory.parent, runtime)
        self.is_writer = runtime.rank == self.neighbours[0]
        if self.is_writer:
            self._lock = FileLock(f"{self.directory}.lock")
            try:
                self._lock.acquire(timeout=LOCK_TIMEOUT_S)
            except Timeout:
                raise UserError(f"another training writes to {self.directory} at this moment; wait for it or stop it, or "
                                "give this one another --model-tag") from None
            remove_leftovers(self.directory)

    def start(self, after: int | None) -> None:
        """Put aside what the run would mix with: all earlier checkpoints, or those after the step it goes on from."""
        if self.is_writer:
            if after is None:
                set_aside(self.directory)
            else:
                set_aside_after(self.directory, after)
        self.runtime.barrier()
        self.directory.mkdir(exist_ok=True)

    def check(self) -> None:
        """UserError if the checkpoint under way has failed already; does not wait."""
        if self._error is not None:
            self.wait()

    def save(self, step: int, model_state: dict, optim_state: dict, meta: dict) -> None:
        """Copy everything to host memory and write it in the background; UserError if the previous write failed."""
        self.wait()
        optim_state = _to_host(optim_state)
        model_state = _to_host(model_state) if self.is_writer else None
        meta = json.dumps(meta, indent=1).encode()
        self._thread = threading.Thread(target=self._write, args=(step, model_state, optim_state, meta))
        self._thread.start()

    def wait(self) -> None:
        """Until the checkpoint under way is on disk; UserError if it could not be written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            steps = find_steps(self.directory)
            kept = f"the checkpoint of step {steps[-1]} is intact" if steps else "no checkpoint was there before"
            reason = "the disk is full" if getattr(error, "errno", None) == errno.ENOSPC else str(error)
            raise UserError(f"saving to {self.directory} failed: {reason}; {kept}. Free some space, then run the same "
                            "command with --resume" + ("" if steps else " left out")) from error

    def close(self) -> None:
        """Wait, and let others write to the directory."""
        self.wait()
        if self.is_writer:
            self._lock.release()

    def _write(self, step, model_state, optim_state, meta):
        try:
            rank, d = self.runtime.rank, self.directory
            _write_atomically(d / f"optim_{step:06d}_rank{rank}.pt", lambda f: _save(optim_state, f))
            if not self.is_writer:
                return
            _write_atomically(d / f"model_{step:06d}.pt", lambda f: _save(model_state, f))
            _wait_for([d / f"optim_{step:06d}_rank{r}.pt" for r in self.neighbours])
            _write_atomically(d / f"meta_{step:06d}.json", lambda f: f.write(meta))
            if self.keep_last is not None:
                for old in find_steps(d)[:-self.keep_last]:
                    remove_checkpoint(d, old)
        except BaseException as error:  # reported by the next save or wait
            self._error = error


def _save(value, file) -> None:
    try:
        torch.save(value, file)
    except RuntimeError as error:  # PyTorch's zip writer hides the errno
        free = os.statvfs(os.path.dirname(file.name)).f_bavail
        if free < 64 or "write" in str(error) or "PytorchStreamWriter" in str(error):
            raise OSError(errno.ENOSPC, "No space left on device") from error
        raise


def _ranks_on_this_file_system(folder: Path, runtime: Runtime) -> list[int]:
    """Ranks that see the same folder: all, or on machines with disks of their own those of this machine."""
    if runtime.local_world_size == runtime.world_size:
        return list(range(runtime.world_size))
    token = ranks.gather(uuid.uuid4().hex)[0]
    probe = folder / f".probe-{token}-{runtime.rank}"
    probe.touch()
    ranks.gather("probes are there")
    seen = sorted(int(p.name.rsplit("-", 1)[1]) for p in folder.glob(f".probe-{token}-*"))
    ranks.gather("all have looked")
    probe.unlink()
    return seen


def _wait_for(paths: list[Path]) -> None:
    deadline = time.monotonic() + RANK_FILES_TIMEOUT_S
    while not all(path.exists() for path in paths):
        if time.monotonic() > deadline:
            missing = [path.name for path in paths if not path.exists()]
            raise OSError(f"other ranks have not written {', '.join(missing)} within {RANK_FILES_TIMEOUT_S} s")
        time.sleep(0.1)


def remove_checkpoint(directory: Path, step: int) -> None:
    """Meta first, so that a half-removed checkpoint is never found."""
    (directory / f"meta_{step:06d}.json").unlink(missing_ok=True)
    for path in directory.glob(f"*_{step:06d}*.pt"):
        path.unlink(missing_ok=True)


def remove_leftovers(directory: Path) -> None:
    """Delete what an interrupted save left: temporary files, and files of steps without a meta file."""
    steps = set(find_steps(directory))
    for path in directory.iterdir():
        match = re.fullmatch(r"(?:model|optim)_(\d{6,})(?:_rank\d+)?\.pt", path.name)
        if path.name.endswith(".tmp") or (match and int(match[1]) not in steps):
            path.unlink(missing_ok=True)


def set_aside(directory: Path) -> None:
    """Before a run starts afresh: checkpoints of an earlier run of that name go to `<name>.previous1`, 2, ..."""
    if find_steps(directory):
        previous = _free_name(directory)
        directory.rename(previous)
        print0(f"an earlier run was in {directory}: it is kept in {previous.name} (--resume would have gone on with it)")


def set_aside_after(directory: Path, step: int) -> None:
    """Before a run goes on from an earlier step: the checkpoints after that go to `<name>.previous1`, 2, ..."""
    later = [s for s in find_steps(directory) if s > step]
    if later:
        previous = _free_name(directory)
        previous.mkdir()
        for path in (p for s in later for p in directory.glob(f"*_{s:06d}*")):
            path.rename(previous / path.name)
        print0(f"checkpoints after step {step} are kept in {previous.name}")


def _free_name(directory: Path) -> Path:
    return next(path for n in range(1, 10**6)
                if not (path := directory.with_name(f"{directory.name}.previous{n}")).exists())


def environment() -> dict:
    """What a checkpoint records of where it was made."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=repo_dir(), capture_output=True, text=True)
    return {"torch": torch.__version__, "python": platform.python_version(), "host": platform.node(),
            "git_commit": git.stdout.strip() or None, "time": time.time()}


# --- find and read ------------------------------------------------------------------------------------------------


def find_steps(directory: Path) -> list[int]:
    """Steps of the complete checkpoints in a directory, ascending."""
    if not Path(directory).is_dir():
        return []
    return sorted(int(m[1]) for p in Path(directory).iterdir() if (m := re.fullmatch(r"meta_(\d{6,})\.json", p.name)))


def find_run(source: str, model_tag: str | None = None) -> Path:
    """Directory of a run, the most recently written one without a tag; UserError if there is none."""
    root = source_dir(source)
    runs = {p.name: p for p in root.iterdir() if find_steps(p)} if root.is_dir() else {}
    current = {name: p for name, p in runs.items() if ".previous" not in name}
    if model_tag is not None:
        if model_tag not in runs:
            raise UserError(f"no checkpoint {model_tag!r} in {root}; there are: {', '.join(sorted(runs)) or 'none'}")
        return runs[model_tag]
    if not current:
        script = {"base": "base_train", "mid": "chat_sft --stage mid", "sft": "chat_sft", "rl": "chat_rl"}[source]
        raise UserError(f"no {source} checkpoint in {root}: run python -m scripts.{script} first")
    return max(current.values(), key=lambda run: max(p.stat().st_mtime for p in run.glob("meta_*.json")))


def find_step(directory: Path, step: int | None = None) -> int:
    """`step` if it is there, the last one without it."""
    steps = find_steps(directory)
    if not steps:
        raise UserError(f"no complete checkpoint in {directory}")
    if step is not None and step not in steps:
        raise UserError(f"no step {step} in {directory}; there are: {', '.join(map(str, steps))}")
    return steps[-1] if step is None else step


def find_resume_step(directory: Path, wanted: int | str | None) -> int | None:
    """Step to go on from, the last ("latest") or the `wanted` one that every machine has; None for a fresh start."""
    if wanted is None:
        return None
    everywhere = [set(json.loads(steps)) for steps in ranks.gather(json.dumps(find_steps(directory)))]
    common = set.intersection(*everywhere)
    if not common and any(everywhere):
        missing = [str(rank) for rank, steps in enumerate(everywhere) if not steps]
        raise UserError(f"--resume: no checkpoint in {directory} is on every machine (none on those of ranks "
                        f"{', '.join(missing) or 'with other steps'}); copy the directory there, or leave out --resume")
    if wanted != "latest" and wanted not in common:
        raise UserError(f"no step {wanted} in {directory}; there are: {', '.join(map(str, sorted(common))) or 'none'}")
    if not common:
        print0(f"--resume: no checkpoint in {directory} yet, starting at step 0")
        return None
    return max(common) if wanted == "latest" else wanted


def load_meta(directory: Path, step: int) -> dict:
    """Meta of a checkpoint; UserError if the file is damaged."""
    meta = read_json(directory / f"meta_{step:06d}.json")
    if not isinstance(meta, dict) or not isinstance(meta.get("model_config"), dict) or meta.setdefault("step", step) != step:
        raise UserError(f"{directory / f'meta_{step:06d}.json'} is damaged; choose another step")
    return meta


def load_tensors(path: Path, device="cpu") -> dict:
    """A saved dict of tensors; UserError if it is missing or damaged."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; the checkpoint is not complete") from None
    except Exception as error:  # torch raises many kinds for a damaged file
        raise UserError(f"{path} is truncated or damaged ({str(error).splitlines()[0][:80]}); choose another "
                        "step (--step, --resume STEP), or train again") from error


def load_optimizer_states(directory: Path, step: int, meta: dict, runtime: Runtime) -> list[dict]:
    """This rank's optimizer file at the world size that saved it, every rank's at another."""
    wanted = [runtime.rank] if meta["world_size"] == runtime.world_size else range(meta["world_size"])
    paths = [directory / f"optim_{step:06d}_rank{r}.pt" for r in wanted]
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise UserError(f"{', '.join(missing)} of {meta['world_size']} optimizer files are missing in {directory}; where "
                        "machines do not share a disk, copy them from those that wrote them")
    return [load_tensors(path, "cpu" if len(paths) > 1 else runtime.device) for path in paths]


# --- models -------------------------------------------------------------------------------------------------------


def config_to_meta(config: GPTConfig) -> dict:
    return {"version": CONFIG_VERSION, **asdict(config)}


def config_from_meta(stored: dict) -> GPTConfig:
    """The config of a checkpoint of any version."""
    stored = dict(stored)
    version = stored.pop("version", 0)
    try:
        if version > CONFIG_VERSION:
            raise UserError(f"the checkpoint's config has version {version}, this code knows {CONFIG_VERSION}: update nanochat")
        if version < 1:  # public checkpoints: early ones know no windows
            stored.setdefault("window_pattern", "L")
            stored.setdefault("n_kv_head", stored["n_head"])
        return GPTConfig(**stored)
    except (TypeError, KeyError) as error:
        raise UserError(f"the checkpoint's config does not fit: {error}") from error


def _migrate_state(model: GPT, state: dict) -> dict:
    """Fill in what older checkpoints lack, so that the model computes what it did when they were saved."""
    state = {name.removeprefix("_orig_mod."): tensor for name, tensor in state.items()
             if not name.endswith((".cos", ".sin")) and name not in ("cos", "sin")}
    neutral = {"resid_lambdas": 1.0, "x0_lambdas": 0.0, "smear_lambda": 0.0, "backout_lambda": 0.0,
               "smear_gate.weight": 0.0}
    for name, value in neutral.items():
        if name not in state:
            state[name] = torch.full_like(model.get_parameter(name), value, device="cpu")
    for layer in list(model.value_embeds):
        if f"value_embeds.{layer}.weight" not in state:
            del model.value_embeds[layer]
            model.transformer.h[int(layer)].attn.ve_gate = None
    return state


def build_from_state(config: GPTConfig, state: dict, device: torch.device, dtype: torch.dtype) -> GPT:
    """A model with the given weights."""
    with device:
        model = GPT(config)
    state = _migrate_state(model, state)
    model.set_compute_dtype(dtype)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"the checkpoint's weights do not fit its config: {str(error).splitlines()[-1]}") from error
    return model


def check_tokenizer(tokenizer: RustBPETokenizer, meta: dict) -> None:
    """UserError unless the checkpoint was trained with this tokenizer."""
    recorded = meta.get("tokenizer_hash")
    if recorded and recorded != tokenizer.content_hash():
        kept = kept_tokenizer(get_base_dir() / "tokenizer", recorded)
        raise UserError("the tokenizer in the base directory is not the one that this checkpoint was trained with; " + (
            f"it is kept: rename {kept} to tokenizer.json" if kept.exists() else
            "restore that tokenizer (tokenizer/tokenizer.json), or train again"))
    if not recorded and meta["model_config"]["vocab_size"] != tokenizer.get_vocab_size():
        raise UserError(f"the tokenizer has {tokenizer.get_vocab_size()} tokens, the checkpoint "
                        f"{meta['model_config']['vocab_size']}")


def locate_model(source: str, model_tag: str | None = None, step: int | None = None):
    """Directory, meta and tokenizer of a checkpoint: all that can be checked without a device."""
    directory = find_run(source, model_tag)
    meta = load_meta(directory, find_step(directory, step))
    tokenizer = get_tokenizer()
    check_tokenizer(tokenizer, meta)
    return directory, meta | {"tag": directory.name}, tokenizer


def load_model(source: str, device: torch.device, phase: str, model_tag: str | None = None, step: int | None = None,
               dtype: torch.dtype | None = None) -> tuple[GPT, RustBPETokenizer, dict]:
    """Model, tokenizer and meta of a checkpoint: source base | mid | sft | rl, phase "train" or "eval" (cast once)."""
    directory, meta, tokenizer = locate_model(source, model_tag, step)
    state = load_tensors(directory / f"model_{meta['step']:06d}.pt")
    dtype = dtype or DTYPES[meta.get("dtype", "float32")]
    model = build_from_state(config_from_meta(meta["model_config"]), state, device, dtype)
    if model_tag is None:  # the choice was made here: say which
        print0(f"model: {directory.name} step {meta['step']} ({source})", file=sys.stderr)
    return (model.train() if phase == "train" else model.for_inference()), tokenizer, meta
