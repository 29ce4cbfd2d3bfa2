"""Sliders over a trained model: strategy, r, layer and image, and the picture of what fuses.

A change of strategy or r sends the image through the model again; layer and image only draw. The model's weights stay
as they are. Needs ipywidgets, of the extra `notebooks`; without a browser it works as an object.
"""

import functools

import ipywidgets

from famba import plots
from famba.analysis import tokens
from famba.analysis.tokens import Watched
from famba.fusion import strategies
from famba.fusion.strategies import STRATEGIES


class Explorer(ipywidgets.VBox):
    """Four controls and a picture; showing it in a notebook is all there is to do.

    Attributes:
        strategy, r, layer, image: the controls; setting their `value` draws anew.
        picture: the PNG that is shown.
    """

    def __init__(self, seen: Watched) -> None:
        self._seen = seen
        self._under, self._png = functools.cache(self._fuse), functools.cache(self._draw)
        depth, most = seen.model.depth, tokens.largest_r(seen.model, seen.strategy)
        names = [(f"{number}: {label}", number - 1) for number, label in enumerate(seen.labels, start=1)]
        self.strategy = ipywidgets.Dropdown(options=STRATEGIES, value=seen.strategy, description="strategy")
        self.r = ipywidgets.IntSlider(max(seen.model.schedule), 0, most, description="r", continuous_update=False)
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
        """No more than the strategy's layers can remove; a slider that ends lower takes its value along."""
        self.r.max = tokens.largest_r(self._seen.model, str(self.strategy.value))

    def _show(self, _: object = None) -> None:
        self.picture.value = self._png(*(control.value for control in self._controls()))

    def _draw(self, strategy: str, r: int, layer: int, image: int) -> bytes:
        seen = self._under(strategy, r)
        figure = plots.fusion_closer(
            seen.images[image],
            [groups[image] for groups in tokens.groups(seen.trace)],
            layer=layer,
            label=f"{seen.labels[image]}, taken for {seen.predicted[image]}",
            **seen.patches,
        )
        return figure._repr_png_()

    def _fuse(self, strategy: str, r: int) -> Watched:
        asked = None if strategy == "none" else r
        return tokens.under(self._seen, strategies.schedule(strategy, depth=self._seen.model.depth, r=asked))
