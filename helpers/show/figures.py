"""One function per figure; each draws on the Axes it is given."""

import numpy as np

from helpers.show.drawings import FROZEN, LINE
from helpers.study import summarize

# Okabe & Ito's palette, told apart by colour-blind readers; each colour has a marker of its own
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8A8A00"]

MARKERS = "osD^vPX*"

LOOKS = {  # the colour and marker of a technique, the same in all parts
    "linear probing": 0,
    "full fine-tuning": 1,
    "LP-FT": 2,
    "from scratch": 3,
    "top two blocks": 4,
    "top three blocks": 4,
    "LoRA": 5,
    "zero labels": 6,
    "gradual unfreezing": 6,
    "L2-SP": 7,
    "BitFit": 6,
    "adapters": 7,
    "OFT": 3,
    "DoRA": 2,
}

HATCHES = ["", "///", "...", "xxx", "---", "+++", "ooo", "|||"]

STYLE = {
    "figure.dpi": 100,
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "font.size": 10,
}


def look(name, i=0):
    """Return colour and marker of a technique, or the `i`-th of others.

    Parameters
    ----------
    name : str
        A technique, perhaps with a comma and a setting after it.
    i : int, default=0

    Returns
    -------
    dict of str to str
    """
    i = LOOKS.get(name.split(",")[0], i % len(COLOURS))
    return {"color": COLOURS[i], "marker": MARKERS[i]}


def plot_classes(ax, points, y, *, names=None, filled=True):
    """Scatter rows in a plane, one colour and marker for each class.

    Parameters
    ----------
    ax : Axes
    points : array of shape (n, 2)
    y : array of shape (n,)
        Labels 0..C-1, at most 8 classes.
    names : sequence of str, optional
        What the classes are called; None is "class 0" and so on.
    filled : bool, default=True
        Hollow markers tell a second domain from the first in the same Axes.
    """
    for c in sorted(set(y.tolist())):
        ax.scatter(
            *points[y == c].T,
            s=22,
            marker=MARKERS[c],
            facecolor=COLOURS[c] if filled else "none",
            edgecolor=COLOURS[c],
            linewidth=0.9,
            label=names[c] if names else f"class {c}",
        )
    ax.set(xlabel="first principal component", ylabel="second principal component")


def plot_dots(ax, gains, *, notes=None):
    """Draw one row for each technique, the best at the top: its gain and 95 % interval.

    Parameters
    ----------
    ax : Axes
    gains : dict of str to Comparison
        Each technique against the same reference, which is the line at 0.
    notes : dict of str to str, optional
        What is written after a technique's name.
    """
    order = sorted(gains, key=lambda name: gains[name].difference)
    for row, name in enumerate(order):
        c, style = gains[name], look(name) if name in LOOKS else {"color": LINE, "marker": "o"}
        arms = [[c.difference - c.low], [c.high - c.difference]]
        bar = dict(fmt=style["marker"], color=style["color"], linewidth=1.8, markersize=7)
        ax.errorbar(c.difference, row, xerr=arms, **bar)
    ax.axvline(0, color=LINE, linestyle=":", linewidth=1.2)
    labels = [f"{name}  {(notes or {}).get(name, '')}".strip() for name in order]
    ax.set(yticks=range(len(order)), yticklabels=labels, ylim=(-0.6, len(order) - 0.4))
    ax.grid(False, axis="y")


def plot_seeds(ax, results, *, marks=None):
    """Draw one row for each method: a dot for each seed, the mean and its 95 % interval.

    Parameters
    ----------
    ax : Axes
    results : dict of str to array of shape (n,)
        As `helpers.study.run_seeds` returns.
    marks : dict of str to float, optional
        A published value of each method, marked by a star.
    """
    for row, (name, summary) in enumerate(summarize(results).items()):
        heights = row + 0.22 * np.random.default_rng(0).uniform(-1, 1, summary.n)
        dots = dict(s=12, alpha=0.35, color=COLOURS[0], edgecolor="none")
        ax.scatter(results[name], heights, label="one seed" if row == 0 else None, **dots)
        arms = [[summary.mean - summary.low], [summary.high - summary.mean]]
        bar = dict(xerr=arms, color="black", linewidth=2, marker="|", markersize=12, zorder=3)
        label = "mean, 95 % interval" if row == 0 else None
        ax.errorbar(summary.mean, row, label=label, **bar)
        if name in (marks or {}):
            star = dict(marker="*", s=130, color=COLOURS[1], edgecolor="white", zorder=4)
            ax.scatter(marks[name], row - 0.34, label="published" if row == 0 else None, **star)
    ax.set(yticks=range(len(results)), yticklabels=results, ylim=(len(results) - 0.5, -0.5))
    ax.set_xlabel("accuracy (%)")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)


def plot_bands(ax, x, curves):
    """Draw mean against x with its 95 % interval as a band, one curve for each technique.

    Parameters
    ----------
    ax : Axes
    x : sequence of float
        Drawn on a logarithmic axis.
    curves : dict of str to list of Summary
        One summary for each entry of `x`, or None where there is none; a single one has arms in
        place of a band. Each curve is a little to the right of the one before, so that no marker
        hides another.
    """
    for i, (name, curve) in enumerate(curves.items()):
        style = look(name, i) | dict(markersize=5, linewidth=1.6)
        aside = 1.05 ** (i - (len(curves) - 1) / 2)
        at = [(v * aside, s) for v, s in zip(x, curve, strict=True) if s is not None]
        means, low, high = ([getattr(s, k) for _, s in at] for k in ("mean", "low", "high"))
        at = [v for v, _ in at]
        if len(at) > 1:
            ax.fill_between(at, low, high, color=style["color"], alpha=0.2, linewidth=0)
        else:
            ax.vlines(at, low, high, color=style["color"], linewidth=1.6)
        ax.plot(at, means, label=name, **style)
    ax.set(xscale="log", xticks=x, xticklabels=[f"{v:g}" for v in x])
    ax.minorticks_off()


def plot_tradeoff(ax, points):
    """Draw two quantities against each other, with the 95 % interval of each; techniques are lines.

    Parameters
    ----------
    ax : Axes
    points : dict of str to list of tuple of (Summary, Summary)
        For each technique its settings, each with what goes on the x and on the y axis; the first
        one's marker is hollow where there are several.
    """
    for i, (name, pairs) in enumerate(points.items()):
        style = look(name, i) | dict(markersize=6, linewidth=1)
        ax.plot([x.mean for x, _ in pairs], [y.mean for _, y in pairs], label=name, **style)
        hollow = {"markerfacecolor": "white"} if len(pairs) > 1 else {}
        ax.plot(pairs[0][0].mean, pairs[0][1].mean, **style | hollow, zorder=4)
        for x, y in pairs:
            xerr, yerr = ([[v.mean - v.low], [v.high - v.mean]] for v in (x, y))
            ax.errorbar(x.mean, y.mean, yerr, xerr, color=style["color"], linewidth=1)


def plot_grid(ax, values, rows, columns, *, xlabel, ylabel, limits=(None, None)):
    """Draw a table as a heat map with its numbers in the cells.

    Parameters
    ----------
    ax : Axes
    values : array of shape (rows, columns)
        NaN leaves a cell empty.
    rows, columns : sequence
        What the rows and the columns are called.
    xlabel, ylabel : str
        What varies between columns, and between rows.
    limits : tuple of (float, float), optional
        Values at the ends of the colours, for tables that are compared.
    """
    low, high = limits
    image = ax.imshow(values, cmap="viridis", aspect="auto", vmin=low, vmax=high)
    for (row, column), value in np.ndenumerate(np.asarray(values)):
        if np.isnan(value):
            continue
        bright = np.dot(image.to_rgba(value)[:3], (0.299, 0.587, 0.114)) > 0.5
        style = dict(ha="center", va="center", color="black" if bright else "white")
        ax.text(column, row, f"{value:.1f}", **style)
    ax.set(xticks=range(len(columns)), yticks=range(len(rows)), xlabel=xlabel, ylabel=ylabel)
    ax.set(xticklabels=columns, yticklabels=rows)
    ax.grid(False)
    ax.spines[:].set_visible(False)


def plot_guide(ax, lines):
    """Draw the series' guide: one row for each situation, what it gains on each set of texts.

    Parameters
    ----------
    ax : Axes
    lines : dict of (str, str) to dict of str to tuple of (float, float, float)
        Situation and advice, from top to bottom; for each set of texts the gain with the ends of
        its interval. The sets' markers are filled, then hollow.
    """
    for row, gains in enumerate(lines.values()):
        for i, (texts, (gain, low, high)) in enumerate(gains.items()):
            style = dict(color=COLOURS[i], marker=MARKERS[i], markersize=7, linewidth=1.8)
            style["markerfacecolor"] = "white" if i else COLOURS[i]
            at, arms = row + 0.3 * (i - (len(gains) - 1) / 2), [[gain - low], [high - gain]]
            ax.errorbar(gain, at, xerr=arms, label=None if row else texts, **style)
    for row in range(1, len(lines)):
        ax.axhline(row - 0.5, color=FROZEN, linewidth=1, zorder=0)
    ax.axvline(0, color=LINE, linestyle=":", linewidth=1.2)
    names = [f"{situation}:\n{advice}" for situation, advice in lines]
    ax.set(yticks=range(len(lines)), yticklabels=names, ylim=(len(lines) - 0.5, -0.5))
    ax.grid(False, axis="y")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
