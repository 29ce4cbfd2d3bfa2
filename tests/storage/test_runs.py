import copy
import dataclasses
import functools
import json
import math
import operator
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from refusals import refusal

from famba import config
from famba.storage import runs

FILES = [f"{name}.json" for name in ("metrics", "cost", "schedule", "params")]
FILES += ["history.csv", "correct.txt", "model.safetensors"]


def make_run(strategy="upper", seed=0, **changes):
    """A finished run of a two-layer model, as training would hand it over."""
    scores = {"top1_percent": 95.0, "top5_percent": 99.5, "loss": 0.25}
    history = [
        {
            "epoch": epoch,
            "lr": 0.1 + 0.2,  # 0.30000000000000004: every digit must come back
            "train_loss": 2.0 / epoch,
            "train_top1_percent": 40.0 * epoch,
            "val_loss": 1.9 / epoch,
            "val_top1_percent": 45.0 * epoch,
            "val_top5_percent": 49.0 * epoch,
            "ema_val_loss": None,
            "ema_val_top1_percent": None,
        }
        for epoch in (1, 2)
    ]
    run = runs.Run(
        strategy=strategy,
        seed=seed,
        profile="smoke",
        schedule=[0, 4],
        token_counts=[17, 17, 13],
        metrics={
            **scores,
            "chosen": {"weights": "raw", "epoch": 2},
            "validation": {"raw": {"last": {**scores, "epoch": 2}, "best": {**scores, "epoch": 2}}, "ema": None},
        },
        cost={
            "train_time_s": 12.5,
            "step_time_ms": 40.0,
            "data_time_ms": 0.5,
            "peak_memory_mib": 100.0,
            "throughput_img_s": 1600.0,
            "flops_per_image": 1_000_000,
            "params_count": 5000,
            "device": "CPU of a test",
            "threads": 2,
            "versions": {"torch": "2.13.0"},
            "command": "python -m famba train",
            "kernels": {"scan": "native", "instruction_set": "avx2"},
            "nondeterministic": [],
            "epoch_time_s": [6.0, 6.5],
        },
        history=history,
        correct="1" * 18 + "-01",
        params=config.load("smoke", strategy=strategy).as_dict(),
        model_bytes=b"weights",
    )
    return dataclasses.replace(run, **changes)


def test_a_run_reads_back_as_it_was_written(tmp_path):
    run = make_run()
    assert runs.write(run, tmp_path / "run") == tmp_path / "run"
    record = runs.read(tmp_path / "run")
    for field in dataclasses.fields(runs.RunRecord):
        assert getattr(record, field.name) == getattr(run, field.name), field.name
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == b"weights"
    assert {file.name for file in (tmp_path / "run").iterdir()} == set(FILES)


def test_metrics_json_is_written_last_and_taken_away_first(tmp_path, monkeypatch):
    runs.write(make_run(), tmp_path / "run")
    written = []
    write_atomic = runs.write_atomic

    def watched(path, content):
        assert not (tmp_path / "run" / "metrics.json").exists()
        written.append(path.name)
        write_atomic(path, content)

    monkeypatch.setattr(runs, "write_atomic", watched)
    runs.write(make_run(), tmp_path / "run")
    assert len(written) == 7
    assert written[-1] == "metrics.json"


def test_a_relative_folder_lies_in_the_repository_whatever_the_working_directory(repository, monkeypatch):
    (repository / "notebooks").mkdir()
    monkeypatch.chdir(repository / "notebooks")
    assert runs.write(make_run(), "results/run") == repository / "results" / "run"
    assert runs.read("results/run").strategy == "upper"


def spoil(tree, path, value):
    tree = copy.deepcopy(tree)
    *parents, last = path
    at = functools.reduce(operator.getitem, parents, tree)
    if value is KeyError:
        del at[last]
    else:
        at[last] = value
    return tree


@pytest.mark.parametrize(
    ("file", "path", "value", "said"),
    [
        ("metrics.json", ("top1_percent",), KeyError, r"metrics\.json: top1_percent: missing"),
        ("metrics.json", ("top1_percent",), 101.0, r"top1_percent: 101\.0: Input should be less than or equal to 100"),
        ("metrics.json", ("loss",), True, "loss: True: Input should be a valid number"),
        ("metrics.json", ("loss",), float("nan"), r"metrics\.json: not readable as JSON: NaN is not a finite number"),
        ("metrics.json", ("seed",), "0", "seed: '0': Input should be a valid integer"),
        ("metrics.json", ("strategy",), "lower", "strategy: 'upper'; metrics.json says 'lower'"),
        ("metrics.json", ("profile",), "paper", r"params\.json: profile: 'smoke'; metrics\.json says 'paper'"),
        ("metrics.json", ("chosen", "weights"), "last", r"chosen\.weights: 'last': Input should be 'raw' or 'ema'"),
        ("metrics.json", ("chosen", "weights"), "ema", "must hold raw and ema, and scores of the chosen ema"),
        ("metrics.json", ("validation", "raw", "best", "loss"), KeyError, r"validation\.raw\.best\.loss: missing"),
        ("metrics.json", ("validation", "ema"), KeyError, "validation: .*: must hold raw and ema"),
        ("cost.json", ("peak_memory_mib",), KeyError, r"cost\.json: peak_memory_mib: missing"),
        ("cost.json", ("train_time_s",), -1.0, r"train_time_s: -1\.0: Input should be greater than or equal to 0"),
        ("cost.json", ("epoch_time_s",), [1.0, None], r"epoch_time_s\.1: None: Input should be a valid number"),
        ("cost.json", ("versions",), [], r"versions: \[\] is not a section"),
        ("schedule.json", ("token_counts",), [17, 17], r"token_counts: \[17, 17\]: must be 3 numbers"),
        ("schedule.json", ("token_counts",), [17, 17, 14], "layer 2 made 14 of 17 tokens, though r = 4"),
        ("schedule.json", ("schedule",), [0.0, 4], r"schedule\.0: 0\.0: Input should be a valid integer"),
        ("schedule.json", ("strategy",), "lower", r"schedule\.json: strategy: 'lower'; metrics\.json says 'upper'"),
        ("params.json", ("profile",), KeyError, r"params\.json: profile: None; metrics\.json says 'smoke'"),
    ],
)
def test_a_spoilt_file_is_named_in_one_line(tmp_path, file, path, value, said):
    folder = runs.write(make_run(), tmp_path / "run")
    tree = spoil(json.loads((folder / file).read_text()), path, value)
    (folder / file).write_text(json.dumps(tree))
    assert re.search(said, refusal(lambda: runs.read(folder)))


def test_a_missing_or_broken_file_is_named(tmp_path):
    assert "nothing: no such run" in refusal(lambda: runs.read(tmp_path / "nothing"))
    folder = tmp_path / "run"
    for name in FILES:
        runs.write(make_run(), folder)
        (folder / name).unlink()
        assert f"{name}: missing" in refusal(lambda: runs.read(folder))
    runs.write(make_run(), folder)
    for content in (b'{"a": ', b"[]", b"\xff\xfe\x00"):
        (folder / "cost.json").write_bytes(content)
        assert "cost.json: not" in refusal(lambda: runs.read(folder))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("val_loss", "loss", "its first line must be epoch,lr"),
        ("2,0.30000000000000004", "3,0.30000000000000004", "epoch: 3 in line 2 of the epochs"),
        (",2.0,", ",nan,", r"epoch 1\.train_loss: 'nan': Input should be a finite number"),
        (",2.0,", ",,", r"epoch 1\.train_loss: None: Input should be a valid number"),
        (",2.0,", ",", "epoch 1: 8 values; 9 columns"),
        (",2.0,", ",\xff,", "not readable as text"),
    ],
)
def test_a_spoilt_history_is_named(tmp_path, old, new, said):
    path = runs.write(make_run(), tmp_path / "run") / "history.csv"
    assert old in path.read_text()
    path.write_bytes(path.read_text().replace(old, new, 1).encode("latin-1"))
    assert re.search(said, refusal(lambda: runs.read(path.parent)))


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("history",), [], r"history\.csv: no epochs"),
        (("history", 0, "epoch_time_s"), 1.0, r"epoch 1\.epoch_time_s: unknown key; allowed: ema_val_loss, "),
        (("model_bytes",), b"", "no weights given"),
        (("metrics", "loss"), math.nan, r"metrics\.json: loss: nan: Input should be a finite number"),
        (("cost", "cpu_mhz"), math.inf, r"cost\.json: .*not JSON compliant"),
        (("correct",), "1" * 20, r"correct\.txt: 20 of 20 correct; metrics\.json says 95\.0%"),
        (("correct",), "-" * 20, r"correct\.txt: must hold 0, 1 or - for each image, and an image that was tested"),
        (("correct",), "1" * 19 + "0x", r"correct\.txt: must hold 0, 1 or -"),
    ],
)
def test_an_invalid_run_is_refused_before_any_file_is_touched(tmp_path, path, value, said):
    folder = runs.write(make_run(), tmp_path / "run")
    before = {file: file.read_bytes() for file in folder.iterdir()}
    invalid = runs.Run(**spoil(vars(make_run()), path, value))
    assert re.search(said, refusal(lambda: runs.write(invalid, folder)))
    assert {file: file.read_bytes() for file in folder.iterdir()} == before


def test_a_folder_is_written_to_by_its_holder_alone(tmp_path):
    with runs.held(tmp_path / "run") as folder, ThreadPoolExecutor(1) as other:
        said = refusal(lambda: other.submit(runs.write, make_run(), folder).result())
        assert said == f"{folder}: another process is making a run there"
        assert [path.name for path in folder.iterdir()] == [".lock"]
        runs.write(make_run(), folder)
        assert (folder / ".lock").exists()
    assert {path.name for path in folder.iterdir()} == set(FILES)
