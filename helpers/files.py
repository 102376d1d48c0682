"""Files that a crash or a full disk leaves as they were."""

import errno
import os
import shutil
import threading
from pathlib import Path


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

    Parameters
    ----------
    folder : str or Path
        What it holds is lost; it need not be there.
    fill : callable
        ``fill(new)`` writes into the new folder. Where it fails, `folder` is as before.
    """
    target = Path(os.path.realpath(folder))
    new, old = (target.with_name(f".{target.name}-{os.getpid()}.{k}") for k in ("new", "old"))
    try:
        new.mkdir(parents=True)
        fill(new)
        if target.exists():
            target.rename(old)
        new.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)
