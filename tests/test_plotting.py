"""Figures: what is drawn is what was measured, and it can be told apart without colour."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from helpers import plotting
from helpers.freezing import freeze
from helpers.models import MLP
from helpers.study import Summary, summarize


@pytest.fixture
def ax():
    fig, ax = plt.subplots()
    yield ax
    plt.close(fig)


def summaries(*means):
    return [Summary(m, 1.0, m - 1, m + 2, 9) for m in means]


@pytest.fixture
def shown(monkeypatch):
    """Return the Markdown texts that were displayed."""
    texts = []
    monkeypatch.setattr(plotting, "display", lambda output: texts.append(output.data))
    return texts


def test_seeds_are_dots_with_mean_and_interval(ax):
    results = {"a": np.arange(20.0), "b": np.arange(20.0) + 5}
    plotting.plot_seeds(ax, results, marks={"b": 31.0})
    dots = [c.get_offsets() for c in ax.collections if len(c.get_offsets()) == 20]
    for drawn, values in zip(dots, results.values(), strict=True):
        assert np.array_equal(drawn[:, 0], values)
    bars = [c.lines for c in ax.containers]
    for (mean, _, (bar,)), s in zip(bars, summarize(results).values(), strict=True):
        assert mean.get_xdata() == s.mean
        assert bar.get_segments()[0][:, 0] == pytest.approx([s.low, s.high])
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b"]
    assert ax.get_ylim() == (1.5, -0.5)  # the first method on top
    assert [31.0] in [c.get_offsets()[:, 0].tolist() for c in ax.collections]


def test_bands_are_the_intervals(ax):
    plotting.plot_bands(ax, [1, 10], {"m": summaries(3, 5), "n": summaries(4, 4)})
    assert [line.get_ydata().tolist() for line in ax.lines] == [[3, 5], [4, 4]]
    assert ax.collections[0].get_paths()[0].get_extents().intervaly.tolist() == [2, 7]
    assert len({line.get_marker() for line in ax.lines}) == 2 and ax.get_xscale() == "log"


def test_tradeoff_has_both_intervals_and_a_hollow_first_point(ax):
    pairs = list(zip(summaries(1, 2), summaries(8, 9), strict=True))
    plotting.plot_tradeoff(ax, {"m": pairs})
    assert ax.lines[0].get_xydata().tolist() == [[1, 8], [2, 9]]
    assert ax.lines[1].get_markerfacecolor() == "white"
    ends = [bar.get_segments()[0].tolist() for c in ax.containers for bar in c.lines[2]]
    assert [[0, 8], [3, 8]] in ends and [[2, 8], [2, 11]] in ends


def test_frozen_stages_are_hatched_and_counted(ax):
    model = MLP()
    freeze(model.backbone[0])
    plotting.plot_frozen(ax, {"m": model})
    boxes = [bar for container in ax.containers for bar in container]
    assert [bool(box.get_hatch()) for box in boxes] == [True, False, False, False]
    texts = [t.get_text() for t in ax.texts]
    assert texts == ["backbone.0\n1,344", "backbone.2\n4,160", "backbone.4\n2,080", "head\n132"]


def test_classes_have_markers_of_their_own(ax):
    y = np.arange(8)
    plotting.plot_classes(ax, np.c_[y, y], y)
    assert len(ax.collections) == 8 and len(set(plotting.MARKERS)) == 8
    assert len(set(plotting.COLOURS)) == 8 and ax.get_xlabel() and ax.get_ylabel()


def test_losses_start_at_epoch_1(ax):
    plotting.plot_losses(ax, {"m": {"loss": [3.0, 2.0]}, "n": {"loss": [1.0]}})
    assert ax.lines[0].get_xydata().tolist() == [[1, 3], [2, 2]]
    assert len({line.get_linestyle() for line in ax.lines}) == 2 and ax.get_legend()


def test_source_is_shown_whole_but_for_docstrings(shown):
    plotting.show_source(MLP)
    code = shown[0].removeprefix("```python\n").removesuffix("\n```")
    compile(code, "shown", "exec")
    assert '"""' not in code and "nn.Linear(in_features, hidden)," in code and "# (B, in_f" in code


def test_tables_are_markdown(shown):
    plotting.show_table(["a", "b"], [[1, "x"], [2, "y"]])
    assert shown == ["| a | b |\n| --- | --- |\n| 1 | x |\n| 2 | y |"]
