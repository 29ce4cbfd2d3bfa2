"""What can be watched while a run goes on: each epoch once, whatever happened meanwhile."""

import base64
import io
import sys
from types import SimpleNamespace

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

from famba import config
from famba.errors import InputError
from famba.storage import runs
from famba.training import callbacks


def epochs(count: int, **changes) -> list[dict]:
    return [
        {
            "epoch": epoch,
            "lr": 0.001,
            "train_loss": 2.0 / epoch,
            "train_top1_percent": 10.0 * epoch,
            "val_loss": 2.2 / epoch,
            "val_top1_percent": 9.0 * epoch,
            "val_top5_percent": 15.0 * epoch,
            "ema_val_loss": None,
            "ema_val_top1_percent": None,
            **changes,
        }
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
    with Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))) as shown:
        assert shown.convert("RGB").tobytes() == pixels(callbacks._png(epochs(3), 3))
        assert shown.convert("RGB").tobytes() != pixels(callbacks._png(epochs(1), 3))


def pixels(png: bytes) -> bytes:
    with Image.open(io.BytesIO(png)) as image:
        return image.convert("RGB").tobytes()


class Shell:
    """What a kernel shows, and a clock by which drawing takes a second."""

    def __init__(self, monkeypatch):
        self.shown, self.now = [], 100.0
        monkeypatch.setattr(callbacks, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(callbacks, "_in_notebook", lambda: True)
        monkeypatch.setattr("IPython.display.display", self.display)
        monkeypatch.setattr(callbacks, "_png", self.drawn)

    def drawn(self, history, epochs):
        self.now += 1
        return bytes([len(history)])

    def display(self, image, *, display_id):
        assert display_id is True
        self.shown.append(image.data)
        return self

    def update(self, image):
        self.shown.append(image.data)


def test_the_first_and_the_last_epoch_are_drawn_and_between_them_a_twentieth_of_the_time(monkeypatch):
    shell, curves = Shell(monkeypatch), callbacks.Curves(50)
    for count in range(1, 51):
        curves(epochs(count))
        shell.now += 1
    assert [image[0] for image in shell.shown] == [1, 20, 39, 50]


def test_every_epoch_is_drawn_where_the_last_is_not_known(monkeypatch):
    shell, curves = Shell(monkeypatch), callbacks.Curves()
    for count in (1, 2, 3):
        curves(epochs(count), {"throughput_img_s": 1.0})
    assert shell.shown == [b"\1", b"\2", b"\3"]


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


def test_tensorboard_reads_every_column_and_the_cost_by_epoch(tmp_path):
    events = callbacks.Events(tmp_path, start_epoch=0)
    for count in (1, 2):
        events(epochs(count), {"throughput_img_s": 100.0 * count, "peak_memory_mib": 64.0})
    read = scalars(tmp_path)  # while it goes on
    events.close()
    written = {key for key in runs.HISTORY_COLUMNS if key != "epoch" and not key.startswith("ema_")}
    assert set(read) == written | {"throughput_img_s", "peak_memory_mib"}
    assert read["train_loss"] == [(1, 2.0), (2, 1.0)]
    assert read["throughput_img_s"] == [(1, 100.0), (2, 200.0)]


def test_a_run_that_goes_on_from_an_earlier_epoch_has_each_once(tmp_path):
    events = callbacks.Events(tmp_path, start_epoch=0)
    for count in (1, 2, 3):
        events(epochs(count))
    events.close()  # killed after epoch 3, before its checkpoint
    events = callbacks.Events(tmp_path, start_epoch=2)
    for count in (3, 4):
        events(epochs(count, lr=0.5))
    events.close()
    assert scalars(tmp_path)["lr"] == [(1, pytest.approx(0.001)), (2, pytest.approx(0.001)), (3, 0.5), (4, 0.5)]


def test_a_missing_tensorboard_is_an_error_that_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match=r"train\.tensorboard.*pip install 'famba\[paper\]'$"):
        callbacks.Events(tmp_path, start_epoch=0)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_to_is_an_input_error_of_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="file/events: cannot be written") as caught:
        callbacks.Events(tmp_path / "file" / "events", start_epoch=0)
    assert "\n" not in str(caught.value)
