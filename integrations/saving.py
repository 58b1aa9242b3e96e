"""Save a model into a folder so that a failure leaves what was there before.

Everything is written into a temporary folder beside the target, flushed to the disk, and renamed into place at the
end. A full disk, an error or a kill before that moment leaves the old folder as it was.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hfq.errors import CheckpointError, ConfigError
from hfq.report import Report

__all__ = ["REPORT_FILE", "atomic_folder", "read_report", "save"]

REPORT_FILE = "hfq_report.json"


def save(
    model: Any,
    folder: str | os.PathLike[str],
    overwrite: bool = False,
    *,
    processor: Any = None,
    extra: Callable[[Path], None] | None = None,
    **kwargs: Any,
) -> Path:
    """``model.save_pretrained`` into ``folder``, atomically, with the report beside the weights.

    Args:
        model: anything with ``save_pretrained``.
        folder: where to save; must be empty or new unless ``overwrite``.
        overwrite: replace what is in ``folder``.
        processor: tokenizer or processor to save with it.
        extra: called with the temporary folder before it is moved into place (a model card, for example).
        kwargs: passed to ``save_pretrained``.

    Raises:
        ConfigError: the folder holds files and ``overwrite`` is off, or ``folder`` is a file.
        CheckpointError: writing failed; the old folder is as it was.
    """
    with atomic_folder(folder, overwrite) as temporary:
        model.save_pretrained(temporary, **kwargs)
        if processor is not None:
            processor.save_pretrained(temporary)
        report = getattr(model, "hfq_report", None)
        if isinstance(report, Report):
            (temporary / REPORT_FILE).write_text(report.to_json() + "\n", encoding="utf-8")
        if extra is not None:
            extra(temporary)
    return Path(folder)


@contextmanager
def atomic_folder(folder: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside ``folder`` that takes its place when the block ends without an error."""
    target = Path(folder).absolute()
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{folder} is a file: a folder is needed")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise ConfigError(f"{folder} is not empty: name another folder, or pass overwrite=True (--overwrite)")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    except OSError as error:
        raise CheckpointError(f"nothing was saved: {target.parent} cannot be written ({error})") from error
    try:
        temporary.chmod(0o755)  # mkdtemp's folders are private
        yield temporary
        _flush(temporary)
        _swap(temporary, target)
    except OSError as error:
        raise CheckpointError(f"nothing was saved, {folder} is as it was before: {error}") from error
    except Exception as error:
        if _is_write_failure(error):
            raise CheckpointError(f"nothing was saved, {folder} is as it was before: {error}") from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_report(folder: str | os.PathLike[str]) -> Report | None:
    """The report saved in ``folder``, or ``None``."""
    import json

    path = Path(folder) / REPORT_FILE
    try:
        return Report.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} is not a report of hfq: {error}") from None


def _is_write_failure(error: Exception) -> bool:
    # safetensors reports a full disk as an exception of its own, with the system's message inside.
    return type(error).__name__ == "SafetensorError"


def _flush(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            continue
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _swap(temporary: Path, target: Path) -> None:
    """Put ``temporary`` at ``target``; a folder cannot be replaced by a full one in one step, so two renames."""
    if not target.exists():
        temporary.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    target.rename(old / "folder")
    try:
        temporary.rename(target)
    except OSError:
        (old / "folder").rename(target)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
