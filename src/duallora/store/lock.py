"""One writer a folder: a lock that the system lets go of when its holder ends, however it ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from duallora.errors import LockedError
from duallora.store.run_folder import FACTS


@contextmanager
def locked(folder: Path, kept: str = FACTS) -> Iterator[None]:
    """Holds ``folder`` for this process, and leaves nothing of it behind where the file ``kept`` has not come about.

    Raises:
        LockedError: another process holds it.
    """
    path = folder / ".lock"
    made = [place for place in (folder, *folder.absolute().parents) if not place.exists()]  # the deepest first
    fresh = not path.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise LockedError(
            f"{folder} is in use by another run; wait for it, stop it, or choose another folder with -o"
        ) from None
    try:
        yield
    finally:
        lock.release()
        # A bad file or a mistyped model leaves nothing behind.
        if fresh and not (folder / kept).exists():
            path.unlink(missing_ok=True)
            for place in made:
                if any(place.iterdir()):
                    break
                place.rmdir()
