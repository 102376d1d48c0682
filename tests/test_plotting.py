"""Figures: what is drawn is what was measured, and it can be told apart without colour."""

from itertools import combinations, pairwise

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
from matplotlib.colors import same_color, to_hex
from matplotlib.patches import FancyBboxPatch
from matplotlib.text import Text

from helpers.models import MLP, Encoder, TextClassifier
from helpers.peft import Adapter, inject
from helpers.show import costs, drawings, figures, tables
from helpers.study import Comparison, Summary, compare, part1, part2, summarize
from helpers.training import freeze, unfreeze
from tests.small import TinyTransformer


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
    monkeypatch.setattr(tables, "display", lambda output: texts.append(output.data))
    return texts


def test_seeds_are_dots_with_mean_and_interval(ax):
    results = {"a": np.arange(20.0), "b": np.arange(20.0) + 5}
    figures.plot_seeds(ax, results, marks={"b": 31.0})
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


def gains(*differences):
    return [Comparison(d, d - 1, d + 2, 0.01, 0.5, 1.0, 9) for d in differences]


@pytest.fixture
def dots():
    with plt.rc_context(figures.STYLE):
        fig, ax = plt.subplots(figsize=(9, 4.8))
        differences = np.random.default_rng(0).permutation(np.linspace(-3, 7, 14)).tolist()
        found = dict(zip(part2.TECHNIQUES, gains(*differences), strict=True))
        notes = {name: f"({i:,})" for i, name in enumerate(found, 1000) if name != "LoRA"}
        figures.plot_dots(ax, found, notes=notes)
        fig.draw_without_rendering()
        yield ax, found, notes
    plt.close(fig)


def test_dots_are_differences_with_intervals_the_best_at_the_top(dots):
    ax, found, _ = dots
    order = sorted(found, key=lambda name: found[name].difference)
    assert ax.get_ylim()[0] < 0 < 13 < ax.get_ylim()[1]
    for row, (name, bar) in enumerate(zip(order, ax.containers, strict=True)):
        mean, _, (arms,) = bar.lines
        c, [(left, right)] = found[name], [arms.get_segments()[0]]
        assert mean.get_xydata().tolist() == [[c.difference, row]]
        assert [*left, *right] == pytest.approx([c.low, row, c.high, row])
        look = {"color": to_hex(mean.get_color()), "marker": mean.get_marker()}
        plain = {"color": drawings.LINE, "marker": "o"}
        wanted = figures.look(name) if name in figures.LOOKS else plain
        assert look["marker"] == wanted["marker"] and same_color(look["color"], wanted["color"])
        assert same_color(arms.get_color()[0], look["color"])


def test_dots_have_a_line_at_0_and_names_with_notes(dots):
    ax, found, notes = dots
    [line] = [line for line in ax.lines if line.get_linestyle() == ":"]
    assert [*line.get_xdata()] == [0, 0]
    assert [*line.get_ydata()] == [0, 1]  # of the height of the Axes: through all rows
    order = sorted(found, key=lambda name: found[name].difference)
    labels = [f"{name}  {notes[name]}" if name in notes else name for name in order]
    assert [t.get_text() for t in ax.get_yticklabels()] == labels
    assert ax.get_yticks().tolist() == list(range(14)) and "LoRA" in labels


def test_every_dot_is_seen_whole_and_labels_are_apart(dots):
    ax, *_ = dots
    bars = [bar.lines[0] for bar in ax.containers]
    half = bars[0].get_markersize() / 2 * ax.figure.dpi / 72
    places = [ax.transData.transform(bar.get_xydata()[0]) for bar in bars]
    assert all(high[1] - low[1] > 2 * half for low, high in pairwise(places))
    for x, y in places:
        assert all(ax.bbox.contains(x + i * half, y + j * half) for i in (-1, 1) for j in (-1, 1))
    for bar in ax.containers:  # whole intervals are inside, too
        ends = ax.transData.transform(bar.lines[2][0].get_segments()[0])
        assert all(ax.bbox.contains(*end) for end in ends)
    assert_apart(ax.get_yticklabels())
    for label in extents(ax.get_yticklabels()):
        assert all(ax.figure.bbox.contains(*corner) for corner in label.get_points())


def test_dots_need_no_notes(ax):
    figures.plot_dots(ax, dict(zip("ab", gains(2, 1), strict=True)))
    assert [t.get_text() for t in ax.get_yticklabels()] == ["b", "a"]


def test_bands_are_the_intervals(ax):
    figures.plot_bands(ax, [1, 10], {"m": summaries(3, 5), "n": summaries(4, 4)})
    assert [line.get_ydata().tolist() for line in ax.lines] == [[3, 5], [4, 4]]
    assert ax.collections[0].get_paths()[0].get_extents().intervaly.tolist() == [2, 7]
    assert len({line.get_marker() for line in ax.lines}) == 2 and ax.get_xscale() == "log"


def test_a_curve_has_no_point_where_there_is_no_summary(ax):
    a, b, c = summaries(3, 5, 4)
    figures.plot_bands(ax, [1, 4, 16], {"m": [a, None, b], "n": [None, c, None]})
    assert [line.get_ydata().tolist() for line in ax.lines] == [[3, 5], [4]]
    first, second = (line.get_xdata() for line in ax.lines)
    aside = second[0] / 4  # a curve lies beside the one before, as far to the right as that left
    assert 1 < aside < 1.1 and first * aside == pytest.approx([1, 16])
    band, arms = ax.collections
    assert band.get_paths()[0].get_extents().intervaly.tolist() == [2, 7]
    assert arms.get_segments()[0].tolist() == [[second[0], 3], [second[0], 6]]
    assert same_color(arms.get_color()[0], ax.lines[1].get_color())
    assert [t.get_text() for t in ax.get_xticklabels()] == ["1", "4", "16"]
    with pytest.raises(ValueError, match="shorter"):
        figures.plot_bands(ax, [1, 4], {"m": [a]})


def test_a_technique_looks_the_same_in_every_figure(ax):
    names = list(figures.LOOKS)
    x, y = summaries(3, 5)
    drawn = {}
    for order in (names, names[::-1], [f"{name}, top two" for name in names]):
        for draw in (
            lambda order: figures.plot_bands(ax, [1, 4], {name: [x, y] for name in order}),
            lambda order: figures.plot_tradeoff(ax, {name: [(x, y)] for name in order}),
        ):
            ax.clear()
            draw(order)
            for line in ax.lines:
                look = to_hex(line.get_color()).upper(), line.get_marker()
                if line.get_label().partition(",")[0] in names:
                    drawn.setdefault(line.get_label().partition(",")[0], set()).add(look)
    expected = [(figures.COLOURS[i], figures.MARKERS[i]) for i in figures.LOOKS.values()]
    assert [drawn[name] for name in names] == [{look} for look in expected]


def test_other_techniques_go_by_their_place_and_settings_share_a_look():
    looks = [figures.look(f"method {i}", i) for i in range(9)]
    assert [look["color"] for look in looks] == [*figures.COLOURS, figures.COLOURS[0]]
    assert figures.look("LP-FT, 0.0003", 5) == figures.look("LP-FT", 0) != figures.look("LP", 0)


CURVE = ["linear probing", *part1.CURVE, "from scratch"]
PLAN = part1.plan_of("headlines", dict.fromkeys(part1.RATES, 1.0))
AT_4 = [column.removesuffix("/4") for column, (_, k, _) in PLAN.items() if k == 4]
# both rates of one are joined; what is trained from scratch has nothing to forget
TUNED = {column.removesuffix(", 3 x rate") for column in AT_4} - {"from scratch"}


@pytest.mark.parametrize("names", [CURVE, TUNED], ids=["label curve", "forgetting"])
def test_techniques_of_a_figure_are_told_apart(names):
    looks = {tuple(figures.look(name, i).values()) for name in names for i in range(8)}
    assert len(looks) == len(names)  # whatever their places
    assert TUNED | {"from scratch"} == part1.FIRST.keys() and set(part1.REMEDIES) < TUNED


def test_tradeoff_has_both_intervals_and_a_hollow_first_point(ax):
    pairs = list(zip(summaries(1, 2), summaries(8, 9), strict=True))
    figures.plot_tradeoff(ax, {"m": pairs})
    assert ax.lines[0].get_xydata().tolist() == [[1, 8], [2, 9]]
    assert ax.lines[1].get_markerfacecolor() == "white"
    ends = [bar.get_segments()[0].tolist() for c in ax.containers for bar in c.lines[2]]
    assert [[0, 8], [3, 8]] in ends and [[2, 8], [2, 11]] in ends


def test_frozen_stages_are_hatched_and_counted(ax):
    model = MLP()
    freeze(model.backbone[0])
    drawings.plot_frozen(ax, {"m": model})
    boxes = [bar for container in ax.containers for bar in container]
    assert [bool(box.get_hatch()) for box in boxes] == [True, False, False, False]
    texts = [t.get_text() for t in ax.texts]
    assert texts == ["backbone.0\n1,344", "backbone.2\n4,160", "backbone.4\n2,080", "head\n132"]


def test_classes_have_markers_of_their_own(ax):
    y = np.arange(8)
    figures.plot_classes(ax, np.c_[y, y], y)
    assert len(ax.collections) == 8 and len(set(figures.MARKERS)) == 8
    assert len(set(figures.COLOURS)) == 8 and ax.get_xlabel() and ax.get_ylabel()


def test_classes_are_called_by_their_names(ax):
    y = np.array([2, 0, 2])
    figures.plot_classes(ax, np.c_[y, y], y, names=["sport", "tech", "business"])
    figures.plot_classes(ax, np.c_[y, y], y, filled=False)
    labels = [c.get_label() for c in ax.collections]
    assert labels == ["sport", "business", "class 0", "class 2"]
    assert [len(c.get_offsets()) for c in ax.collections] == [1, 2, 1, 2]
    assert [len(c.get_facecolor()) for c in ax.collections] == [1, 1, 0, 0]
    assert same_color(ax.collections[1].get_facecolor()[0], figures.COLOURS[2])


@pytest.mark.parametrize("low, high, p, marked", [
    (1.0, 3.0, 0.01, "+2.0 [+1.0, +3.0] ▲"),
    (-3.0, -1.0, 0.01, "-2.0 [-3.0, -1.0] ▼"),
    (-1.0, 5.0, 0.01, "+2.0 [-1.0, +5.0]"),
    (1.0, 3.0, 0.05, "+2.0 [+1.0, +3.0]"),
])  # fmt: skip
def test_a_difference_in_a_table_is_marked_with_its_sign(low, high, p, marked):
    assert Comparison((low + high) / 2, low, high, p, 0.5, 1.0, 9).marked == marked


def test_source_is_shown_whole_but_for_docstrings(shown):
    tables.show_source(MLP)
    code = shown[0].removeprefix("```python\n").removesuffix("\n```")
    compile(code, "shown", "exec")
    assert '"""' not in code and "nn.Linear(in_features, hidden)," in code and "# (B, in_f" in code


def test_tables_are_markdown(shown):
    tables.show_table(["a", "b"], [[1, "x"], [2, "y"]])
    assert shown == ["| a | b |\n| --- | --- |\n| 1 | x |\n| 2 | y |"]


LINEAR = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
PARALLEL = {"reduction_factor": 4, "parallel": True}


def top(model):
    return model.encoder.blocks[1:]


def lora_everywhere(model):
    inject.inject_lora(model, [*LINEAR, "head"], r=4)


TECHNIQUES = {  # how to inject it, and the symbols that must be drawn
    "probing": (lambda m: None, ""),
    "full": (unfreeze, ""),
    "top two": (lambda m: unfreeze(top(m)), ""),
    "LoRA on q, v": (lambda m: inject.inject_lora(top(m), ["q_proj", "v_proj"]), "BA" * 2),
    "LoRA": (lambda m: inject.inject_lora(top(m), LINEAR), "BA" * 6),
    "LoRA everywhere": (lora_everywhere, "BA" * 7),
    "DoRA": (lambda m: inject.inject_dora(m, [*LINEAR, "head"], r=4), "mBA" * 7),
    "VeRA": (lambda m: inject.inject_vera(top(m), LINEAR), "vBuA" * 6),
    "OFT": (lambda m: inject.inject_oft(top(m), LINEAR), "R" * 6),
    "IA3": (
        lambda m: inject.inject_ia3(top(m), ["k_proj", "v_proj"], feedforward=["fc2"]),
        "lll",
    ),
    "Houlsby": (lambda m: inject.inject_adapter(top(m), ["out_proj", "fc2"]), "UD" * 2),
    "Pfeiffer": (lambda m: inject.inject_adapter(top(m), ["fc2"]), "UD"),
    "parallel": (lambda m: inject.inject_adapter(top(m), ["feed_forward"], **PARALLEL), "UD"),
    "parallel, both": (
        lambda m: inject.inject_adapter(top(m), ["attention", "feed_forward"], **PARALLEL),
        "UD" * 2,
    ),
    "BitFit": (inject.inject_bitfit, "b" * 7 + "β" * 3),
    "BitFit on top": (lambda m: inject.inject_bitfit(top(m)), "b" * 6 + "β" * 2),
    "LayerNorm": (inject.inject_layer_norm, ["γ, β"] * 3),
    "LayerNorm on top": (lambda m: inject.inject_layer_norm(top(m)), ["γ, β"] * 2),
    "prompt": (lambda m: inject.inject_prompt(m, ["embed"]), "P"),
    "prefix": (lambda m: inject.inject_prefix(top(m), ["attention"]), ["P_k", "P_v"]),
}


@pytest.fixture
def wide():
    with plt.rc_context(figures.STYLE):
        fig, ax = plt.subplots(figsize=(9, 2.6))
        yield ax
    plt.close(fig)


def classifier(n_layers=3):
    model = TextClassifier(Encoder(vocab=9, d=32, n_layers=n_layers, n_heads=4, d_ff=64), 4)
    freeze(model)
    return model


def injected(technique, n_layers=3):
    model = classifier(n_layers)
    TECHNIQUES[technique][0](model)
    unfreeze(model.head)
    return model


def symbols(ax):
    """Return the formulas drawn, each with its place in data coordinates."""
    plain = [(t.get_text().replace(r"\gamma", "γ").replace(r"\beta", "β"), t) for t in ax.texts]
    return [(text.strip("$"), *t.get_position()) for text, t in plain if text.startswith("$")]


def boxes(ax):
    return {patch.get_gid(): patch for patch in ax.patches if patch.get_gid()}


def colour_at(ax, x, y):
    """Return the colour of the highest filled patch at a place, in data coordinates."""
    here = [p for p in ax.patches if p.get_facecolor()[3] and p.get_bbox().contains(x, y)]
    return to_hex(max(here, key=lambda p: p.get_zorder()).get_facecolor()).upper()


def extents(artists):
    """Return where artists are in pixels, each half a pixel smaller all around."""
    drawn = [Text.get_window_extent(a) if isinstance(a, Text) else a for a in artists]
    return [(a if hasattr(a, "x0") else a.get_window_extent()).padded(-0.5) for a in drawn]


def assert_apart(artists):
    for a, b in combinations(extents(artists), 2):
        assert not a.overlaps(b)


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_each_technique_is_drawn_whole_and_nothing_overlaps(wide, technique):
    drawings.plot_injected(wide, injected(technique))
    wide.figure.draw_without_rendering()
    assert sorted(s for s, *_ in symbols(wide)) == sorted(TECHNIQUES[technique][1])
    texts = [*wide.texts, *wide.get_legend().get_texts()]
    assert_apart(texts)
    assert all(
        wide.figure.bbox.fully_contains(*corner)
        for t in extents(texts)
        for corner in t.get_points()
    )
    assert min(t.get_fontsize() for t in texts) >= 8
    _, *small = [p for p in wide.patches if isinstance(p, FancyBboxPatch)]
    if technique.startswith(
        ("BitFit", "LayerNorm")
    ):  # strips lie in the boxes, other adapters outside
        outer = [box.get_bbox() for box in boxes(wide).values()]
        for strip in small:
            corners = strip.get_bbox().get_points()
            assert any(all(box.contains(*corner) for corner in corners) for box in outer)
    else:
        dots = [t for t in wide.texts if t.get_text() == "⋯"]
        sums = [line for line in wide.lines if line.get_marker() == "o"]
        tokens = [p for p in wide.patches if p.get_width() == 7]
        plain = [p for p in wide.patches if same_color(p.get_facecolor(), "white")]
        assert len(plain) == 2  # softmax and mean
        assert_apart([*small, *boxes(wide).values(), *plain, *dots, *sums, *tokens])
    for box in boxes(wide).values():
        label = box.get_gid().rpartition(".")[2]
        [name] = extents(t for t in wide.texts if t.get_text() == label)
        assert all(box.get_window_extent().contains(*corner) for corner in name.get_points())
    assert wide.get_legend().get_texts()[0].get_text() == "trained"


def orange(ax):
    return {name for name, box in boxes(ax).items() if same_color(box.get_facecolor(), "#E69F00")}


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_orange_is_what_is_trained(wide, technique):
    model = injected(technique)
    drawings.plot_injected(wide, model)
    trained = [n.replace(".base.", ".") for n, p in model.named_parameters() if p.requires_grad]
    plain = [n for n in trained if n.endswith((".weight", ".bias"))]  # not up_weight, tuned_bias
    layers_ = {box for box in drawings.BOXES for n in plain if f".{box}." in f".{n}"}
    assert orange(wide) == layers_
    hatched = {name for name, box in boxes(wide).items() if box.get_hatch() == "////"}
    assert hatched == drawings.BOXES.keys() - layers_
    colours = {(s, colour_at(wide, x, y)) for s, x, y in symbols(wide) if "P" not in s}
    grey = {s for s, colour in colours if colour == drawings.FROZEN}
    assert grey == ({"A", "B"} if technique == "VeRA" else set())
    assert {s for s, c in colours if c == drawings.TRAINED} == {s for s, _ in colours} - grey
    tokens = [p for p in wide.patches if p.get_width() == 7]
    assert all(same_color(p.get_facecolor(), drawings.TRAINED) for p in tokens)
    assert len(tokens) == 3 * sum("P" in s for s, *_ in symbols(wide))


def test_layers_trained_beside_an_adapter_are_orange(wide):
    model = injected("LoRA")
    for block in top(model):
        unfreeze(block.norm1)
    unfreeze(model.encoder.embed.position)
    freeze(model.head)
    drawings.plot_injected(wide, model)
    assert orange(wide) == {"norm1", "embed"}


@pytest.mark.parametrize("technique", ["LoRA", "OFT", "IA3", "Houlsby", "BitFit"])
def test_adapters_are_grey_once_they_are_frozen(wide, technique):
    model = injected(technique)
    drawings.plot_injected(wide, model)
    assert {colour_at(wide, x, y) for _, x, y in symbols(wide)} == {drawings.TRAINED}
    freeze(model)
    wide.clear()
    drawings.plot_injected(wide, model)
    assert {colour_at(wide, x, y) for _, x, y in symbols(wide)} == {drawings.FROZEN}


def places(ax, technique, name):
    """Return each symbol's place from the left, and above the middle, of a layer's box."""
    drawings.plot_injected(ax, injected(technique))
    left, right, middle = drawings.BOXES[name]
    return {
        s: ((x - left) / (right - left), y - middle)
        for s, x, y in symbols(ax)
        if abs(x - (left + right) / 2) < 40
    }


@pytest.mark.parametrize("technique, name, symbol, side", [
    ("LoRA", "feed_forward.fc2", "A", "under"),
    ("VeRA", "attention.out_proj", "v", "under"),
    ("DoRA", "attention.out_proj", "B", "under"),
    ("DoRA", "attention.out_proj", "m", "after"),
    ("OFT", "attention.out_proj", "R", "before"),
    ("IA3", "feed_forward.fc2", "l", "before"),
    ("IA3", "attention.v_proj", "l", "after"),
    ("Houlsby", "feed_forward.fc2", "U", "after"),
    ("prompt", "embed", "P", "under"),
    ("prefix", "attention.v_proj", "P_v", "under"),
])  # fmt: skip
def test_adapters_are_where_their_class_puts_them(wide, technique, name, symbol, side):
    x, y = places(wide, technique, name)[symbol]
    if side == "under":
        assert -0.1 < x < 1.1 and -21 < y < -14
    else:
        assert y in (0, 36) and (x < 0 if side == "before" else x > 1)


def test_a_parallel_adapter_spans_what_it_wraps(wide):
    drawings.plot_injected(wide, injected("parallel"))
    [line] = [
        w for w in wide.lines if w.get_color() == drawings.TRAINED and len(w.get_xdata()) == 4
    ]
    xs, ys = line.get_data()
    fc1, fc2 = (drawings.BOXES[f"feed_forward.{name}"] for name in ("fc1", "fc2"))
    assert xs[0] == xs[1] < fc1[0] and xs[2] == xs[3] > fc2[1] and ys[0] == ys[3] == 0
    (_, up, y), (_, down, _) = symbols(wide)
    assert fc1[1] < up < down < fc2[0] and y == ys[1] == ys[2] < -8


ALL_BUT_ONE = "block 2 of 4, same for blocks 3 and 4; block 1: frozen"


@pytest.mark.parametrize("n, adapted, text, dots", [
    (1, [0], "block 1 of 1", ""),
    (2, [1], "block 2 of 2; block 1: frozen", "<"),
    (4, [0], "block 1 of 4; blocks 2 to 4: frozen", ">"),
    (4, [1], "block 2 of 4; blocks 1 and 3 and 4: frozen", "<>"),
    (4, [1, 2, 3], ALL_BUT_ONE, "<>"),
    (4, [0, 1, 2, 3], "block 1 of 4, same for blocks 2 to 4", ">"),
    (6, [4, 5], "block 5 of 6, same for block 6; blocks 1 to 4: frozen", "<>"),
    (4, [], "block 4 of 4, same for blocks 1 to 3", "<"),
])  # fmt: skip
def test_the_first_adapted_block_stands_for_all(wide, n, adapted, text, dots):
    model = classifier(n)
    if adapted:
        inject.inject_adapter(model, [f"blocks.{i}.attention.out_proj" for i in adapted])
    drawings.plot_injected(wide, model)
    assert text in [t.get_text() for t in wide.texts]
    assert len(symbols(wide)) == 2 * bool(adapted)
    [frame, *_] = [p.get_bbox() for p in wide.patches if isinstance(p, FancyBboxPatch)]
    places = [t.get_position()[0] for t in wide.texts if t.get_text() == "⋯"]
    assert sorted("<" if x < frame.x0 else ">" for x in places) == sorted(dots)
    assert not any(frame.x0 < x < frame.x1 for x in places)


@pytest.mark.parametrize("trained, text", [
    ([2, 3], "block 4 of 4, same for block 3; blocks 1 and 2: frozen"),
    ([0, 1, 2, 3], "block 4 of 4, same for blocks 1 to 3"),
])  # fmt: skip
def test_without_adapters_the_last_block_is_drawn(wide, trained, text):
    model = classifier(4)
    unfreeze(*(model.encoder.blocks[i] for i in trained))
    drawings.plot_injected(wide, model)
    assert text in [t.get_text() for t in wide.texts]
    assert orange(wide) == drawings.BOXES.keys() - {"embed", "head"}


def test_each_norm_follows_its_sum(wide):
    drawings.plot_injected(wide, injected("probing"))
    sums = [line.get_xdata()[0] for line in wide.lines if line.get_marker() == "+"]
    forks = [w.get_xdata() for w in wide.lines if w.get_ydata().tolist() == [0, 54, 54, 0]]
    box = {name: (left, right) for name, (left, right, _) in drawings.BOXES.items()}
    order = [
        (forks[0][0], box["attention.q_proj"][0], box["attention.out_proj"][1], sums[0]),
        (sums[0], *box["norm1"], forks[1][0], box["feed_forward.fc1"][0]),
        (box["feed_forward.fc2"][1], sums[1], *box["norm2"], box["head"][0]),
    ]
    assert order == [tuple(sorted(places)) for places in order]
    assert [x[-1] for x in forks] == sums


def test_an_encoder_alone_has_no_head(wide):
    drawings.plot_injected(wide, injected("LoRA").encoder)
    assert boxes(wide).keys() == drawings.BOXES.keys() - {"head"}
    assert not {"mean", "head"} & {t.get_text() for t in wide.texts}
    assert sorted(s for s, *_ in symbols(wide)) == sorted("BA" * 6)


class Other(Adapter):
    pass


def block_differs(model):  # beside the adapters of one block, another trains
    inject.inject_lora(model.encoder.blocks[0], ["q_proj"])
    unfreeze(model.encoder.blocks[1].norm2)


def rank_differs(model):  # the same tensors, another rank
    for i, block in enumerate(model.encoder.blocks):
        inject.inject_lora(block, ["q_proj"], r=4 + i)


def frozen_rank_differs(model):
    rank_differs(model)
    freeze(model)


def place_differs(model):
    for block, name in zip(model.encoder.blocks[1:], ["q_proj", "v_proj"], strict=True):
        inject.inject_lora(block, [name])


def another_kind(model):
    model.encoder.blocks[0].norm1 = Other(model.encoder.blocks[0].norm1)


def around_a_block(model):
    inject.inject_adapter(model, ["blocks.1", "blocks.2"])


@pytest.mark.parametrize("change, told", [
    (lambda m: unfreeze(m.encoder.blocks[1].norm2), "blocks differ"),
    (block_differs, "blocks differ"),
    (rank_differs, "blocks differ"),
    (frozen_rank_differs, "blocks differ"),
    (place_differs, "blocks differ"),
    (another_kind, "no drawing of Other at 'norm1'"),
    (around_a_block, r"no drawing of BottleneckAdapter at 'blocks\.1'"),
    (lambda m: inject.inject_layer_norm(m, ["token"]), "no drawing of Tuned at 'embed.token'"),
])  # fmt: skip
def test_what_would_be_drawn_wrongly_is_refused(wide, change, told):
    model = classifier()
    with pytest.raises(ValueError, match=told):
        change(model)
        drawings.plot_injected(wide, model)


@pytest.mark.parametrize("make", [MLP, TinyTransformer])
def test_other_models_are_not_drawn(wide, make):
    with pytest.raises(ValueError, match=f"{make.__name__} is not drawn"):
        drawings.plot_injected(wide, make())


def test_memory_is_stacked_and_summed(ax):
    parts = {"a": {"weights": 1e6, "gradients": 5e5}, "b": {"weights": 1e6, "activations": 31250}}
    costs.plot_memory(ax, parts)
    bars = {c.get_label(): [(b.get_x(), b.get_width()) for b in c] for c in ax.containers}
    assert bars == {
        "weights": [(0, 1), (0, 1)],
        "gradients": [(1, 0.5), (1, 0)],
        "activations": [(1.5, 0), (1, 0.03125)],
    }
    assert [t.get_text() for t in ax.texts] == ["1.5 MB", "1.03 MB"]
    assert [t.xy for t in ax.texts] == [
        (1.5, 0),
        (1.03125, 1),
    ] and ax.get_xlabel() == "memory (MB)"
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b"]
    looks = [(c[0].get_facecolor(), c[0].get_hatch()) for c in ax.containers]
    assert all(len(set(column)) == 3 for column in zip(*looks, strict=True))
    assert [t.get_text() for t in ax.get_legend().get_texts()] == list(bars)


@pytest.mark.parametrize(
    "size, text",
    [(1, "0.001 kB"), (999, "0.999 kB"), (123456, "123 kB"), (2e9, "2 GB"), (4e12, "4,000 GB")],
)
def test_the_largest_total_chooses_the_unit(ax, size, text):
    costs.plot_memory(ax, {"a": {"weights": size}})
    assert ax.texts[0].get_text() == text


def test_grid_has_its_numbers_in_its_cells(ax):
    values = np.array([[1.26, 20, 30], [40, 50, 60]])
    figures.plot_grid(ax, values, ["a", "b"], [1, 2, 4], xlabel="rank", ylabel="rate")
    drawn = {t.get_position(): t.get_text() for t in ax.texts}
    assert drawn == {(c, r): f"{values[r, c]:.1f}" for r in range(2) for c in range(3)}
    assert np.array_equal(ax.images[0].get_array(), values)
    assert ax.images[0].get_clim() == (1.26, 60)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["1", "2", "4"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("rank", "rate")
    for text, value in zip(ax.texts, values.flat, strict=True):
        paper = np.dot(ax.images[0].to_rgba(value)[:3], (0.299, 0.587, 0.114))
        ink = {"black": 0, "white": 1}[text.get_color()]
        assert abs(paper - ink) >= 0.5


def test_grids_that_are_compared_share_their_colours(ax):
    limits, names = (0, 80), {"xlabel": "rank", "ylabel": "rate"}
    figures.plot_grid(ax, [[10, 20]], ["a"], [1, 2], **names, limits=limits)
    assert ax.images[0].get_clim() == limits


def test_a_grids_cell_without_a_value_stays_empty(ax):
    values = [[10.0, float("nan")]]
    figures.plot_grid(ax, values, ["a"], [1, 2], xlabel="", ylabel="", limits=(0, 80))
    assert [(t.get_position(), t.get_text()) for t in ax.texts] == [((0, 0), "10.0")]


def test_a_stored_table_is_read_and_a_missing_one_is_named(tmp_path):
    path = tmp_path / "a.ipynb"
    table = "| k | a | b |\n| --- | --- | --- |\n| x | 1 |  |\n| y |  | +2.0 [1, 3] ▲ |"
    output = nbformat.v4.new_output("display_data", {"text/markdown": table})
    cells = [nbformat.v4.new_code_cell(id=name) for name in ("with", "without")]
    cells[0].outputs = [nbformat.v4.new_output("stream", text="no table"), output, output]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    found, again = tables.read_table("a.ipynb", "with", folder=tmp_path)
    assert found == again and (found["x", "a"], found["x", "b"]) == ("1", "")
    assert (found["y", "k"], found["y", "b"]) == ("y", "+2.0 [1, 3] ▲")
    for name, cell in (("a.ipynb", "without"), ("b.ipynb", "with")):
        with pytest.raises(ValueError, match=f"{name} has no table in a cell '{cell}': store it"):
            tables.read_table(name, cell, folder=tmp_path)


@pytest.mark.parametrize("a, b", [([1.0, 4, 3, 6, 2], [0.0] * 5), ([0.0] * 5, [9.0, 7, 8, 6, 5])])
def test_a_cell_gives_back_the_difference_that_was_printed(a, b):
    c = compare(a, b)
    found = tables.read_gain(c.marked)
    assert np.allclose(found, (c.difference, c.low, c.high), atol=0.05)
    for text in ("", "81.2 [80.1, 82.3]", "better"):
        with pytest.raises(ValueError, match="is no difference with its interval"):
            tables.read_gain(text)


def test_what_fits_is_coloured_by_the_smallest_budget_that_holds_it(ax):
    totals = {"small": {"full": 9e9, "LoRA": 8e9}, "large": {"full": 9.1e11, "LoRA": 3e10}}
    costs.plot_fits(ax, totals, (8, 24, 80))
    shade = {p.get_xy(): to_hex(p.get_facecolor()) for p in ax.patches}
    legend = {t.get_text(): to_hex(p.get_facecolor()) for t, p in zip(
        ax.get_legend().get_texts(), ax.get_legend().get_patches(), strict=True)}  # fmt: skip
    fits = {(0, 0): "fits in 24 GB", (1, 0): "fits in 8 GB", (0, 1): "in none",
            (1, 1): "fits in 80 GB"}  # fmt: skip
    assert {at: shade[at[0] - 0.5, at[1] - 0.5] for at in fits} == {
        at: legend[name] for at, name in fits.items()
    }
    assert len(set(legend.values())) == 4
    assert sorted(t.get_text() for t in ax.texts) == ["30 GB", "8 GB", "9 GB", "910 GB"]


def test_a_guide_shows_each_gain_with_its_interval_on_both_sets(ax):
    lines = {
        ("1 label", "guess"): {"a": (22.0, 16.0, 27.0), "b": (4.0, -1.0, 11.0)},
        ("8 labels", "LoRA"): {"a": (4.0, 2.0, 7.0), "b": (1.0, 0.0, 3.0)},
    }
    figures.plot_guide(ax, lines)
    bars = [c.lines[2][0].get_segments()[0] for c in ax.containers]
    spans = [tuple(bar[:, 0]) for bar in bars]
    assert spans == [(16, 27), (-1, 11), (2, 7), (0, 3)]
    heights = [bar[0, 1] for bar in bars]
    assert len(set(heights)) == 4 and [round(h) for h in heights] == [0, 0, 1, 1]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["1 label:\nguess", "8 labels:\nLoRA"]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["a", "b"]
    faces = [c.lines[0].get_markerfacecolor() for c in ax.containers]
    assert faces[0] == faces[2] != faces[1] == faces[3]
