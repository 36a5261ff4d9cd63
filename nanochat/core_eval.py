"""The CORE evaluation's data: a bundle of 22 tasks, downloaded once."""

import os
import shutil
import zipfile
from pathlib import Path

from filelock import FileLock

from nanochat import hub
from nanochat.common import UserError, get_base_dir

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"


def bundle_dir() -> Path:
    """The folder with core.yaml: $NANOCHAT_EVAL_BUNDLE, else in the base directory, fetched if it is not there."""
    own = os.environ.get("NANOCHAT_EVAL_BUNDLE")
    if own:
        if not (Path(own) / "core.yaml").exists():
            raise UserError(f"NANOCHAT_EVAL_BUNDLE={own}: there is no core.yaml in it")
        return Path(own)
    folder = get_base_dir() / "eval_bundle"
    with FileLock(f"{folder}.lock"):
        if not (folder / "core.yaml").exists():
            archive = hub.download(os.environ.get("NANOCHAT_EVAL_BUNDLE_URL") or BUNDLE_URL, folder.with_suffix(".zip"))
            _unpack(archive, folder)
    return folder


def _unpack(archive: Path, folder: Path) -> None:
    """To a temporary name first, so that the folder is whole when it is there; the archive goes."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as file:
            file.extractall(temporary)
    except zipfile.BadZipFile as error:
        archive.unlink()
        raise UserError(f"{archive} was no zip archive ({error}): run the command again") from None
    content = temporary / "eval_bundle" if (temporary / "eval_bundle").is_dir() else temporary
    if not (content / "core.yaml").exists():
        archive.unlink()
        raise UserError(f"{archive} held no core.yaml: check NANOCHAT_EVAL_BUNDLE_URL")
    shutil.rmtree(folder, ignore_errors=True)
    content.rename(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    archive.unlink()
