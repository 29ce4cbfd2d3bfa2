"""Figures: one function each, a tidy frame in, a figure out."""

from famba.plots.benchmarks import benchmark, gpu_benchmark
from famba.plots.results import (
    ablation,
    ablations,
    accuracy_against,
    costs,
    fusing_costs,
    paired_accuracy,
    paper_memory,
    strategies_overview,
    tokens_per_layer,
    training_curves,
)
from famba.plots.scaling import growth
from famba.plots.similarity import fused_distance, similarity_heatmaps, token_similarity, token_size
from famba.plots.style import GREY, STRATEGY_COLOURS, Animation, Figure, P, caption, save, styled
from famba.plots.tokens import (
    Patches,
    fusion_animation,
    fusion_at_layer,
    fusion_map,
    image_grid,
    matching_steps,
    patch_grid,
    saliency,
    saliency_map,
)

__all__ = [
    "GREY",
    "STRATEGY_COLOURS",
    "Animation",
    "Figure",
    "P",
    "Patches",
    "ablation",
    "ablations",
    "accuracy_against",
    "benchmark",
    "caption",
    "costs",
    "fused_distance",
    "fusing_costs",
    "fusion_animation",
    "fusion_at_layer",
    "fusion_map",
    "gpu_benchmark",
    "growth",
    "image_grid",
    "matching_steps",
    "paired_accuracy",
    "paper_memory",
    "patch_grid",
    "saliency",
    "saliency_map",
    "save",
    "similarity_heatmaps",
    "strategies_overview",
    "styled",
    "token_similarity",
    "token_size",
    "tokens_per_layer",
    "training_curves",
]
