"""What a process has one of, torch's random stream and default dtype: set, and put back."""

import threading
from contextlib import contextmanager

import torch

LOCK = threading.RLock()  # whoever sets what the whole process has is alone in it


@contextmanager
def reproducible(seed, *, dtype=torch.float64):
    """Compute in `dtype` from torch's global stream seeded with `seed`; restore both afterwards.

    float64 from the first draw keeps the drift between processors far below what is printed.
    Dtype and stream belong to the process, so only one thread at a time is inside: others wait,
    and a thread that is inside must not wait for one that wants to be.

    Parameters
    ----------
    seed : int
    dtype : torch.dtype, default=torch.float64

    Yields
    ------
    None
    """
    with LOCK, torch.random.fork_rng(devices=[]):
        before = torch.get_default_dtype()
        torch.manual_seed(seed)
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
