import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from famba import plots
from famba.errors import InputError
from famba.plots import style
from famba.plots.style import Animation


def film(colours=("red", "blue", "green")):
    """A small square that changes its colour."""

    @style.styled
    def frame(colour):
        figure = style.Figure(figsize=(1, 1))
        figure.add_axes((0, 0, 1, 1)).set(facecolor=colour)
        return figure

    return Animation(tuple(frame(colour) for colour in colours))


def test_an_animation_is_saved_as_a_gif_that_shows_each_frame_and_rests_on_the_last(tmp_path):
    path = plots.save(film(), tmp_path / "deep" / "a.gif")
    with Image.open(path) as gif:
        assert gif.n_frames == 3
        assert gif.info["loop"] == 0, "for ever"
        durations, middles = [], []
        for index in range(gif.n_frames):
            gif.seek(index)
            durations.append(gif.info["duration"])
            middles.append(gif.convert("RGB").getpixel((30, 26)))
    assert durations == [700, 700, 2100]
    np.testing.assert_allclose(middles, [(255, 0, 0), (0, 0, 255), (0, 128, 0)], atol=3)


def test_an_unchanged_animation_is_saved_as_the_same_bytes(tmp_path):
    path = tmp_path / "a.gif"
    first = plots.save(film(), path).read_bytes()
    assert plots.save(film(), path).read_bytes() == first
    assert plots.save(film(("red", "blue", "black")), path).read_bytes() != first


def test_a_notebook_plays_an_animation():
    shown = film()._repr_html_()
    described, source = re.fullmatch(r'<img alt="(.+)" src="data:image/gif;base64,(.+)">', shown).groups()
    assert described == repr(film()) == "Animation of 3 frames"
    with Image.open(io.BytesIO(base64.b64decode(source))) as gif:
        assert gif.n_frames == 3


def test_a_suffix_of_the_other_kind_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"a\.png: animations are saved as \.gif"):
        plots.save(film(), tmp_path / "a.png")
    with pytest.raises(InputError, match=r"a\.jpg: figures are saved as \.png or \.svg"):
        plots.save(film().frames[0], tmp_path / "a.jpg")
