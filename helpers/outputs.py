"""What a run has shown: streams as a terminal has them, values recorded, a kernel's last words."""

RECORD = "application/vnd.transfer-peft.record+json"  # what a run is about, for sweeps


class NotebookError(Exception):
    """A notebook, or a request about one, that cannot be accepted; the message says why."""


def joined(outputs):
    """Return outputs with each stream in one piece, as a terminal shows its carriage returns.

    In linear time, which nbclient's own way is not for long lines.

    Parameters
    ----------
    outputs : list of NotebookNode

    Returns
    -------
    list of NotebookNode
    """
    kept, streams = [], {}
    for output in outputs:
        name = output.get("name")
        if name not in streams:
            kept.append(output)
        if name:
            streams.setdefault(name, []).append(output.text)
    for output in kept:
        if name := output.get("name"):
            lines = "".join(streams[name]).split("\n")
            output.text = "\n".join(x[x.rstrip("\r").rfind("\r") + 1 :] for x in lines)
    return kept


def recorded(outputs):
    """Return what was recorded in the outputs of a run.

    Parameters
    ----------
    outputs : iterable of dict

    Returns
    -------
    dict of str to int, float, bool or str

    Raises
    ------
    NotebookError
        If nothing was, or a name twice.
    """
    found = {}
    for values in (o["data"][RECORD] for o in outputs if RECORD in o.get("data", {})):
        if twice := sorted(set(values) & set(found)):
            raise NotebookError(f"recorded {twice[0]!r} twice: one run has one value of a name")
        found |= values
    if not found:
        raise NotebookError("recorded nothing: call helpers.show.record(name=value) in one cell")
    return found


def last_words(words):
    """Cut what a dead kernel said to the part that tells why.

    Parameters
    ----------
    words : str

    Returns
    -------
    str
    """
    if (at := words.find("Fatal Python error")) >= 0:
        return words[at : at + 1500]
    return words[-1500:] or "none (out of memory?)"
