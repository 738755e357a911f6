"""One writer a folder: a lock that the system lets go of when its holder ends, however it ends."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from duallora.errors import LockedError
from duallora.train import record


@contextmanager
def locked(folder: Path, kept: str = "run.json") -> Iterator[None]:
    """Holds ``folder`` for this process, and leaves nothing of it behind where the file ``kept`` has not come about.

    Raises:
        LockedError: another process holds it.
    """
    path = folder / ".lock"
    created, fresh, mine = not folder.exists(), not path.exists(), False
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("a+", encoding="utf-8") as file:
            if not _try_lock(file):
                file.seek(0)
                raise LockedError(
                    f"{folder} is in use by another run ({file.read().strip() or 'holder unknown'}); "
                    "wait for it, stop it, or choose another folder with -o"
                )
            mine = True
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {record.now()}\n")
            file.flush()
            yield
    finally:
        # A bad file or a mistyped model leaves nothing behind; another's lock, taken since, stays.
        if mine and fresh and not (folder / kept).exists():
            path.unlink(missing_ok=True)
            if created and not any(folder.iterdir()):
                folder.rmdir()


def _try_lock(file: IO[str]) -> bool:
    try:
        import fcntl
    except ImportError:
        import msvcrt

        file.seek(1 << 20)  # Windows locks bytes against reading too; the holder's line lies before this one
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError:
            return False
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True
