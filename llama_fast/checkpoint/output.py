"""A folder that appears only when it is complete."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..files import naming


@contextmanager
def appears_whole(source: Path, target: Path, size: int) -> Iterator[Path]:
    """Yield a folder beside target. Rename it to target on success; remove it on an exception, or
    on a signal that ends the process. Raises OSError if size bytes do not fit there."""
    target = target.absolute()
    if target.resolve() == source.resolve():
        raise ValueError(f"{target}: is the input itself; name another folder for the output")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target}: exists already; name a new or an empty folder")
    missing = [parent for parent in target.parents if not parent.exists()]
    free = shutil.disk_usage((missing or [target])[-1].parent).free
    if free < size:
        raise OSError(
            errno.ENOSPC,
            f"{os.strerror(errno.ENOSPC)}: the output has {size:,} bytes, the disk {free:,} free",
            str(target),
        )
    folder = target.parent / f".{target.name}.partial-{os.getpid()}"
    with ends_by_exception():
        try:
            with naming(target):
                folder.mkdir(parents=True)
                yield folder
                if target.exists():
                    target.rmdir()
                folder.rename(target)
        except BaseException:
            with ends_by_exception(signal.SIG_IGN):
                shutil.rmtree(folder, ignore_errors=True)
                for parent in missing:
                    with suppress(OSError):
                        parent.rmdir()
            raise


@contextmanager
def ends_by_exception(handler: Any = None) -> Iterator[None]:
    """Let SIGTERM and SIGHUP, where they would end the process, raise SystemExit instead, or call
    handler. Python sets handlers in its main thread only."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) in (signal.SIG_DFL, _exit):
                before[number] = signal.signal(number, handler or _exit)
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def _exit(number: int, frame: Any) -> None:
    sys.exit(128 + number)  # the code that shells give a process which the signal ended
