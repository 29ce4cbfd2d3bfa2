"""Sliders over a trained model: strategy, r, layer and image, and the picture of what fuses.

Another strategy or r runs the model again; layer and image only draw. The weights are not changed. Needs ipywidgets, of
the extra `notebooks`; without a browser it works as an object.
"""

import functools

import ipywidgets

from famba import plots
from famba.analysis import tokens
from famba.analysis.tokens import Traced
from famba.fusion import strategies
from famba.fusion.strategies import STRATEGIES


class Explorer(ipywidgets.VBox):
    """Four controls and a picture, to be shown in a notebook.

    Attributes:
        strategy, r, layer, image: the controls; a new `value` redraws.
        picture: a PNG.
    """

    def __init__(self, traced: Traced) -> None:
        self._traced = traced
        self._scheduled, self._png = functools.cache(self._fuse), functools.cache(self._draw)
        depth, most = traced.model.depth, tokens.largest_r(traced.model, traced.strategy)
        names = [(f"{number}: {label}", number - 1) for number, label in enumerate(traced.labels, start=1)]
        self.strategy = ipywidgets.Dropdown(options=STRATEGIES, value=traced.strategy, description="strategy")
        self.r = ipywidgets.IntSlider(max(traced.model.schedule), 0, most, description="r", continuous_update=False)
        self.layer = ipywidgets.IntSlider(depth, 0, depth, description="layer", continuous_update=False)
        self.image = ipywidgets.SelectionSlider(options=names, description="image", continuous_update=False)
        self.picture = ipywidgets.Image(format="png")
        self.strategy.observe(self._limit_r, "value")
        for control in self._controls():
            control.observe(self._show, "value")
        self._show()
        rows = [ipywidgets.HBox([self.strategy, self.r]), ipywidgets.HBox([self.layer, self.image])]
        super().__init__([*rows, self.picture])

    def _controls(self) -> tuple:
        return self.strategy, self.r, self.layer, self.image

    def _limit_r(self, _: object) -> None:
        """At most what the strategy can remove; a lower maximum lowers the value."""
        self.r.max = tokens.largest_r(self._traced.model, str(self.strategy.value))

    def _show(self, _: object = None) -> None:
        self.picture.value = self._png(*(control.value for control in self._controls()))

    def _draw(self, strategy: str, r: int, layer: int, image: int) -> bytes:
        traced = self._scheduled(strategy, r)
        groups = [tokens_of[image] for tokens_of in tokens.groups(traced.trace)]
        label = f"{traced.labels[image]}, predicted {traced.predicted[image]}"
        patches = plots.Patches(**traced.patches)
        figure = plots.fusion_at_layer(traced.images[image], groups, patches, layer=layer, label=label)
        return figure._repr_png_()

    def _fuse(self, strategy: str, r: int) -> Traced:
        asked = None if strategy == "none" else r
        return tokens.with_schedule(
            self._traced, strategies.schedule(strategy, depth=self._traced.model.depth, r=asked)
        )
