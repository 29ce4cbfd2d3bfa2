"""What can be played with in the notebooks: a schedule by sliders, a matching, the tokens of trained models, a schedule
of one's own to train. Needs ipywidgets, of the extra `notebooks`; without a browser each works as an object.
"""

import dataclasses
import functools
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ipywidgets
import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch.nn import functional

from famba import config, create_model, data, fuse, match_tokens, plots
from famba.analysis import summary, tokens
from famba.analysis.tokens import Traced
from famba.bench.timing import predicted_ms
from famba.errors import FambaError, InputError
from famba.experiments import sweep
from famba.fusion import merge, strategies
from famba.fusion.strategies import STRATEGIES
from famba.profiling import flops
from famba.reports import Report
from famba.training import fit

# r and first fusing layer of the paper's Table 1.
_PAPER = {"none": (0, 1), "all": (7, 1), "interleaved": (14, 1), "lower": (9, 1), "upper": (9, 6)}
_TRAINED = "as trained"


def _dropdown(description: str, options: Any, value: Any) -> ipywidgets.Dropdown:
    return ipywidgets.Dropdown(options=options, value=value, description=description)


def _slider(description: str, value: int, low: int, high: int) -> ipywidgets.IntSlider:
    return ipywidgets.IntSlider(value, low, high, description=description, continuous_update=False)


def _picture(width: str) -> ipywidgets.Image:
    return ipywidgets.Image(format="png", layout=ipywidgets.Layout(max_width=width, object_fit="contain"))


def _refused(error: Exception) -> str:
    return f'<span style="color: #d62728">{html.escape(str(error))}</span>'


class ScheduleExplorer(ipywidgets.VBox):
    """Strategy, r and first fusing layer of Vim-Ti at 224 pixels, and what follows: tokens, FLOPs, memory and time."""

    def __init__(self) -> None:
        self._sizes = create_model("vim_tiny", num_classes=100).config
        measured = json.loads((config.root() / "results" / "benchmark.json").read_bytes())
        self._batch = measured["setting"]["batch"]
        self._ms = {row["tokens"]: row["median_ms"] for row in measured["lengths"]}
        self.strategy = _dropdown("strategy", STRATEGIES, "upper")
        self.r = _slider("r", 9, 0, 60)
        self.first_layer = _slider("first layer", 6, 1, self._sizes["depth"])
        self.picture, self.table = _picture("48em"), ipywidgets.HTML()
        controls = self.strategy, self.r, self.first_layer
        self.strategy.observe(self._set_as_in_the_paper, "value")
        for control in controls:
            control.observe(self._show, "value")
        self._show()
        super().__init__([ipywidgets.HBox(controls), self.table, self.picture])

    def _set_as_in_the_paper(self, _: object) -> None:
        self.r.value, self.first_layer.value = _PAPER[str(self.strategy.value)]

    def _show(self, _: object = None) -> None:
        depth, name = self._sizes["depth"], str(self.strategy.value)
        given = {} if name == "none" else {"r": self.r.value, "first_layer": self.first_layer.value}
        try:
            schedule = strategies.schedule(name, depth=depth, **given)
            columns = {"no fusion": self._costs([0] * depth), name: self._costs(schedule)}
        except InputError as error:
            self.table.value = _refused(error)
            return
        frame = summary.schedule_frame({"none": [0] * depth, name: schedule}, tokens=max(self._ms))
        self.picture.value = plots.tokens_per_layer(frame)._repr_png_()
        table = pd.DataFrame(columns)
        table["ratio"] = table[name] / table["no fusion"]
        self.table.value = table.to_html(float_format="{:,.2f}".format, na_rep="too few tokens to say", border=0)

    def _costs(self, schedule: Sequence[int]) -> dict[str, Any]:
        cost = flops.analyse(self._sizes, schedule, batch=self._batch, backend="native")
        try:
            time_s = predicted_ms(cost.token_counts[1:], self._ms) / 1000
        except InputError:  # shorter than what was measured
            time_s = float("nan")
        return {
            "tokens after the last layer": cost.token_counts[-1],
            "FLOPs of an image (G)": cost.flops / self._batch / 1e9,
            f"memory of a training step of {self._batch} images (GiB)": cost.peak_bytes / 2**30,
            "time of that step, predicted from its tokens (s)": time_s,
        }


class MatchingExplorer(ipywidgets.VBox):
    """Matching and merging step by step, on the pixels of an image's patches."""

    def __init__(self, images: Mapping[str, Path], *, patch_size: int = 16, img_size: int = 224) -> None:
        self._pixels = {name: data.read_image(path, img_size) for name, path in images.items()}
        self._patches = plots.Patches(patch_size, patch_size)
        self.image = _dropdown("image", list(images), next(iter(images)))
        self.r = _slider("r", 40, 0, (img_size // patch_size) ** 2 // 2)
        self.picture = _picture("80em")
        for control in (self.image, self.r):
            control.observe(self._show, "value")
        self._show()
        super().__init__([ipywidgets.HBox([self.image, self.r]), self.picture])

    def _show(self, _: object = None) -> None:
        figure = matching_steps(self._pixels[str(self.image.value)], self._patches, self.r.value)
        self.picture.value = figure._repr_png_()


def matching_steps(pixels: torch.Tensor, patches: plots.Patches, r: int) -> plots.Figure:
    """`plots.matching_steps` of an image (3, h, w) whose tokens are the pixels of its patches."""
    x = functional.unfold(pixels[None].float() / 255, patches.patch_size, stride=patches.stride).mT
    chosen = match_tokens(x, x.shape[1] // 2)  # every even token's best; the most similar come first
    taken, similarity = match_tokens(x, r), chosen.similarity
    assert similarity is not None
    groups = merge.plan(taken, torch.ones(x.shape[:2], dtype=x.dtype)).destination
    spread = fuse(x, taken)[0].gather(1, groups[..., None].expand_as(x)).mT
    merged = functional.fold(spread, tuple(pixels.shape[1:]), patches.patch_size, stride=patches.stride)
    image, means = (x.permute(1, 2, 0).numpy() for x in (pixels, (255 * merged[0]).round().to(torch.uint8)))
    pairs = torch.stack([chosen.source[0], chosen.target[0]], 1).numpy()
    of_image = {"similarity": similarity[0].numpy(), "groups": groups[0].numpy()}
    return plots.matching_steps(image, means, patches, pairs=pairs, **of_image)


class TokenExplorer(ipywidgets.VBox):
    """Trained models, their images or one's own, and the picture of what fuses by any strategy, layer by layer.

    Another model, strategy or r runs a model again; layer and image only draw. The weights are not changed.
    """

    def __init__(self, models: Mapping[str, Traced]) -> None:
        self._models = dict(models)
        self._scheduled, self._png = functools.cache(self._fuse), functools.cache(self._draw)
        self.model = _dropdown("model", list(models), next(iter(models)))
        self.strategy = _dropdown("strategy", (_TRAINED, *STRATEGIES), _TRAINED)
        self.r, self.layer = _slider("r", 0, 0, 0), _slider("layer", 0, 0, 0)
        self.image = _dropdown("image", [("", 0)], 0)
        self.r.disabled = True
        self.upload = ipywidgets.FileUpload(accept="image/*", multiple=True, description="own images")
        self.picture, self.message = _picture("64em"), ipywidgets.HTML()
        self._controls, self._choosing = (self.model, self.strategy, self.r, self.layer, self.image), False
        self.model.observe(self._choose_model, "value")
        self.strategy.observe(self._set_r, "value")
        self.upload.observe(self._take, "value")
        for control in self._controls:
            control.observe(self._show, "value")
        self._choose_model()
        rows = [(self.model, self.strategy, self.r), (self.layer, self.image, self.upload), (self.message,)]
        super().__init__([*(ipywidgets.HBox(row) for row in rows), self.picture])

    def _choose_model(self, _: object = None) -> None:
        """Begin with the schedule that a model was trained with, after its last layer."""
        traced, self._choosing = self._models[str(self.model.value)], True
        self.strategy.value = _TRAINED
        self.layer.max = self.layer.value = traced.model.depth
        self.image.options = [(f"{number}: {label}", number - 1) for number, label in enumerate(traced.labels, start=1)]
        self._choosing = False
        self._show()

    def _set_r(self, _: object) -> None:
        """Begin with about as many tokens in all as the model was trained to remove; at most what a strategy can."""
        model, name = self._models[str(self.model.value)].model, str(self.strategy.value)
        fuses = name not in (_TRAINED, "none")
        self.r.disabled, self.r.max = not fuses, tokens.largest_r(model, name) if fuses else 0
        total = sum(model.schedule)
        self.r.value = max(strategies.schedule(name, depth=model.depth, total=total)) if fuses else 0

    def _take(self, _: object) -> None:
        """Look at the uploaded images instead, with every model."""
        names, images = [], []
        for file in self.upload.value:
            try:
                images.append(np.asarray(Image.open(io.BytesIO(file["content"])).convert("RGB")))
                names.append(file["name"])
            except OSError:
                self.message.value = _refused(InputError(f"{file['name']}: not an image, or a damaged one"))
                return
        self.message.value = ""
        self._models = {
            key: dataclasses.replace(tokens.trace(each.model, each.described, images), labels=names)
            for key, each in self._models.items()
        }
        self._scheduled.cache_clear()
        self._png.cache_clear()
        self._choose_model()

    def _show(self, _: object = None) -> None:
        if not self._choosing:
            self.picture.value = self._png(*(control.value for control in self._controls))

    def _draw(self, model: str, strategy: str, r: int, layer: int, image: int) -> bytes:
        traced = self._scheduled(model, strategy, r)
        groups = [tokens_of[image] for tokens_of in tokens.groups(traced.trace)]
        label = f"{traced.labels[image]}, predicted {traced.predicted[image]}"
        patches = plots.Patches(**traced.patches)
        figure = plots.fusion_at_layer(traced.images[image], groups, patches, layer=layer, label=label)
        return figure._repr_png_()

    def _fuse(self, model: str, strategy: str, r: int) -> Traced:
        traced, asked = self._models[model], None if strategy == "none" else r
        if strategy == _TRAINED:
            return traced
        return tokens.with_schedule(traced, strategies.schedule(strategy, depth=traced.model.depth, r=asked))


class ScheduleTrainer(ipywidgets.VBox):
    """A slider for each layer, a button that trains the schedule, and where it lands beside the named strategies."""

    def __init__(self, report: Report, seed: int = 0) -> None:
        self._profile, self._seed = report.profile, seed
        self._runs, self._table = report.table("runs.csv"), report.table("summary.csv")
        p = config.load(report.profile, strategy="upper")
        depth, self._tokens = sweep.depth_and_tokens(p)
        layout = ipywidgets.Layout(width="3.2em", height="14em", overflow="visible")
        self.removed = tuple(
            ipywidgets.IntSlider(r, 0, self._tokens // 2, description=str(layer), orientation="vertical", layout=layout)
            for layer, r in enumerate(p.schedule(depth), start=1)
        )
        self.train = ipywidgets.Button(description="train", button_style="primary")
        self.progress = ipywidgets.IntProgress(0, 0, p.train.epochs)
        self.picture, self.message = _picture("48em"), ipywidgets.HTML()
        self.train.on_click(self._train)
        for slider in self.removed:
            slider.observe(self._show, "value")
        self._show()
        self._draw()
        rows = [ipywidgets.HBox(self.removed), ipywidgets.HBox([self.train, self.progress, self.message])]
        super().__init__([*rows, self.picture])

    @property
    def schedule(self) -> list[int]:
        return [slider.value for slider in self.removed]

    def _show(self, _: object = None) -> None:
        try:
            left = strategies.token_counts(self.schedule, self._tokens)[-1]
            self.message.value, self.train.disabled = f"{self._tokens} tokens, {left} left", False
        except InputError as error:
            self.message.value, self.train.disabled = _refused(error), True

    def _train(self, _: object) -> None:
        """Train with the seed, as every strategy was, and add the run to the figure."""
        name = f"own_{self._table['strategy'].str.startswith('own_').sum() + 1}"
        p = config.load(self._profile, strategy=name, given={f"fusion.{name}.schedule": self.schedule})
        self.train.disabled = True
        try:
            run = fit.fit(p, seed=self._seed, callbacks=[self._advance])
        except FambaError as error:
            self.message.value = _refused(error)
            return
        finally:
            self.train.disabled = False
        fit.forget(p, seed=self._seed)
        cost = {key: run.cost[key] for key in ("flops_per_image", "peak_memory_mib")}
        top1 = run.metrics["top1_percent"]
        line = np.polyfit(self._table["flops_per_image"], self._table["time_ratio"], 1)
        ratio = float(np.polyval(line, cost["flops_per_image"]))
        of_caption = ["batch_size", "rounds", "device", "threads", "disturbed"]  # `cost.caption` reads them
        row = self._table.query("strategy == 'none'")[of_caption].iloc[0].to_dict() | cost
        row |= {"strategy": name, "n": 1, "top1_percent_mean": top1, "time_ratio": ratio}
        row |= {"time_ratio_low": ratio, "time_ratio_high": ratio}
        self._table = pd.concat([self._table, pd.DataFrame([row])], ignore_index=True)
        of_none = self._runs.query(f"strategy == 'none' and seed == {self._seed}")["top1_percent"]
        beside = "".join(f" (none: {x:.1f} %)" for x in of_none)
        shown = pd.DataFrame([{"strategy": name, "seed": self._seed, "top1_percent": top1}])
        self._runs = pd.concat([self._runs, shown], ignore_index=True)
        told = f"{name}: {top1:.1f} % with seed {self._seed}{beside}"
        self.message.value = f"{told}; about {ratio:.2f} of the time of no fusion"
        self._draw()

    def _advance(self, history: Sequence[Mapping[str, Any]], _: Mapping[str, float] | None = None) -> None:
        self.progress.value = len(history)

    def _draw(self) -> None:
        self.picture.value = plots.accuracy_against(self._runs, self._table, "time_ratio")._repr_png_()
