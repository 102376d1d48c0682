"""Files that a crash or a full disk leaves as they were."""

import os
from pathlib import Path


def write(path, data):
    """Write `data` beside `path`, flush it to the disk, and only then take the file's place.

    Parameters
    ----------
    path : str or Path
    data : bytes
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
