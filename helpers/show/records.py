"""What a run is about: the values that a sweep collects, one call in a notebook."""

import math

from IPython.display import display

from helpers.outputs import RECORD


def record(**values):
    """Display values as a notebook output from which `helpers.sweep` makes its table.

    Floats are kept to six significant digits, so that a stored output stays as it is on another
    processor; what that would not hold for does not belong into a stored output.

    Parameters
    ----------
    **values : int, float, bool or str
        By name; scalars of numpy and torch count as numbers.

    Raises
    ------
    ValueError
        If there are none, or one is no finite number and no text.
    """
    plain = {name: _plain(name, value) for name, value in values.items()}
    if not plain:
        raise ValueError("record() has nothing to record: name a value, as in record(accuracy=81)")
    text = "Recorded: " + ", ".join(f"{name} = {value}" for name, value in plain.items())
    display({RECORD: plain, "text/plain": text}, raw=True)


def _plain(name, value):
    """Return a value as JSON has it."""
    plain = value.item() if getattr(value, "ndim", None) == 0 else value
    if not isinstance(plain, int | float | str):
        raise ValueError(f"{name} is of type {type(value).__name__}: record one number or text")
    if isinstance(plain, float):
        if not math.isfinite(plain):
            raise ValueError(f"{name} = {plain} is not finite, and cannot be compared: record why")
        plain = float(f"{plain:.6g}")
    return plain
