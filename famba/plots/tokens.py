"""What is drawn over an image: its patches, which of them became one token, and which stayed alone.

Here `b` images, `h` by `w` pixels, `t` tokens at the input. Where patches overlap (a stride below the patch size),
each is drawn as the stride-sized cell in its middle. The class token is no patch: `cls_index` is its position at the
input, None without one. A fusion map colours patches as ToMe (arXiv:2210.09461) does.
"""

import colorsys
import math
import textwrap
from collections.abc import Sequence

import numpy as np
import seaborn
from jaxtyping import Float, Int, UInt8
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from famba.errors import InputError
from famba.plots.style import Animation, Figure, styled

_PALETTE = seaborn.color_palette("colorblind").as_hex()
_BLUE, _ORANGE, _SKY = _PALETTE[0], _PALETTE[1], _PALETTE[9]


@styled
def image_grid(images: UInt8[np.ndarray, "b h w 3"], labels: Sequence[str], *, columns: int = 10) -> Figure:
    """Images with their labels above, row by row.

    Raises:
        InputError: another number of labels than of images, or no images.
    """
    if len(labels) != len(images) or not len(images):
        raise InputError(f"labels: {len(labels)} for {len(images)} images")
    across = min(columns, len(images))
    down = math.ceil(len(images) / across)
    figure = Figure(figsize=(0.95 * across, 1.15 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for axes, image, label in zip(panels.flat, images, labels, strict=False):
        _show(axes, image)
        axes.set_title(textwrap.shorten(str(label), 14, placeholder="…"), fontsize=9, pad=3)
    return figure


@styled
def patch_grid(image: UInt8[np.ndarray, "h w 3"], *, patch_size: int, stride: int) -> Figure:
    """An image and its patches in scan order: the sequence that the two scans read, forwards and backwards.

    Where patches overlap (a stride below the patch size), each is drawn as the stride-sized cell in its middle.
    """
    h, w, _ = image.shape
    down, across = _grid_shape(image, patch_size, stride)
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes in panels:
        _show(axes, image)
    panels[0].set_title(f"image, {h} × {w} px", fontsize=10)
    panels[1].set_title(f"{down * across} patches in scan order", fontsize=10)
    if patch_size > stride:
        first = Rectangle((-0.5, -0.5), patch_size, patch_size, facecolor="none", edgecolor=_SKY, zorder=3)
        first.set(linestyle="--", linewidth=2, clip_on=False)
        panels[1].add_patch(first)
        panels[1].set_title(
            f"{down * across} patches in scan order\n(dashed: all of patch 0, {patch_size} × {patch_size} px)",
            fontsize=10,
        )
    margin = (patch_size - stride) / 2 - 0.5
    for index in range(down * across):
        x, y = margin + index % across * stride, margin + index // across * stride
        panels[1].add_patch(Rectangle((x, y), stride, stride, facecolor="none", edgecolor=_ORANGE, linewidth=0.9))
        panels[1].text(
            x + stride / 2,
            y + stride / 2,
            str(index),
            ha="center",
            va="center",
            fontsize=min(9, 70 / max(down, across)),
            color="#222222",
            bbox={"boxstyle": "round,pad=0.12", "facecolor": "white", "alpha": 0.75, "linewidth": 0},
        )
    return figure


@styled
def fusion_map(
    images: UInt8[np.ndarray, "b h w 3"],
    groups_by_layer: Sequence[Int[np.ndarray, "b t"]],
    *,
    patch_size: int,
    stride: int,
    cls_index: int | None = None,
    layers: Sequence[int] | None = None,
) -> Figure:
    """Where fusion happened: patches that became one token share a colour and an outline, all others stay bare.

    One row per image, one picture per layer after the image itself. A token keeps the colour of its first patch.

    Args:
        groups_by_layer: for each layer, layer 1 first, the token that each input token has ended in
            (`Trace.groups`).
        patch_size, stride: pixels of these images.
        layers: those to draw, counted from 1; None is all.

    Raises:
        InputError: groups that do not fit the images' patches, or a layer that is not there.
    """
    maps = _maps(images, groups_by_layer, patch_size, stride, cls_index, layers)
    b, panels_each = len(images), 1 + len(maps)
    across = min(panels_each, 13)
    down = math.ceil(panels_each / across)
    size = 1.35 if across > 5 else 1.9
    figure = Figure(
        figsize=(size * across, (size + (0.38 if down > 1 else 0.12)) * b * down + 0.4), layout="constrained"
    )
    panels = figure.subplots(b * down, across, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for row, image in enumerate(images):
        places = panels[row * down : (row + 1) * down].flat
        titled = row == 0 or down > 1
        axes = next(places)
        _show(axes, image)
        if titled:
            axes.set_title(f"image\n{math.prod(_grid_shape(image, patch_size, stride))} patches", fontsize=9)
        for (layer, groups), axes in zip(maps.items(), places, strict=False):
            _show(axes, image)
            _colour_groups(axes, groups[row], patch_size, stride)
            if titled:
                axes.set_title(f"layer {layer}\n{len(np.unique(groups[row]))} tokens", fontsize=9)
    return figure


def fusion_animation(
    images: UInt8[np.ndarray, "b h w 3"],
    groups_by_layer: Sequence[Int[np.ndarray, "b t"]],
    *,
    patch_size: int,
    stride: int,
    cls_index: int | None = None,
    layers: Sequence[int] | None = None,
) -> Animation:
    """The fusion map as a film: all images side by side, one frame per layer after the images, and the tokens left.

    Arguments and errors as in `fusion_map`.
    """
    maps = _maps(images, groups_by_layer, patch_size, stride, cls_index, layers)
    counts = _token_counts(groups_by_layer)

    @styled
    def frame(layer: int) -> Figure:
        b = len(images)
        figure = Figure(figsize=(1.8 * b + 2.8, 2.4), layout="constrained")
        *panels, last = figure.subplots(1, b + 1, width_ratios=[*[1.8] * b, 2.4])
        for index, axes in enumerate(panels):
            _show(axes, images[index])
            if layer:
                _colour_groups(axes, maps[layer][index], patch_size, stride)
        _tokens_left(last, counts, layer)
        return figure

    return Animation(tuple(frame(layer) for layer in (0, *maps)))


@styled
def fusion_closer(
    image: UInt8[np.ndarray, "h w 3"],
    groups_by_layer: Sequence[Int[np.ndarray, "t"]],
    *,
    layer: int,
    patch_size: int,
    stride: int,
    cls_index: int | None = None,
    label: str = "image",
) -> Figure:
    """One image after one layer: what has fused until then, what has stayed alone, and the tokens left.

    Args:
        layer: counted from 1; 0 is the input, where every patch is a token.
        label: what is written above the image.

    Raises:
        InputError: as in `fusion_map`.
    """
    batch = [groups[None] for groups in groups_by_layer]
    maps = _maps(image[None], batch, patch_size, stride, cls_index, [layer] if layer else [])
    shape = _grid_shape(image, patch_size, stride)
    salient = saliency(batch[:layer], cls_index=cls_index)[0].reshape(shape) if layer else np.ones(shape)
    figure = Figure(figsize=(9.6, 2.7))  # fixed places: to lay it out takes as long as to draw it, and sliders wait
    places = {"left": 0.01, "right": 0.99, "bottom": 0.17, "top": 0.9, "wspace": 0.0}
    grid = figure.add_gridspec(1, 5, width_ratios=[2.2, 2.2, 2.2, 0.45, 2.55], **places)
    whole, fused, heat, left = (figure.add_subplot(grid[column]) for column in (0, 1, 2, 4))
    for axes in (whole, fused):
        _show(axes, image)
    for groups in maps.values():
        _colour_groups(fused, groups[0], patch_size, stride)
    _heat(heat, image, salient, patch_size, stride)
    _tokens_left(left, _token_counts(groups_by_layer), layer)
    whole.set_title(label, fontsize=9)
    fused.set_title(f"fused by layer {layer}" if layer else "the input", fontsize=9)
    heat.set_title("stayed alone (bright)", fontsize=9)
    return figure


def saliency(
    groups_by_layer: Sequence[Int[np.ndarray, "b t"]], *, cls_index: int | None = None
) -> Float[np.ndarray, "b patches"]:
    """How much of a token of its own each patch has had: one over the patches in its token, mean over the layers.

    1 is a patch that has stayed alone throughout; what the model finds like its surroundings goes towards 0. Made of
    group sizes alone, so it needs no attention, which this model does not have. The class token counts nowhere.

    Raises:
        InputError: no layers.
    """
    if not groups_by_layer:
        raise InputError("groups_by_layer: none; at least 1 layer needed")
    shares = []
    for groups in groups_by_layer:
        patches = groups if cls_index is None else np.delete(groups, cls_index, axis=1)
        shares.append([1 / np.bincount(row)[row] for row in patches])
    return np.mean(shares, axis=0)


@styled
def saliency_map(
    images: UInt8[np.ndarray, "b h w 3"],
    groups_by_layer: Sequence[Int[np.ndarray, "b t"]],
    *,
    patch_size: int,
    stride: int,
    cls_index: int | None = None,
    layers: Sequence[int] | None = None,
) -> Figure:
    """What stays a token of its own, as heat over each image: `saliency` of the layers that are asked for.

    Arguments and errors as in `fusion_map`.
    """
    _maps(images, groups_by_layer, patch_size, stride, cls_index, layers)
    chosen = _chosen(groups_by_layer, layers)
    salient = saliency([groups_by_layer[layer - 1] for layer in chosen], cls_index=cls_index)
    b = len(images)
    figure = Figure(figsize=(1.6 * b + 1.2, 3.4), layout="constrained")
    panels = figure.subplots(2, b, squeeze=False)
    for (whole, axes), image, values in zip(panels.T, images, salient, strict=True):
        _show(whole, image)
        _heat(axes, image, values.reshape(_grid_shape(image, patch_size, stride)), patch_size, stride)
    bar = figure.colorbar(panels[1, 0].images[-1], ax=panels, shrink=0.9, aspect=24)
    bar.set_label(f"1 / patches in its token\nmean over {len(chosen)} layer{'s' * (len(chosen) > 1)}", fontsize=8.5)
    return figure


def _chosen(groups_by_layer: Sequence[np.ndarray], layers: Sequence[int] | None) -> list[int]:
    chosen = list(range(1, len(groups_by_layer) + 1)) if layers is None else list(layers)
    wrong = [layer for layer in chosen if not 1 <= layer <= len(groups_by_layer)]
    if wrong:
        raise InputError(f"layers: {wrong[0]} is not within 1..{len(groups_by_layer)}")
    return chosen


def _maps(
    images: np.ndarray,
    groups_by_layer: Sequence[np.ndarray],
    patch_size: int,
    stride: int,
    cls_index: int | None,
    layers: Sequence[int] | None,
) -> dict[int, np.ndarray]:
    """For each chosen layer (b, rows, columns): for each patch the token it ended in."""
    b, shape = len(images), _grid_shape(images[0], patch_size, stride)
    maps = {}
    for layer in _chosen(groups_by_layer, layers):
        groups = groups_by_layer[layer - 1]
        patches = groups if cls_index is None else np.delete(groups, cls_index, axis=1)
        if patches.shape != (b, math.prod(shape)):
            raise InputError(
                f"groups_by_layer: layer {layer} has the shape {groups.shape}; {b} images of {shape[0]} x "
                f"{shape[1]} patches{'' if cls_index is None else ' and a class token'} are expected"
            )
        maps[layer] = patches.reshape(b, *shape)
    return maps


def _grid_shape(image: np.ndarray, patch_size: int, stride: int) -> tuple[int, int]:
    h, w, _ = image.shape
    return (h - patch_size) // stride + 1, (w - patch_size) // stride + 1


def _token_counts(groups_by_layer: Sequence[np.ndarray]) -> list[int]:
    """At the input and after each layer, class token included; the same for every image."""
    return [groups_by_layer[0].shape[-1], *(int(groups.max()) + 1 for groups in groups_by_layer)]


def _tokens_left(axes: Axes, counts: Sequence[int], layer: int) -> None:
    axes.step(range(len(counts)), counts, where="mid", color="0.75", zorder=1)
    axes.plot(layer, counts[layer], "o", color=_BLUE, markersize=7, zorder=2)
    axes.set(ylim=(0, counts[0] * 1.08), xlabel="after layer", ylabel="tokens")
    axes.set_title(f"layer {layer}: {counts[layer]} tokens" if layer else f"input: {counts[0]} tokens", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def _extent(rows: int, columns: int, patch_size: int, stride: int) -> tuple[float, float, float, float]:
    """Where the stride-sized cells in the middle of the patches lie: left, right, bottom, top."""
    start = (patch_size - stride) / 2 - 0.5
    return start, start + columns * stride, start + rows * stride, start


def _heat(axes: Axes, image: np.ndarray, values: np.ndarray, patch_size: int, stride: int) -> None:
    _show(axes, np.repeat(image.mean(-1, keepdims=True), 3, axis=-1).astype(np.uint8))
    limits = axes.get_xlim(), axes.get_ylim()
    rows, columns = values.shape
    extent = _extent(rows, columns, patch_size, stride)
    axes.imshow(values, extent=extent, cmap="inferno", vmin=0, vmax=1, alpha=0.85, interpolation="nearest")
    axes.set(xlim=limits[0], ylim=limits[1])


def _show(axes: Axes, image: np.ndarray) -> None:
    axes.imshow(image, interpolation="nearest")
    axes.set_axis_off()


def _colour_groups(axes: Axes, groups: Int[np.ndarray, "rows columns"], patch_size: int, stride: int) -> None:
    """Tint the patches of each token that stands for more than one, and outline all tokens."""
    rows, columns = groups.shape
    _, first, inverse, count = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
    tints = np.zeros((rows, columns, 4))
    fused = (count > 1)[inverse.reshape(groups.shape)]
    for token, patch in enumerate(first):
        if count[token] > 1:
            # Steps of the golden ratio keep neighbours' hues apart; two levels of value tell more tokens apart.
            hue = colorsys.hsv_to_rgb(patch * 0.618034 % 1, 0.85, 0.95 if patch % 2 else 0.75)
            tints[inverse.reshape(groups.shape) == token] = (*hue, 0.7)
    extent = _extent(rows, columns, patch_size, stride)
    start = extent[0]
    limits = axes.get_xlim(), axes.get_ylim()
    axes.imshow(tints, extent=extent, interpolation="nearest")
    lines = []
    ids, own = np.pad(groups, 1, constant_values=-1), np.pad(fused, 1)
    for row in range(rows + 1):
        for column in range(columns + 1):
            x, y = start + column * stride, start + row * stride
            here, left, above = (row + 1, column + 1), (row + 1, column), (row, column + 1)
            if ids[here] != ids[left] and (own[here] or own[left]):
                lines.append([(x, y), (x, y + stride)])
            if ids[here] != ids[above] and (own[here] or own[above]):
                lines.append([(x, y), (x + stride, y)])
    # White with a dark rim: seen on any image.
    axes.add_collection(LineCollection(lines, colors="#222222", linewidths=1.5, capstyle="round"))
    axes.add_collection(LineCollection(lines, colors="white", linewidths=0.7, capstyle="round"))
    axes.set(xlim=limits[0], ylim=limits[1])
