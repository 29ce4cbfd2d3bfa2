import numpy as np

from famba import plots


def titles(figure):
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


def tints(axes):
    return np.asarray(axes.images[1].get_array())


def test_patches_of_one_token_share_a_colour_and_an_outline():
    images = np.full((1, 4, 4, 3), 100, np.uint8)
    # 2 x 2 patches and the class token in the middle (index 2); the left column becomes one token in layer 2.
    groups = [np.array([[0, 1, 2, 3, 4]]), np.array([[0, 1, 2, 0, 3]])]
    figure = plots.fusion_map(images, groups, patches=plots.Patches(2, 2, 2))
    assert titles(figure) == ["4 patches,\none class token", "layer 1\n5 tokens", "layer 2\n4 tokens"]
    _, before, after = figure.axes
    assert not tints(before).any()
    assert len(before.collections[0].get_segments()) == 0
    left, right = tints(after)[:, 0], tints(after)[:, 1]
    assert left[0].tolist() == left[1].tolist()
    assert left[0, 3] == 1, "the image behind does not change it"
    assert not right.any()
    # Round the left column, as x, y, x, y: 1 edge above, 1 below, 2 left, 2 right, and none inside.
    edges = np.array(after.collections[0].get_segments()).reshape(-1, 4)
    assert sorted(edges.tolist()) == sorted([
        [-0.5, -0.5, 1.5, -0.5], [-0.5, 3.5, 1.5, 3.5],
        [-0.5, -0.5, -0.5, 1.5], [-0.5, 1.5, -0.5, 3.5], [1.5, -0.5, 1.5, 1.5], [1.5, 1.5, 1.5, 3.5],
    ])  # fmt: skip


def test_two_tokens_differ_in_colour_and_a_token_keeps_its_own():
    images = np.zeros((1, 2, 4, 3), np.uint8)
    groups = [np.array([[0, 0, 1, 1, 2, 3, 4, 5]]), np.array([[0, 0, 1, 1, 0, 2, 3, 4]])]
    _, one, two = plots.fusion_map(images, groups, patches=plots.Patches(1, 1)).axes
    assert tints(one)[0, 0].tolist() != tints(one)[0, 2].tolist()
    assert tints(one)[0, 0].tolist() == tints(two)[0, 0].tolist() == tints(two)[1, 0].tolist()


def test_tokens_34_patches_apart_can_be_told_apart():
    images, groups = np.zeros((1, 1, 72, 3), np.uint8), [np.repeat(np.arange(36), 2)[None]]
    seen = tints(plots.fusion_map(images, groups, patches=plots.Patches(1, 1)).axes[1])[0, ::2]
    assert np.abs(seen[17:] - seen[:-17]).max(axis=-1).min() > 0.15


def test_overlapping_patches_are_drawn_as_their_centres():
    images = np.zeros((2, 8, 8, 3), np.uint8)
    groups = [np.tile(np.repeat(np.arange(18), 2), (2, 1))]
    figure = plots.fusion_map(images, groups, patches=plots.Patches(3, 1))
    assert figure.axes[1].images[1].get_extent() == [0.5, 6.5, 6.5, 0.5]
    assert tints(figure.axes[3]).shape == (6, 6, 4), "a second row for the second image"


def test_patches_are_numbered_in_scan_order():
    axes = plots.patch_grid(np.zeros((8, 6, 3), np.uint8), patches=plots.Patches(2, 2)).axes[1]
    at = {text.get_text(): text.get_position() for text in axes.texts}
    assert (at["0"], at["2"], at["3"], len(at)) == ((0.5, 0.5), (4.5, 0.5), (0.5, 2.5), 12)


def test_an_image_grid_shows_each_image_under_its_label():
    images = np.arange(3 * 2 * 2 * 3, dtype=np.uint8).reshape(3, 2, 2, 3)
    figure = plots.image_grid(images, ["a", "b", "c"])
    assert titles(figure) == ["a", "b", "c"]
    assert np.array_equal(figure.axes[2].images[0].get_array(), images[2])


# 2 x 2 patches and the class token in the middle (index 2); the left column becomes one token in layer 2, then all but
# the lower right patch.
HALVES = [np.array([[0, 1, 2, 3, 4]]), np.array([[0, 1, 2, 0, 3]]), np.array([[0, 0, 1, 0, 2]])]


def test_saliency_is_one_over_the_patches_of_a_token():
    np.testing.assert_allclose(plots.saliency(HALVES[:1], plots.Patches(2, 2, 2)), [[1, 1, 1, 1]])
    np.testing.assert_allclose(plots.saliency(HALVES[1:], plots.Patches(2, 2, 2)), [[5 / 12, 2 / 3, 5 / 12, 1]])
    np.testing.assert_allclose(plots.saliency([np.array([[0, 0, 1]])], plots.Patches(1, 1)), [[0.5, 0.5, 1]])


def test_a_saliency_map_lays_the_heat_over_the_patches():
    images = np.full((1, 6, 6, 3), 100, np.uint8)
    figure = plots.saliency_map(images, HALVES[1:], patches=plots.Patches(4, 2, 2))
    heat = figure.axes[1].images[-1]
    np.testing.assert_allclose(heat.get_array(), [[5 / 12, 2 / 3], [5 / 12, 1]])
    assert heat.get_extent() == [0.5, 4.5, 4.5, 0.5]
    assert (heat.get_clim(), heat.get_alpha()) == ((0, 1), None), "as in the colour bar"
    assert "mean over 2 layers" in figure.axes[-1].get_ylabel()


def test_fusion_at_layer_shows_one_layer_and_the_remaining_tokens():
    image = np.full((4, 4, 3), 100, np.uint8)
    groups = [layer[0] for layer in HALVES]
    figure = plots.fusion_at_layer(image, groups, layer=2, patches=plots.Patches(2, 2, 2), label="a cat")
    assert titles(figure) == ["a cat", "fused by layer 2", "single patches (bright)", "layer 2: 4 tokens"]
    _, fused, heat, left = figure.axes
    assert (tints(fused)[..., 3] > 0).tolist() == [[True, False], [True, False]]
    np.testing.assert_allclose(heat.images[-1].get_array(), [[0.75, 1], [0.75, 1]], err_msg="of layers 1 and 2")
    steps, here = left.get_lines()
    assert steps.get_ydata().tolist() == [5, 5, 4, 3]
    assert here.get_xydata().tolist() == [[2, 4]]
    start = plots.fusion_at_layer(image, groups, layer=0, patches=plots.Patches(2, 2, 2))
    assert titles(start)[1::2] == ["the input", "input: 5 tokens"]
    assert len(start.axes[1].images) == 1
    assert np.asarray(start.axes[2].images[-1].get_array()).tolist() == [[1, 1], [1, 1]]


def test_an_animation_has_a_frame_for_the_images_and_one_for_each_layer():
    images = np.full((1, 4, 4, 3), 100, np.uint8)
    film = plots.fusion_animation(images, HALVES, patches=plots.Patches(2, 2, 2))
    shown = [title for frame in film.frames for title in titles(frame)]
    assert shown == ["input: 5 tokens", "layer 1: 5 tokens", "layer 2: 4 tokens", "layer 3: 3 tokens"]
    assert (tints(film.frames[3].axes[0])[..., 3] > 0).tolist() == [[True, True], [True, False]]
