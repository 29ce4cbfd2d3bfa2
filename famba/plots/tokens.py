"""Drawings over an image: its patches, which of them became one token, and which stayed single.

Here `b` images, `h` by `w` pixels, `t` tokens at the input. Overlapping patches (stride below the patch size) are drawn
as the stride-sized cell in their middle. A fusion map colours patches as ToMe (arXiv:2210.09461) does. `groups` is, for
each layer from the first, the token that each input token has become part of (`Trace.groups`).
"""

import colorsys
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from famba.plots.style import PALETTE, Animation, Figure, grid_of_panels, styled

_BLUE, _ORANGE, _SKY = PALETTE[0], PALETTE[1], PALETTE[9]
_TITLE: dict[str, Any] = {"fontsize": 9}
_LEVELS = ((1, 0.97), (0.9, 0.5), (0.55, 0.97), (0.9, 0.8))  # saturation and value of a token's colour
_Image = UInt8[np.ndarray, "h w 3"]
_Groups = Sequence[Int[np.ndarray, "b t"]]


@dataclass(frozen=True)
class Patches:
    """Where an image's patches lie: pixels, and the class token's position at the input, None without one."""

    patch_size: int
    stride: int
    cls_index: int | None = None

    def grid(self, image: np.ndarray) -> tuple[int, int]:
        """Rows and columns."""
        h, w, _ = image.shape
        return (h - self.patch_size) // self.stride + 1, (w - self.patch_size) // self.stride + 1

    def of(self, groups: np.ndarray) -> np.ndarray:
        """The groups without the class token's."""
        return groups if self.cls_index is None else np.delete(groups, self.cls_index, axis=-1)

    def overlay(self, axes: Axes, values: np.ndarray, **options: Any) -> None:
        """Draw (rows, columns, ..) values over the cells of an image."""
        limits, start = (axes.get_xlim(), axes.get_ylim()), self.margin
        rows, columns = values.shape[:2]
        extent = (start, start + columns * self.stride, start + rows * self.stride, start)
        axes.imshow(values, extent=extent, interpolation="nearest", **options)
        axes.set(xlim=limits[0], ylim=limits[1])

    @property
    def margin(self) -> float:
        """The left and upper edge of the first cell."""
        return (self.patch_size - self.stride) / 2 - 0.5


@styled
def image_grid(images: UInt8[np.ndarray, "b h w 3"], labels: Sequence[str]) -> Figure:
    """Images with their labels above, ten in a row."""
    figure, panels = grid_of_panels(len(images), 10, (0.95, 1.15))
    for axes, image, label in zip(panels.flat[: len(images)], images, labels, strict=True):
        _show(axes, image)
        axes.set_title(textwrap.shorten(str(label), 14, placeholder="…"), **_TITLE, pad=3)
    return figure


@styled
def patch_grid(image: _Image, patches: Patches) -> Figure:
    """An image and its patches in scan order: the sequence that is scanned forwards and backwards."""
    down, across = patches.grid(image)
    size, stride, start = patches.patch_size, patches.stride, patches.margin
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    whole, numbered = figure.subplots(1, 2)
    for axes in (whole, numbered):
        _show(axes, image)
    title = f"{down * across} patches in scan order"
    if size > stride:
        first = Rectangle((-0.5, -0.5), size, size, facecolor="none", edgecolor=_SKY, zorder=3)
        first.set(linestyle="--", linewidth=2, clip_on=False)
        numbered.add_patch(first)
        title += f"\n(dashed: all of patch 0, {size} × {size} px)"
    whole.set_title("image, {} × {} px".format(*image.shape), fontsize=10)
    numbered.set_title(title, fontsize=10)
    box = {"boxstyle": "round,pad=0.12", "facecolor": "white", "alpha": 0.75, "linewidth": 0}
    text: dict[str, Any] = {"ha": "center", "va": "center", "color": "#222222", "bbox": box}
    text["fontsize"] = min(9, 70 / max(down, across))
    for index in range(down * across):
        x, y = start + index % across * stride, start + index // across * stride
        numbered.add_patch(Rectangle((x, y), stride, stride, facecolor="none", edgecolor=_ORANGE, linewidth=0.9))
        numbered.text(x + stride / 2, y + stride / 2, str(index), **text)
    return figure


@styled
def matching_steps(
    image: _Image,
    merged: _Image,
    patches: Patches,
    *,
    pairs: Int[np.ndarray, "n 2"],
    similarity: Float[np.ndarray, "n"],
    groups: Int[np.ndarray, "t"],
) -> Figure:
    """Bipartite soft matching in four steps: two sets, each even token's best match, the most similar pairs, means.

    Args:
        merged: the image with every patch replaced by its token.
        pairs: each even token and its best match among the odd ones, most similar first.
        similarity: of the pairs, cosine.
        groups: the token that each patch has become part of.
    """
    down, across = patches.grid(image)
    r = len(groups) - len(np.unique(groups))
    figure = Figure(figsize=(12.8, 3.7))  # a fixed layout, as in `fusion_at_layer`
    places = {"left": 0.005, "right": 0.995, "bottom": 0.15, "top": 0.9, "wspace": 0.03}
    panels = figure.subplots(1, 4, gridspec_kw=places)
    for axes, shown in zip(panels, (image, image, image, merged), strict=True):
        _show(axes, shown)
    even = (np.arange(down * across) % 2 == 0).reshape(down, across, 1)
    patches.overlay(panels[0], np.where(even, (*to_rgb(_BLUE), 0.45), (*to_rgb(_ORANGE), 0.45)))
    at = patches.margin + patches.stride * (np.stack([pairs % across, pairs // across], axis=-1) + 0.5)
    for axes, count in ((panels[1], len(pairs)), (panels[2], r)):
        lines = LineCollection(list(at[:count]), array=similarity[:count], cmap="viridis", linewidths=2)
        lines.set_clim(min(0.9, similarity.min()), 1)
        axes.add_collection(lines)
        axes.plot(*at[:count, 0].T, ".", color=_BLUE, markersize=4)
        axes.plot(*at[:count, 1].T, ".", color=_ORANGE, markersize=4)
    below = figure.add_axes((0.28, 0.11, 0.18, 0.025))
    figure.colorbar(panels[1].collections[0], cax=below, orientation="horizontal")
    below.tick_params(labelsize=7)
    below.set_xlabel("cosine similarity", fontsize=8, labelpad=1)
    _colour_groups(panels[3], groups.reshape(down, across), patches, tint=0.0)
    titles = ["even tokens (blue), odd ones (orange)", "each even token's best match"]
    titles += [f"the {r} most similar", f"{len(groups) - r} tokens, each a mean"]
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, fontsize=10)
    return figure


@styled
def fusion_map(images: UInt8[np.ndarray, "b h w 3"], groups: _Groups, patches: Patches) -> Figure:
    """Where fusion happened: patches that became one token share a colour and an outline, single ones have none.

    One row per image, one picture per layer after the image itself, with the tokens left, class token included. A token
    has the colour of its first patch.
    """
    maps = _maps(images, groups, patches)
    b, across = len(images), min(1 + len(maps), 13)
    also = "" if patches.cls_index is None else ",\none class token"
    down = math.ceil((1 + len(maps)) / across)
    size = 1.35 if across > 5 else 1.9
    height = (size + (0.38 if down > 1 else 0.12)) * b * down + 0.4
    figure = Figure(figsize=(size * across, height), layout="constrained")
    panels = figure.subplots(b * down, across, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for row, image in enumerate(images):
        places = panels[row * down : (row + 1) * down].flat
        for layer, axes in zip((0, *maps), places, strict=False):
            _show(axes, image)
            title = f"layer {layer}\n{len(np.unique(groups[layer - 1][row]))} tokens" if layer else ""
            if layer:
                _colour_groups(axes, maps[layer][row], patches)
            if row == 0 or down > 1:
                axes.set_title(title or f"{math.prod(patches.grid(image))} patches{also}", **_TITLE)
    return figure


def fusion_animation(images: UInt8[np.ndarray, "b h w 3"], groups: _Groups, patches: Patches) -> Animation:
    """The fusion map as an animation: one frame for the images and one per layer, with the remaining tokens."""
    maps = _maps(images, groups, patches)

    @styled
    def frame(layer: int) -> Figure:
        b = len(images)
        figure = Figure(figsize=(1.8 * b + 2.8, 2.4), layout="constrained")
        *panels, last = figure.subplots(1, b + 1, width_ratios=[*[1.8] * b, 2.4])
        for index, axes in enumerate(panels):
            _show(axes, images[index])
            if layer:
                _colour_groups(axes, maps[layer][index], patches)
        _remaining_tokens(last, groups, layer)
        return figure

    return Animation(tuple(frame(layer) for layer in (0, *maps)))


@styled
def fusion_at_layer(
    image: _Image, groups: Sequence[Int[np.ndarray, "t"]], patches: Patches, *, layer: int, label: str = "image"
) -> Figure:
    """One image after one layer: which patches have fused, which stayed single, and the remaining tokens.

    Args:
        layer: counted from 1; 0 is the input, where every patch is a token.
        label: the title of the image.
    """
    batch = [tokens[None] for tokens in groups]
    maps = _maps(image[None], batch, patches)
    shape = patches.grid(image)
    salient = saliency(batch[:layer], patches)[0].reshape(shape) if layer else np.ones(shape)
    figure = Figure(figsize=(9.6, 2.7))  # a fixed layout: computing one takes as long as drawing, and sliders wait
    places = {"left": 0.01, "right": 0.99, "bottom": 0.17, "top": 0.9, "wspace": 0.0}
    grid = figure.add_gridspec(1, 5, width_ratios=[2.2, 2.2, 2.2, 0.45, 2.55], **places)
    whole, fused, heat, remaining = (figure.add_subplot(grid[column]) for column in (0, 1, 2, 4))
    for axes in (whole, fused):
        _show(axes, image)
    if layer:
        _colour_groups(fused, maps[layer][0], patches)
    _heat(heat, image, salient, patches)
    _remaining_tokens(remaining, groups, layer)
    whole.set_title(label, **_TITLE)
    fused.set_title(f"fused by layer {layer}" if layer else "the input", **_TITLE)
    heat.set_title("single patches (bright)", **_TITLE)
    return figure


def saliency(groups: _Groups, patches: Patches) -> Float[np.ndarray, "b _"]:
    """One over the number of patches in each patch's token, mean over the layers.

    1 is a patch that is never fused; one that resembles others tends to 0. It needs group sizes only, not attention,
    which this model does not have. The class token is not counted.
    """
    return np.mean([[1 / np.bincount(row)[row] for row in patches.of(tokens)] for tokens in groups], axis=0)


@styled
def saliency_map(images: UInt8[np.ndarray, "b h w 3"], groups: _Groups, patches: Patches) -> Figure:
    """`saliency` as heat over each image."""
    b = len(images)
    figure = Figure(figsize=(1.6 * b + 1.2, 3.4), layout="constrained")
    panels = figure.subplots(2, b, squeeze=False)
    for (whole, axes), image, values in zip(panels.T, images, saliency(groups, patches), strict=True):
        _show(whole, image)
        _heat(axes, image, values.reshape(patches.grid(image)), patches)
    bar = figure.colorbar(panels[1, 0].images[-1], ax=panels, shrink=0.9, aspect=24)
    bar.set_label(f"1 / patches in its token\nmean over {len(groups)} layer{'s' * (len(groups) > 1)}", fontsize=8.5)
    return figure


def _maps(images: np.ndarray, groups: _Groups, patches: Patches) -> dict[int, Int[np.ndarray, "b rows columns"]]:
    """For each layer the token of each patch."""
    shape = len(images), *patches.grid(images[0])
    return {layer: patches.of(joined).reshape(shape) for layer, joined in enumerate(groups, start=1)}


def _remaining_tokens(axes: Axes, groups: Sequence[np.ndarray], layer: int) -> None:
    """Tokens at the input and after each layer, class token included; equal for all images."""
    counts = [groups[0].shape[-1], *(int(tokens.max()) + 1 for tokens in groups)]
    axes.step(range(len(counts)), counts, where="mid", color="0.75", zorder=1)
    axes.plot(layer, counts[layer], "o", color=_BLUE, markersize=7, zorder=2)
    axes.set(ylim=(0, counts[0] * 1.08), xlabel="after layer", ylabel="tokens")
    axes.set_title(f"layer {layer}: {counts[layer]} tokens" if layer else f"input: {counts[0]} tokens", **_TITLE)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def _heat(axes: Axes, image: np.ndarray, values: np.ndarray, patches: Patches) -> None:
    _show(axes, np.repeat(image.mean(-1, keepdims=True), 3, axis=-1).astype(np.uint8))
    patches.overlay(axes, values, cmap="inferno", vmin=0, vmax=1)


def _show(axes: Axes, image: np.ndarray) -> None:
    axes.imshow(image, interpolation="nearest")
    axes.set_axis_off()


def _colour_groups(axes: Axes, groups: Int[np.ndarray, "rows columns"], patches: Patches, tint: float = 1.0) -> None:
    """Tint and outline the tokens of more than one patch."""
    _, first, inverse, count = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
    token = inverse.reshape(groups.shape)
    # Steps of the golden ratio keep the hues of neighbours apart; 34 of them are nearly whole turns: levels alternate.
    tints = [(*colorsys.hsv_to_rgb(i * 0.618034 % 1, *_LEVELS[i % len(_LEVELS)]), tint) for i in first]
    patches.overlay(axes, np.where((count > 1)[token, None], np.array(tints)[token], 0))
    # An outline between two cells of different tokens, one of them fused.
    ids, fused = np.pad(groups, 1, constant_values=-1), np.pad((count > 1)[token], 1)
    lines = []
    for axis in (0, 1):
        differs = np.diff(ids, axis=axis) != 0
        near = np.maximum(*(np.take(fused, range(i, fused.shape[axis] - 1 + i), axis) for i in (0, 1)))
        for row, column in np.argwhere(differs & near):
            # From the upper left corner of the cell, along its upper (axis 0) or left edge.
            x, y = column - 1 + axis, row - axis
            ends = np.array([(x, y), (x + 1 - axis, y + axis)])
            lines.append(patches.margin + patches.stride * ends)
    # White with a dark rim is visible on any image.
    axes.add_collection(LineCollection(lines, colors="#222222", linewidths=1.5, capstyle="round"))
    axes.add_collection(LineCollection(lines, colors="white", linewidths=0.7, capstyle="round"))
