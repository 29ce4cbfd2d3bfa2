"""What can be watched while a run goes on: each epoch once, whatever happened meanwhile."""

import base64
import io
import sys
from types import SimpleNamespace
from unittest import mock

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image
from refusals import refusal

from famba import config
from famba.storage import runs
from famba.training import callbacks


def epochs(count: int, **changes) -> list[dict]:
    averaged = {"ema_val_loss": None, "ema_val_top1_percent": None}
    return [
        dict.fromkeys(runs.HISTORY_COLUMNS, 2.0 / epoch) | averaged | {"epoch": epoch} | changes
        for epoch in range(1, count + 1)
    ]


def test_a_notebook_holds_one_figure_that_is_the_newest():
    watched = (
        f"from famba.training import callbacks\ncurves, history = callbacks.Curves(3), {epochs(3)}\n"
        "for count in (1, 2, 3):\n    curves(history[:count])"
    )
    cells = [nbformat.v4.new_code_cell(source) for source in (watched, "curves(history[:1])")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(config.root())}}).execute()
    (output,) = notebook.cells[0].outputs  # and so nothing on stderr
    shown = pixels(base64.b64decode(output.data["image/png"]))
    assert shown == pixels(callbacks._png(epochs(3), 3))
    assert shown != pixels(callbacks._png(epochs(1), 3))


def pixels(png: bytes) -> bytes:
    with Image.open(io.BytesIO(png)) as image:
        return image.convert("RGB").tobytes()


@pytest.fixture
def shell(monkeypatch):
    """A kernel's, with the lengths of the histories that were drawn, and a clock by which drawing takes a second."""
    shell = SimpleNamespace(drawn=[], now=100.0, kernel=None)

    def draw(history, epochs):
        shell.now += 1
        shell.drawn.append(len(history))
        return b"png"

    monkeypatch.setattr(callbacks, "time", SimpleNamespace(monotonic=lambda: shell.now))
    monkeypatch.setattr(callbacks, "_notebook_shell", lambda: shell)
    monkeypatch.setattr("IPython.display.display", mock.Mock())
    monkeypatch.setattr(callbacks, "_png", draw)
    return shell


@pytest.mark.parametrize(("of", "drawn"), [(50, [1, 20, 39, 50]), (None, [*range(1, 51)])])
def test_drawing_takes_a_twentieth_of_the_time_between_first_and_last_epoch_where_the_last_is_known(shell, of, drawn):
    curves = callbacks.Curves(of)
    for count in range(1, 51):
        curves(epochs(count), {"throughput_img_s": 1.0})
        shell.now += 1
    assert shell.drawn == drawn


def test_only_the_last_epoch_is_drawn_where_the_pipeline_runs_the_notebook(shell):
    del shell.kernel
    curves = callbacks.Curves(3)
    for count in range(1, 4):
        curves(epochs(count))
        shell.now += 100
    assert shell.drawn == [3]


def test_outside_a_notebook_nothing_is_drawn_or_printed(monkeypatch, capsys):
    monkeypatch.setattr(callbacks, "_png", None)  # would fail
    callbacks.Curves(3)(epochs(3))
    assert capsys.readouterr() == ("", "")


def test_the_moving_average_is_drawn_where_there_is_one():
    without, averaged = epochs(3), epochs(3, ema_val_loss=1.0, ema_val_top1_percent=50.0)
    assert pixels(callbacks._png(without, 3)) != pixels(callbacks._png(averaged, 3))


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_reads_every_column_and_the_cost_by_epoch_each_once_after_a_kill(tmp_path):
    def write(events, *counts, **changes):
        for count in counts:
            events(epochs(count, **changes), {"throughput_img_s": 100.0 * count, "peak_memory_mib": 64.0})

    events = callbacks.Events(tmp_path, start_epoch=0)
    write(events, 1, 2, 3)
    assert scalars(tmp_path)["lr"][:2] == [(1, 2.0), (2, 1.0)], "while it goes on"
    events.close()  # killed after epoch 3, before its checkpoint
    events = callbacks.Events(tmp_path, start_epoch=2)
    write(events, 3, 4, lr=0.25)
    events.close()
    read = scalars(tmp_path)
    written = {key for key in runs.HISTORY_COLUMNS if key != "epoch" and not key.startswith("ema_")}
    assert set(read) == written | {"throughput_img_s", "peak_memory_mib"}
    assert read["lr"] == [(1, 2.0), (2, 1.0), (3, 0.25), (4, 0.25)]
    assert read["throughput_img_s"] == [(1, 100.0), (2, 200.0), (3, 300.0), (4, 400.0)]


def test_a_missing_tensorboard_is_an_error_that_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert refusal(lambda: callbacks.Events(tmp_path, start_epoch=0)).endswith("pip install 'famba[paper]'")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_to_is_an_input_error_of_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    said = refusal(lambda: callbacks.Events(tmp_path / "file" / "events", start_epoch=0))
    assert said.startswith(f"{tmp_path}/file/events: cannot be written")
