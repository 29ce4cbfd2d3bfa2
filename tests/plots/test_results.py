import itertools
import math

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex
from test_summary import costs_frame, runs_frame

from famba import plots
from famba.analysis import summary
from famba.analysis.calibration import Plan
from famba.fusion.strategies import STRATEGIES
from famba.params import AdaptiveRule
from famba.plots import style
from famba.plots.claims import forest
from famba.plots.style import PALETTE


@pytest.fixture
def runs():
    return runs_frame({"upper": [89.0, 94.0, 90.0], "none": [90.0, 96.0, 93.0], "all": [80.0, 82.0, 81.0]})


@pytest.fixture
def table(runs):
    return summary.summary(runs, costs_frame())


@pytest.fixture
def schedules():
    return summary.schedule_frame({"upper": [0, 0, 4], "none": [0, 0, 0], "all": [2, 2, 2]}, tokens=17)


@pytest.fixture
def history():
    runs = itertools.product(["none", "upper"], [0, 1, 2], [1, 2, 3])
    frame = pd.DataFrame(runs, columns=["strategy", "seed", "epoch"])
    seed, epoch = frame["seed"], frame["epoch"]
    return frame.assign(train_loss=4 / epoch + seed, val_loss=5 / epoch + seed, val_top1_percent=30.0 * epoch + seed)


@pytest.fixture
def benchmarks():
    """Tables of a benchmark, with numbers that are easy to follow."""
    i = np.arange(1, 5)
    tables = {
        "scan": {"shape": ["(1, 2, 3, 4)"] * 3 + ["(5, 6, 7, 8)"] * 3,
                 "contestant": ["native", "reference", "matmul"] * 2,
                 "matmuls": [0.5, 100.0, 1.0] * 2, "times": [1.0, 200.0, 2.0] * 2},
        "profile": {"step": ["torch"] * 3 + ["native, fused"] * 3, "part": ["scan", "norm", "Python"] * 2,
                    "share": [0.5, 0.2, 0.3] * 2, "ms": [500.0, 200.0, 300.0] * 2},
        "lengths": {"tokens": [37, 17], "median_ms": [80.0, 40.0]},
        "schedules": {"strategy": ["upper", "all"], "mean_tokens": [27, 22], "median_ms": [63.0, 60.0],
                      "predicted_median_ms": 60.0, "of_predicted": [1.05, 1.0]},
        "memory": {"backend": ["torch", "native", "native"], "strategy": ["none", "none", "upper"],
                   "peak_mib": [400.0, 200.0, 100.0], "predicted_mib": [401.0, 201.0, 101.0],
                   "of_torch": [1.0, 0.5, 0.25]},
        "precision": {"precision": ["fp32", "bf16"], "faster": [1.0, 1.75]},
        "curves": {"step": 10 * i, "fp32": 4.0 / i, "bf16": 5.0 / i, "fp32, other order": 6.0 / i},
        "setting": {"device": ["cpu: a CPU that is made up"], "threads": 2},
    }  # fmt: skip
    return {name: pd.DataFrame(columns) for name, columns in tables.items()}


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def lines(figure):
    """The first panel's lines by their names in the legend; error bars and markers of a mean are no such lines."""
    drawn = [line for line in figure.axes[0].get_lines() if line.get_label().startswith("_child")]
    return dict(zip(legend(figure), drawn, strict=True))


def titles(figure):
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


@pytest.mark.parametrize("cost", list(summary.COSTS))
def test_accuracy_against_draws_means_runs_and_spread_of_the_frame(runs, table, cost):
    figure = plots.accuracy_against(runs, table, cost)
    axes = figure.axes[0]
    assert legend(figure) == ["none", "all", "upper", "Pareto front"]
    clouds = [item for item in axes.collections if isinstance(item, PathCollection)]
    for bar, cloud, row in zip(axes.containers, clouds, table.to_dict("records"), strict=True):
        line, own = bar.lines[0], runs[runs["strategy"] == row["strategy"]]
        assert line.get_xydata().tolist() == [[row[cost], own["top1_percent"].mean()]]
        assert to_hex(line.get_color()) == plots.STRATEGY_COLOURS[row["strategy"]].lower()
        at, scores = np.asarray(cloud.get_offsets()).T
        assert scores.tolist() == own["top1_percent"].tolist()
        aside = (at - row[cost]) / (table[cost].max() - table[cost].min())
        np.testing.assert_allclose(aside, [-0.01, 0.01, 0.02], err_msg="seeds 0, 1, 2, none of them on the bar")
        assert bar.has_yerr
        assert bar.has_xerr == (cost == "time_ratio" and row["strategy"] != "none")
    (segment,) = axes.containers[0].lines[2][0].get_segments()
    np.testing.assert_allclose(segment[:, 1], [93.0 - 3.0, 93.0 + 3.0], err_msg="none: mean 93, sd 3")
    assert axes.get_ylabel() == "top-1 accuracy (%)"


def test_a_time_has_its_interval_and_the_caption_says_how_it_was_measured(runs):
    table = summary.summary(runs, costs_frame(disturbed="load average 9.0 on 2 cores"))
    figure = plots.accuracy_against(runs, table, "time_ratio")
    (segment,) = figure.axes[0].containers[1].lines[2][0].get_segments()
    np.testing.assert_allclose(segment[:, 0], [0.79, 0.81], err_msg="all")
    said = figure.get_supxlabel().replace("\n", " ")
    assert "vertical bars ± 1 sd of single runs (differences are paired: the table); horizontal bars: 95%" in said
    assert "medians of 60 training steps" in said
    assert "The machine was busy meanwhile: load average 9.0 on 2 cores." in said


def test_pairs_join_the_runs_of_a_seed_and_name_the_mean_difference(runs):
    figure = plots.paired_accuracy(runs)
    one, two = figure.axes
    assert titles(figure) == ["\N{MINUS SIGN}12.0 points", "\N{MINUS SIGN}2.0 points"], "all, upper"
    assert [tick.get_text() for tick in two.get_xticklabels()] == ["none", "upper"]
    *seeds, mean = [line.get_ydata().tolist() for line in two.get_lines()]
    assert seeds == [[90.0, 89.0], [96.0, 94.0], [93.0, 90.0]]
    assert mean == [93.0, 91.0]
    assert one.get_ylabel() == "top-1 accuracy (%)"


def test_costs_are_drawn_in_units_of_none_with_the_interval_of_time():
    time, memory, flops = plots.costs(costs_frame()).axes[0].containers
    for marks in (time, memory, flops):
        assert marks.lines[0].get_xdata().tolist() == [1.0, 0.8, 0.75, 0.6, 0.9]
    ends = [segment[:, 0].tolist() for segment in time.lines[2][0].get_segments()]
    assert ends[1] == pytest.approx([0.79, 0.81])
    assert (memory.has_xerr, flops.has_xerr) == (False, False)


def test_the_front_that_is_drawn_is_the_front_of_the_numbers(runs):
    table = summary.summary(runs, costs_frame({"none": 1.0, "all": 2.0, "upper": 0.9}))
    front = plots.accuracy_against(runs, table, "time_ratio").axes[0].get_lines()[-1]
    assert front.get_xdata().tolist() == [0.9, 1.0], "upper, then none; all is dearer and worse"
    assert front.get_drawstyle() == "steps-post"
    fewer = table.assign(n=table["n"].mask(table["strategy"] == "upper", 1))
    front = plots.accuracy_against(runs, fewer, "time_ratio").axes[0].get_lines()[-1]
    assert front.get_xdata().tolist() == [1.0], "one run is no mean"


def test_captions_say_over_how_many_seeds(runs, table, history):
    said = plots.accuracy_against(runs, table, "peak_memory_mib").get_supxlabel()
    assert "mean over n = 3 seeds, vertical bars ± 1 sd" in said
    assert "horizontal" not in said
    alone = runs[runs["seed"] == 0]
    one = plots.accuracy_against(alone, summary.summary(alone, costs_frame()), "peak_memory_mib")
    assert "one run each, so without spread" in one.get_supxlabel().replace("\n", " ")
    assert [(bar.has_xerr, bar.has_yerr) for bar in one.axes[0].containers] == 3 * [(False, False)]
    curves = [plots.training_curves(x).get_supxlabel() for x in (history, history[history["seed"] == 0])]
    assert [x.split(". The training loss includes augmentation ")[0] for x in curves] == [
        "Mean over n = 3 seeds; the band is ± 1 sd",
        "n = 1 seed",
    ]


def test_strategies_of_ones_own_are_drawn_last_each_in_its_own_colour(schedules):
    names = {"all": "late", "upper": "early"}
    figure = plots.tokens_per_layer(schedules.replace({"strategy": names}))
    assert [text.split(" ")[0] for text in legend(figure)] == ["none", "late", "early"]
    assert [line.get_linewidth() for line in figure.axes[0].lines] == [4.0, 1.8, 1.8], "others lie on that of none"
    colours = [to_hex(line.get_color()) for line in figure.axes[0].lines]
    assert len({*colours, *(plots.STRATEGY_COLOURS[name].lower() for name in STRATEGIES)}) == len(STRATEGIES) + 2


def test_the_same_change_has_the_same_marker_in_the_colour_of_its_strategy():
    names = ["none", "all", "none_drop", "all_drop", "all_by_b", "own", "own_drop", "late"]
    looks = style.looks_in(pd.DataFrame({"strategy": names}))
    colours, markers = ({name: look[i] for name, look in looks.items()} for i in (0, 1))
    assert {colours[name] for name in names[:5]} == {plots.STRATEGY_COLOURS["none"], plots.STRATEGY_COLOURS["all"]}
    assert colours["all_drop"] == colours["all_by_b"] == colours["all"]
    assert len({colours[name] for name in names[5:]} - {*plots.STRATEGY_COLOURS.values()}) == 3
    assert markers["none_drop"] == markers["all_drop"]
    assert len({*markers.values()}) == len(names) - 1, "all others differ"
    assert style.looks_in(pd.DataFrame({"strategy": ["own"]})) == {"own": looks["own"]}


def test_a_change_is_in_the_legend_once_for_all_strategies(runs):
    both = pd.concat([runs, runs.replace({"strategy": {name: f"{name}_drop" for name in ("none", "all", "upper")}})])
    table = summary.summary(both, costs_frame(dict.fromkeys(both["strategy"], 1.0)))
    figure = plots.accuracy_against(both, table, "time_ratio")
    assert legend(figure) == ["none", "all", "upper", "drop", "Pareto front"]
    assert "with one change" in figure.get_supxlabel().replace("\n", " ")


def test_tokens_per_layer_draws_the_counts_from_the_input_on(schedules):
    drawn = lines(plots.tokens_per_layer(schedules))
    assert list(drawn) == ["none (17 left)", "all (11 left)", "upper (13 left)"]
    assert drawn["upper (13 left)"].get_xydata().tolist() == [[0, 17], [1, 17], [2, 17], [3, 13]]


def test_training_curves_draw_mean_and_spread_over_seeds(history):
    figure = plots.training_curves(history)
    assert titles(figure) == ["training loss", "validation loss", "validation top-1 accuracy (%)"]
    loss = figure.axes[0]
    assert list(lines(figure)) == ["none", "upper"]
    np.testing.assert_allclose(lines(figure)["none"].get_ydata(), [5.0, 3.0, 4 / 3 + 1])
    band = loss.collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx(4.0 + 1 + 1), "seeds 0, 1, 2 add mean 1 and sd 1"
    one = plots.training_curves(history[history["seed"] == 1])
    assert lines(one)["upper"].get_ydata().tolist() == [5.0, 3.0, 4 / 3 + 1]
    assert not any(np.isfinite(path.vertices).any() for band in one.axes[0].collections for path in band.get_paths())


def test_runs_that_trained_nothing_are_said(history):
    figure = plots.training_curves(history[:0])
    assert figure.axes == []
    assert figure.get_supxlabel() == "Nothing was trained: the runs evaluate the weights that they were given."


def test_the_overview_writes_what_each_layer_removes(schedules):
    axes = plots.strategies_overview(schedules).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["none", "all", "upper"]
    numbers = {text.get_position(): text.get_text() for text in axes.texts if text.get_text().isdigit()}
    assert numbers == {(0.5, 1.5): "2", (1.5, 1.5): "2", (2.5, 1.5): "2", (2.5, 2.5): "4"}, "all and upper"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "3"]
    for mesh, (strategy, removed) in zip(axes.collections, {"none": 0, "all": 2, "upper": 4}.items(), strict=True):
        assert mesh.get_array().compressed().max() == removed
        assert to_hex(mesh.get_cmap()(1.0)) == plots.STRATEGY_COLOURS[strategy].lower()
    counts = [text.get_text() for text in axes.texts if "→" in text.get_text()]
    assert counts == ["17 → 17 tokens", "17 → 11 tokens", "17 → 13 tokens"]


def test_heatmaps_show_the_matrices_on_one_scale():
    matrices = [np.array([[1.0, -0.33], [-0.33, 1.0]]), np.ones((1, 1)), np.eye(5)]
    figure = plots.similarity_heatmaps(matrices)
    assert titles(figure) == ["into layer 1: 2 tokens", "into layer 2: 1 tokens", "into layer 3: 5 tokens"]
    *panels, bar = figure.axes
    assert bar.get_ylabel() == "cosine similarity"
    for axes, matrix in zip(panels, matrices, strict=True):
        (mesh,) = axes.collections
        assert np.asarray(mesh.get_array()).tolist() == matrix.tolist()
        assert mesh.get_clim() == (-0.4, 1.0)
        assert axes.get_xlim() == axes.get_ylim()[::-1] == (0, len(matrix)), "layer's first token top left"


@pytest.fixture
def likeness():
    """Two images of 2 x 2 patches and six layers; with trained weights tokens grow less alike, layer by layer."""
    rows = []
    for image, layer, token in itertools.product([0, 1], range(1, 7), range(4)):
        for weights, slope in (("trained", -0.1), ("untrained", 0.0)):
            value = 0.9 + slope * layer + 0.01 * image
            rows += [("none", seed, weights, "similarity", image, layer, value) for seed in (0, 1)]
            if token == 0:
                rows.append(("upper", 0, weights, "distance", image, layer, 1.0 + image + (weights == "untrained")))
    for image, weights in itertools.product([0, 1], ["trained", "untrained"]):
        rows += [("none", 0, weights, "size", image, 6, 1.0)] * 4
        rows += [("upper", 0, weights, "size", image, 6, size) for size in (1.0, 3.0)]
    return pd.DataFrame(rows, columns=["strategy", "seed", "weights", "quantity", "image", "layer", "value"])


def test_likeness_is_drawn_by_layer_beside_its_change_towards_the_upper_layers(likeness):
    left, right = plots.token_similarity(likeness).axes
    trained, untrained = left.get_lines()
    np.testing.assert_allclose(trained.get_ydata(), 0.905 - 0.1 * np.arange(1, 7))
    np.testing.assert_allclose(untrained.get_ydata(), [0.905] * 6)
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["trained", "untrained"]
    means = [bar.lines[0].get_xdata()[0] for bar in right.containers]
    np.testing.assert_allclose(means, [-0.4, 0.0], atol=1e-12, err_msg="layers 5, 6 less layers 1, 2")


def test_distances_have_a_panel_for_each_strategy_that_fuses_and_say_what_chance_would_do(likeness):
    figure = plots.fused_distance(likeness)
    assert titles(figure) == ["upper"]
    trained, untrained, chance = figure.axes[0].get_lines()
    assert set(trained.get_ydata()) == {1.5}
    assert set(untrained.get_ydata()) == {2.5}
    assert set(chance.get_ydata()) == {1.0}, "of a 2 x 2 grid's six pairs four are neighbours"


def test_sizes_at_the_end_are_drawn_for_the_strategies_that_fuse(likeness):
    axes = plots.token_size(likeness).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["upper"]
    medians = [line.get_xdata().tolist() for line in axes.get_lines() if line.get_color() == PALETTE[3]]
    assert medians == [[2.0, 2.0]] * 2


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_an_unchanged_figure_is_saved_as_the_same_bytes(tmp_path, runs, table, suffix):
    path = tmp_path / "deep" / f"a.{suffix}"
    figure = plots.accuracy_against(runs, table, "time_ratio")
    assert plots.save(figure, path) == path
    first = path.read_bytes()
    plots.save(figure, path)
    assert path.read_bytes() == first, "saved twice"
    plots.save(plots.accuracy_against(runs, table, "time_ratio"), path)
    assert path.read_bytes() == first, "drawn twice"
    assert not any(word in first for word in (b"Software", b"<dc:date>", matplotlib.__version__.encode()))
    plots.save(plots.accuracy_against(runs, table, "peak_memory_mib"), path)
    assert path.read_bytes() != first


def test_the_style_of_the_session_changes_nothing(tmp_path, schedules):
    plain = plots.save(plots.tokens_per_layer(schedules), tmp_path / "plain.png").read_bytes()
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red", "savefig.dpi": 30, "axes.grid": False}):
        styled = plots.save(plots.tokens_per_layer(schedules), tmp_path / "styled.png").read_bytes()
        assert matplotlib.rcParams["font.size"] == 20, "and the session keeps its own"
    assert styled == plain


def test_a_benchmark_draws_the_numbers_of_its_tables(benchmarks):
    scan, parts, steps, memory, curves, _ = plots.benchmark(benchmarks).axes
    assert scan.get_xscale() == "log"
    assert [[bar.get_width() for bar in bars] for bars in scan.containers] == 2 * [[0.5, 100, 1]]
    assert {text.get_text() for text in scan.texts} == {" 1×", " 200×", " 2×"}
    assert [bar.get_width() for bar in parts.containers[1]] == pytest.approx([20, 20])
    assert [bar.get_x() for bar in parts.containers[1]] == pytest.approx([50, 50])
    assert [text.get_text() for text in parts.texts][-2:] == ["1,000 ms", "1,000 ms"]
    (unfused,) = steps.get_lines()
    assert unfused.get_xydata().tolist() == [[37, 80], [17, 40]]
    points = {dots.get_label(): dots.get_offsets().tolist() for dots in steps.collections}
    assert points["upper: 1.05× predicted"] == [[27, 63]]
    assert points["all: 1.00× predicted"] == [[22, 60]]
    assert [[27, 60]] in points.values()
    assert [bar.get_width() for bar in memory.containers[0]] == [400, 200, 100]
    assert memory.get_lines()[0].get_xdata().tolist() == [401, 201, 101]
    assert [text.get_text() for text in memory.texts] == [" 1.00×", " 0.50×", " 0.25×"]
    lines = {line.get_label(): line.get_xydata().tolist()[:2] for line in curves.get_lines()}
    assert lines["bf16"] == [[10, 5], [20, 2.5]]
    assert len(lines) == 3
    assert "1.75×" in curves.get_title()


def test_a_benchmark_of_some_parts_has_their_panels_alone(benchmarks):
    figure = plots.benchmark({name: benchmarks[name] for name in ("memory", "setting")})
    assert titles(figure) == ["memory, measured and by formula"]
    assert figure.get_supxlabel().replace("\n", " ").endswith("on cpu: a CPU that is made up, threads: 2.")


@pytest.fixture
def made_up_gpu(benchmarks):
    """Tables of a GPU's benchmark with numbers that nobody measured."""
    times = np.array([1.0, 1.5, 40.0] * 2)
    tables = {
        "scan": {"contestant": ["triton", "mamba_ssm", "torch", "triton"], "precision": ["bf16"] * 3 + ["fp32"],
                 "directions": "one", "median_ms": 300.0, "device_ms": [0.5, 2.0, None, 1.0],
                 "of_roofline": [1.25, 5.0, 750.0, 2.5]},
        "steps": {"model": ["vim_tiny"] * 3 + ["vim_small"] * 3,
                  "contestant": ["triton", "published, triton", "torch"] * 2,
                  "times": times, "img_per_s": 4000 / times, "peak_mib": 10240 * times},
        "graphs": {"what": ["called", "captured", "called, fused in all layers"],
                   "median_ms": [10.0, 2.0, 12.5], "times": [1.0, 0.2, 1.25]},
        "setting": {"device": ["cuda: a GPU that is made up"], "threads": 2},
        "lengths": benchmarks["lengths"],
        "schedules": benchmarks["schedules"],
    }  # fmt: skip
    return {name: pd.DataFrame(columns) for name, columns in tables.items()}


def test_a_gpus_benchmark_draws_the_numbers_of_its_tables(made_up_gpu):
    figure = plots.gpu_benchmark(made_up_gpu)
    scan, steps, schedules, graphs = figure.axes
    assert [bar.get_width() for bar in scan.containers[0]] == [0.5, 2.0, 300.0, 1.0], "as called, if not captured"
    assert [text.get_text() for text in scan.texts] == [" 1.2×", " 5.0×", " 750.0×", " 2.5×"]
    assert [bar.get_width() for bar in steps.containers[0]] == 2 * [1.0, 1.5, 40.0]
    assert steps.texts[1].get_text() == " 2,667/s, 15.0 GiB"
    assert [text.get_text().replace("\n", " ") for text in steps.get_yticklabels()][3] == "Vim-S: triton"
    assert len(schedules.get_lines()) == 1
    assert [bar.get_width() for bar in graphs.containers[0]] == [10, 2, 12.5]
    colours = [bar.get_facecolor() for bar in steps.containers[0]]
    assert colours[:3] == colours[3:]
    assert len(set(colours)) == 3
    assert any("cuda: a GPU that is made up" in text.get_text() for text in figure.findobj(matplotlib.text.Text))


def test_without_a_benchmark_its_figure_says_so(benchmarks):
    for figure in (plots.gpu_benchmark({}), plots.benchmark({"lengths": benchmarks["lengths"]})):
        (said,) = figure.texts
        assert said.get_text() == "not measured yet: make bench, or on a GPU make bench-gpu"


def test_no_text_of_the_saved_figures_overlaps_another(
    runs, table, schedules, history, benchmarks, likeness, made_up_gpu
):
    drawn = [
        plots.accuracy_against(runs, table, "time_ratio"),
        plots.costs(costs_frame()),
        plots.tokens_per_layer(schedules),
        plots.training_curves(history),
        plots.strategies_overview(schedules),
        plots.ablation(EFFECTS),
        plots.benchmark(benchmarks),
        plots.gpu_benchmark(made_up_gpu),
        plots.token_similarity(likeness),
        plots.fused_distance(likeness),
        plots.token_size(likeness),
    ]
    for figure in drawn:
        figure.draw_without_rendering()
        unseen = ticks_out_of_view(figure)
        texts = [x for x in figure.findobj(matplotlib.text.Text) if x.get_visible() and x.get_text()]
        boxes = [(x.get_text(), x.get_window_extent()) for x in texts if id(x) not in unseen]
        assert len(boxes) > 5
        for (one, a), (two, b) in itertools.combinations(boxes, 2):
            wide, high = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
            assert min(wide, high) < 2, (one, two)
        for text, box in boxes:
            assert figure.bbox.padded(1).count_contains(box.corners()) == 4, text


def ticks_out_of_view(figure):
    """Tick labels outside their axis' limits exist but are not drawn."""
    unseen = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [tick for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high]
            unseen |= {id(label) for tick in ticks for label in (tick.label1, tick.label2)}
    return unseen


EFFECTS = pd.DataFrame(
    {"change": ["append", "append", "drop", "drop"], "strategy": ["all", "upper"] * 2, "n": 8}
    | {"mean": [-1.0, 0.5, -2.0, 0.0], "low": [-1.5, -0.5, -3.0, -1.0], "high": [-0.5, 1.5, -1.0, 1.0]}
)


def test_an_ablation_shows_each_change_with_a_mark_and_interval_for_each_strategy():
    figure = plots.ablation(EFFECTS)
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["append", "drop"]
    for container, name in zip(axes.containers, ["all", "upper"], strict=True):
        rows = EFFECTS[EFFECTS["strategy"] == name]
        assert container.get_label() == name
        np.testing.assert_allclose(container.lines[0].get_xdata(), rows["mean"])
        assert np.round(container.lines[0].get_ydata()).tolist() == [0, 1]
        ends = np.array([segment[:, 0] for segment in container.lines[2][0].get_segments()])
        np.testing.assert_allclose(ends, rows[["low", "high"]].to_numpy())
    assert "n = 8 seeds" in figure.get_supxlabel().replace("\n", " ")
    alone = plots.ablation(EFFECTS.iloc[::2].assign(low=math.nan, high=math.nan)).axes[0]
    assert not alone.containers[0].lines[2]


def test_upper_with_other_layers_or_r_is_drawn_beside_the_papers_table():
    names = ["none", "upper", "upper_r1", "upper_r3"]
    top1 = dict(zip(names, ([90.0, 92.0], [80.0, 84.0], [90.0, 90.0], [85.0, 85.0]), strict=True))
    ratios = dict(zip(names, (1.0, 0.7, 1.1, 0.9), strict=True))
    frame, costs = runs_frame(top1), costs_frame(ratios).assign(r=[0, 6, 1, 3], first_layer=[0, 6, 6, 6])
    figures = plots.ablations(frame, summary.summary(frame, costs))
    assert list(figures) == ["time_ratio", "peak_memory_mib", "paper"]
    points, _, time, time_here, _, _ = figures["paper"].axes
    assert points.get_title() == "Famba-V, Table 3 (Vim-Ti)"
    assert time.containers[0].lines[0].get_xdata().tolist() == list(range(1, 10))
    assert time_here.containers[0].lines[0].get_xydata().tolist() == [[1, 1.1], [3, 0.9], [6, 0.7]]
    said = figures["paper"].get_supxlabel().replace("\n", " ")
    assert "Table 3 (Vim-Ti): time is saved from r = 4.1 on. here: time is saved from r = 2.0 on. The r is" in said
    table = summary.summary(frame, costs.assign(r=6))
    assert list(plots.ablations(frame, table)) == ["time_ratio", "peak_memory_mib"]
    assert plots.ablations(frame, pd.concat([table] * 6)) == {}, "24 points could not be told apart"


def test_the_cost_of_fusing_is_a_map_by_layer_with_the_schedule_framed():
    costs = [[0.0, 1.0, 2.0], [0.0, 0.5, 3.0]]
    plans = [
        Plan(kind, AdaptiveRule(total=2), schedule, 0.8, 0.9, costs, ["none-0"], 9)
        for kind, schedule in (("logits", [1, 1]), ("similarity", [2, 0]))
    ]
    left, right, *bars = plots.fusing_costs(plans).axes
    labels = ["Kullback-Leibler divergence (nats)", "1 \N{MINUS SIGN} cosine similarity, summed over pairs"]
    assert [bar.get_ylabel() for bar in bars] == labels
    assert left.collections[0].norm(0.03) > 0.2, "1% of the range, where schedules are chosen, can be told from nothing"
    np.testing.assert_allclose(np.ravel(left.collections[0].get_array()), np.ravel(costs))
    assert [patch.get_xy() for patch in left.patches] == [(1, 0), (1, 1)]
    assert [patch.get_xy() for patch in right.patches] == [(2, 0), (0, 1)]
    assert (left.get_xlabel(), left.get_ylabel()) == ("tokens fused", "layer")


def test_the_forest_plot_says_how_many_comparisons_found_no_variant_of_the_same_cost():
    row = {"claim": "smaller", "quantity": "top1_percent_diff", "strategy": "lower", "against": "none"}
    row |= {"required": "above 0", "effect": math.nan, "low": math.nan, "high": math.nan, "verdict": "not told apart"}
    rows = [row, row | {"effect": 1.0}, row | {"strategy": "", "verdict": "not measured"}]
    said = [forest(pd.DataFrame(x)).get_supxlabel().replace("\n", " ") for x in (rows, rows[1:])]
    assert ["no variant costs as much: 1 of the comparisons" in text for text in said] == [True, False]


def test_paper_memory_draws_the_papers_points_and_both_formulas_against_layer_and_r():
    at = [(2, 6, 9), (2, 2, 7), (3, 6, 9), (3, 6, 1)]
    sides = {("vim_tiny", "paper"): 0.1, ("vim_tiny", "formula"): 0.0, ("vim_small", "formula"): 0.01}
    rows = [
        {"model": model, "table": table, "first_layer": layer, "r": r, "source": source, "memory_share": 1 - r / 20 + x}
        for table, layer, r in at
        for (model, source), x in sides.items()
    ]
    figure = plots.paper_memory(pd.DataFrame(rows))
    assert legend(figure) == ["Vim-Ti, paper", "Vim-Ti, formula", "Vim-S, formula"]
    by_layer, by_r = figure.axes
    assert by_layer.lines[0].get_xydata().tolist() == pytest.approx(np.array([[2, 0.75], [6, 0.65]]))
    assert by_r.lines[1].get_xydata().tolist() == pytest.approx(np.array([[1, 0.95], [9, 0.55]]))
    assert by_r.lines[0].get_linestyle() == "None"
    assert [len(axes.lines) for axes in figure.axes] == [4, 4]  # and the line at 1
