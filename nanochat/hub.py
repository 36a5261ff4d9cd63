"""Downloads: HF hub files and plain URLs, once per machine, resumed, retried, checked, put in place atomically."""

import hashlib
import os
import random
import re
import time
from pathlib import Path

import httpx
from filelock import FileLock

from nanochat.common import UserError, print0

TRIES = 6  # without progress
PROGRESS_BYTES = 1 << 20  # a try that brought so much is no failure
SLOW_WINDOW_S, SLOW_BYTES_PER_S = 30.0, 1000  # a connection slower than that is given up and made anew
TIMEOUT = httpx.Timeout(20.0, connect=10.0)
RETRY_STATUS = {408, 425, 429, 500, 502, 503, 504}


class DownloadError(UserError):
    """A download that did not succeed after all tries, or that cannot succeed."""


def endpoint() -> str:
    """The hub's address: $HF_ENDPOINT, else the public one."""
    address = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    if not re.fullmatch(r"https?://[\w.-]+(:\d+)?(/\S*)?", address):
        raise UserError(f"HF_ENDPOINT={address}: expected an address such as https://huggingface.co")
    return address


def is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def hub_url(repo: str, filename: str, repo_type: str = "dataset", revision: str = "main") -> str:
    prefix = {"dataset": "datasets/", "model": ""}[repo_type]
    return f"{endpoint()}/{prefix}{repo}/resolve/{revision}/{filename}"


def is_reachable(url: str | None = None, seconds: float = 5.0) -> bool:
    """True if the hub (or `url`) answers at all; never tries with HF_HUB_OFFLINE set."""
    if is_offline():
        return False
    try:
        httpx.head(url or endpoint(), timeout=seconds, follow_redirects=True)
        return True
    except httpx.HTTPError:
        return False


def download(url: str, path: Path, sha256: str | None = None) -> Path:
    """Fetch `url` to `path` unless it is there; DownloadError in one line if it cannot be had.

    A file appears under its name only when it is complete: size and SHA-256 are checked where the server (hub
    headers) or the caller gives them. An interrupted download goes on where it stopped.
    """
    path = Path(path)
    if path.exists():
        return path
    if is_offline():
        raise DownloadError(f"{path.name} is not here and HF_HUB_OFFLINE is set; fetch it on a machine with a network "
                            f"and put it at {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if path.exists():  # another rank fetched it meanwhile
            return path
        partial = path.with_name(path.name + ".partial")
        failures = 0
        while True:
            before = _size(partial)
            try:
                _fetch(url, partial, sha256)
                os.replace(partial, path)
                return path
            except _Retry as reason:
                failures = 1 if _size(partial) - before >= PROGRESS_BYTES else failures + 1
                if failures == TRIES:
                    raise DownloadError(f"{url}: {reason} ({TRIES} tries); run the command again to go on") from None
                wait = reason.wait_s if reason.wait_s is not None else min(30, 2**failures / 2) * (0.5 + random.random())
                print0(f"{path.name}: {reason}; again in {wait:.0f} s")
                time.sleep(wait)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


class _Retry(Exception):
    def __init__(self, reason: str, wait_s: float | None = None):
        super().__init__(reason)
        self.wait_s = wait_s


def _fetch(url: str, partial: Path, sha256: str | None) -> None:
    """One try: append what is missing to `partial`, then check it."""
    have = _size(partial)
    headers = {"Range": f"bytes={have}-"} if have else {}
    token = os.environ.get("HF_TOKEN")
    if token and url.startswith(endpoint() + "/"):
        headers["Authorization"] = f"Bearer {token}"
    headers["Accept-Encoding"] = "identity"
    try:
        with httpx.stream("GET", url, headers=headers, follow_redirects=True, timeout=TIMEOUT) as response:
            _check_status(response, url, partial)
            resumed = response.status_code == 206
            size = _total_size(response, have if resumed else 0)
            for hop in (*response.history, response):  # hub: LFS files carry their SHA-256 as the linked etag
                etag = (hop.headers.get("x-linked-etag") or "").strip('"')
                sha256 = sha256 or (etag if re.fullmatch(r"[0-9a-f]{64}", etag) else None)
                size = int(hop.headers["x-linked-size"]) if "x-linked-size" in hop.headers else size
            with open(partial, "ab" if resumed else "wb") as file:
                began, received = time.monotonic(), 0
                for block in response.iter_raw():  # as they come: iter_bytes would wait for whole blocks
                    file.write(block)
                    received += len(block)
                    seconds = time.monotonic() - began
                    if seconds > SLOW_WINDOW_S:
                        if received < seconds * SLOW_BYTES_PER_S:
                            raise _Retry(f"{received} bytes in {seconds:.0f} s")
                        began, received = time.monotonic(), 0
                file.flush()
                os.fsync(file.fileno())
    except httpx.HTTPError as error:
        raise _Retry(f"{type(error).__name__} {error}".strip()) from None
    except OSError as error:
        raise DownloadError(f"{partial} cannot be written: {error.strerror}; free some space and run again") from None
    got = partial.stat().st_size
    if size is not None and got < size:
        raise _Retry(f"got {got} of {size} bytes")
    if (size is not None and got > size) or (sha256 and _sha256(partial) != sha256):
        partial.unlink()
        raise _Retry("wrong content (size or SHA-256 differs)")


def _check_status(response: httpx.Response, url: str, partial: Path) -> None:
    status = response.status_code
    if status == 416:  # the range starts at or after the end: begin again
        partial.unlink(missing_ok=True)
        raise _Retry("server refused to resume")
    if status in RETRY_STATUS:
        wait = response.headers.get("retry-after", "")
        raise _Retry(f"HTTP {status}", min(300.0, float(wait)) if wait.isdigit() else None)
    if status in (401, 403):
        raise DownloadError(f"{url}: HTTP {status}, access denied; set HF_TOKEN to a token that may read it")
    if status not in (200, 206):
        raise DownloadError(f"{url}: HTTP {status}; check the address and HF_ENDPOINT")


def _total_size(response: httpx.Response, have: int) -> int | None:
    length = response.headers.get("content-length")
    return have + int(length) if length else None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
