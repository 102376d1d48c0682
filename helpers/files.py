"""Files that a crash or a full disk leaves as they were."""

import ctypes
import errno
import os
import shutil
import sys
import threading
from pathlib import Path

# a variable of a headless run's kernel: the terminal, on which studies show how far they are
TERMINAL = "HELPERS_TERMINAL"


def write(path, data):
    """Write `data` beside `path`, flush it to the disk, and only then take the file's place.

    A missing folder is made; a symlink stays one and its target is written; an existing file
    keeps its permissions.

    Parameters
    ----------
    path : str or Path
    data : bytes

    Raises
    ------
    OSError
        If the file cannot be written; the error names `path`, and nothing is left behind.
    """
    target = Path(os.path.realpath(path))
    beside = target.with_name(f".{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_symlink() or (target.exists() and not target.is_file()):
            raise OSError(errno.EEXIST, "is there already and no regular file")
        if target.exists() and not os.access(target, os.W_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        try:
            with open(beside, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if target.exists():
                shutil.copymode(target, beside)
            os.replace(beside, target)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def replace_folder(folder, fill):
    """Fill a new folder beside `folder`, and only then take its place.

    On Linux the two are exchanged in one step, so that a kill at any moment leaves one of them
    whole in its place. Elsewhere it can leave the old one beside, as ``.NAME-*.old``.

    Parameters
    ----------
    folder : str or Path
        What it holds is lost; it need not be there.
    fill : callable
        ``fill(new)`` writes into the new folder. Where it fails, `folder` is as before.

    Raises
    ------
    OSError
        If `folder` is no folder, or cannot be written.
    """
    target = Path(os.path.realpath(folder))
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "is there already and no folder", str(folder))
    mark = f"{os.getpid()}-{threading.get_ident()}"
    new, old = (target.with_name(f".{target.name}-{mark}.{kind}") for kind in ("new", "old"))
    try:
        new.mkdir(parents=True)
        fill(new)
        if not _exchanged(new, target):
            if target.exists():
                target.rename(old)
            new.rename(target)
    except OSError as error:  # of a file in the new folder, of which a caller knows nothing
        raise OSError(error.errno, error.strerror or str(error), str(folder)) from None
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        for left in (new, old):
            shutil.rmtree(left, ignore_errors=True)


def _exchanged(new, target):
    """Exchange two folders in one step; return False where there is one only, or no such call."""
    call = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return call is not None and not call(
        here, os.fsencode(new), here, os.fsencode(target), exchange
    )
