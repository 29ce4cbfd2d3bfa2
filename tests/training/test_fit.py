"""Training: the recipe by hand, a run that was disturbed against one that was not, and what stops a run."""

import contextlib
import dataclasses
import fcntl
import gc
import hashlib
import math
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from unittest import mock

import jaxtyping
import pytest
import torch
from checkout import ROOT
from refusals import refusal

from famba import InputError, backends, config, set_schedule
from famba.errors import TrainingError
from famba.kernels.cpu import build, runtime
from famba.models import saved
from famba.models.vim import kernels
from famba.params import IMAGENET_MEAN, Params
from famba.storage import files, runs
from famba.training import cuda_graph, fit
from famba.training.distributed import Processes
from famba.training.optim import learning_rate
from famba.training.trainer import Trainer, evaluate

pytestmark = pytest.mark.usefixtures("repository")


def smoke(strategy: str = "upper", **changes) -> Params:
    p = config.load("smoke", strategy=strategy)
    data = dataclasses.replace(p.data, limit=64)
    return dataclasses.replace(p, data=data, train=dataclasses.replace(p.train, **{"threads": 1, **changes}))


def test_a_run_never_imports_torchs_compiler_which_takes_a_second():
    code = "from famba import config, fit; fit(config.load('smoke', strategy='upper'), seed=0)"
    command = [sys.executable, "-c", f"import sys; {code}; print(*sys.modules)"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert "famba.training.trainer" in found
    assert not {"torch._dynamo", "torch._inductor", "pandas", "matplotlib"} & set(found)


THREE = {"epochs": 3, "choose": "best"}


def deterministic(run: runs.Run) -> tuple:
    return run.metrics, run.history, run.model_bytes, run.token_counts, run.correct


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """One finished run that others are compared with; trained once, with its shapes checked."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, folder)
    with contextlib.chdir(folder):
        jaxtyping.config.update("jaxtyping_disable", False)
        try:
            return fit.fit(smoke(**THREE), seed=1)
        finally:
            jaxtyping.config.update("jaxtyping_disable", True)


def test_torchs_settings_are_afterwards_what_they_were(monkeypatch):
    def settings():
        tf32 = torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
        return torch.get_num_threads(), (torch.tensor(2e-38) / 4).item() == 0, *tf32

    started, load = [], fit.data.load
    monkeypatch.setattr(fit.data, "load", lambda p, seed: started.append(settings()) or load(p, seed=seed))
    before = settings()
    torch.set_num_threads(3)
    torch.set_flush_denormal(False)
    torch.set_float32_matmul_precision("high")  # torch refuses to mix its two ways of asking
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    try:
        assert fit.fit(smoke(epochs=1), seed=1).cost["tf32"] is False
        assert started == [(1, True, "ieee", "ieee")]
        assert settings() == (3, False, "tf32", "tf32")
        assert torch.get_float32_matmul_precision() == "high"
        with pytest.raises(InputError):
            fit.fit(smoke(init_from="nowhere"), seed=1)
        assert settings()[0] == 3
    finally:
        torch.set_num_threads(before[0])
        torch.set_flush_denormal(before[1])
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision = before[2:]


def test_a_run_learns_fuses_as_promised_and_reports_it(undisturbed):
    run = undisturbed
    assert run.schedule == [0, 8, 8, 8]
    assert run.token_counts == [37, 37, 29, 21, 13]
    assert [row["epoch"] for row in run.history] == [1, 2, 3]
    assert run.history[-1]["train_loss"] < run.history[0]["train_loss"]
    best = max(run.history, key=lambda row: (row["val_top1_percent"], -row["val_loss"]))
    assert run.metrics["chosen"] == {"weights": "raw", "epoch": best["epoch"]}
    assert run.metrics["validation"]["raw"]["best"]["loss"] == best["val_loss"]
    assert run.metrics["validation"]["ema"] is None
    assert 0 <= run.metrics["top1_percent"] <= run.metrics["top5_percent"] <= 100


def test_the_cost_of_a_run_is_measured(undisturbed):
    cost, model = undisturbed.cost, fit.build(smoke(), classes=10, seed=0)
    assert len(cost["epoch_time_s"]) == 3
    assert cost["train_time_s"] == pytest.approx(sum(cost["epoch_time_s"]))
    assert cost["step_time_ms"] > 0
    weights = sum(weight.numel() for weight in model.parameters())
    assert cost["params_count"] == weights
    assert cost["peak_memory_mib"] > 4 * 4 * weights / 2**20  # weights, gradients and two moments at the least
    assert cost["flops_per_image"] > 0
    assert cost["command"] == "python -m famba train --profile smoke --strategy upper --seed 1"
    assert cost["made_of"] == f"{smoke(**THREE).digest(1)}-{fit.provenance.of_training()}"
    assert cost["kernels"] == kernels("auto", torch.device("cpu"), model.config, "fp32")


def test_code_that_trains_the_same_on_a_cpu_names_its_runs_there_and_no_checkpoint(monkeypatch):
    p = smoke()
    own, folder = fit.made_of(p, seed=0), fit.folder(p, seed=0)
    monkeypatch.setattr(fit.provenance, "of_training", lambda: "0123456789abcdef")
    assert fit.made_of(p, seed=0) == f"{p.digest(0)}-0123456789abcdef"
    assert fit.folder(p, seed=0) == folder
    for device in ("cuda", "auto"):
        other = fit.made_of(smoke(device=device), seed=0)
        assert other.split("-")[1] == fit.provenance.of_module("famba.training.fit")
    assert own.startswith(f"{p.digest(0)}-")


def test_a_run_says_of_each_test_image_whether_it_was_classified_correctly(undisturbed, weights):
    """The answers of its weights, image by image, with the fold that seed 1 tests."""
    images = fit.data.load(smoke().data, seed=1)
    model, described = saved.load_model(weights)
    shown = fit.data.normalise(images.test.images, described["mean"], described["std"])
    right = model.eval()(shown).argmax(-1) == images.test.labels
    answers = torch.tensor([{"1": 1, "0": 0, "-": -1}[x] for x in undisturbed.correct])
    assert torch.equal(answers[images.test_ids], right.long())
    assert (answers >= 0).sum() == len(images.test)


def test_another_seed_draws_other_weights_to_start_from_and_another_order_of_the_images(monkeypatch):
    one, other = (fit.build(smoke(), classes=10, seed=seed).head.weight for seed in (1, 2))
    assert not one.equal(other)
    load, build_ = fit.data.load, fit.build
    monkeypatch.setattr(fit.data, "load", lambda p, seed: load(p, seed=1))
    monkeypatch.setattr(fit, "build", lambda p, classes, seed: build_(p, classes=classes, seed=1))
    one, other = (fit.fit(smoke(epochs=1), seed=seed).history[0]["train_loss"] for seed in (1, 2))
    assert one != other


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(undisturbed, interrupt):
    p, trained = smoke(**THREE), []
    interrupt(p, seed=1)
    again = fit.fit(p, seed=1, callbacks=[lambda history, cost: trained.append(len(history))])
    assert deterministic(again) == deterministic(undisturbed)
    assert trained == [2, 3]


def test_a_finished_run_keeps_none_of_its_memory(monkeypatch):
    made, init = [], Trainer.__init__
    monkeypatch.setattr(
        Trainer, "__init__", lambda self, *a, **k: made.append(weakref.ref(self)) or init(self, *a, **k)
    )
    gc.disable()
    try:
        fit.fit(smoke(epochs=1), seed=1)
        assert [trainer() for trainer in made] == [None] * len(made)
    finally:
        gc.enable()
    assert made


def test_two_checkpoints_are_kept_and_for_one_that_cannot_be_read_the_other_is_taken(undisturbed, caplog):
    p = smoke(**THREE)
    assert deterministic(fit.fit(p, seed=1)) == deterministic(undisturbed)
    kept = sorted(path.name for path in fit.folder(p, seed=1).iterdir())
    assert kept == ["epoch-00002.safetensors", "epoch-00003.safetensors", "history.csv"]
    newest = fit.folder(p, seed=1) / kept[1]
    newest.write_bytes(newest.read_bytes()[:-100])
    assert deterministic(fit.fit(p, seed=1)) == deterministic(undisturbed)
    assert "epoch-00003.safetensors: not a whole safetensors file" in caplog.text
    for _ in range(2):
        fit.forget(p, seed=1)
        assert not fit.folder(p, seed=1).exists()


def test_a_checkpoint_of_another_run_is_not_continued_even_if_it_was_put_there_by_hand(undisturbed, caplog):
    other, p = smoke(epochs=1, lr=1e-3), smoke(**THREE)
    fit.fit(other, seed=1)
    theirs, own = fit.folder(other, seed=1), fit.folder(p, seed=1)
    theirs.rename(own)
    assert deterministic(fit.fit(p, seed=1)) == deterministic(undisturbed)
    assert f"run: {theirs.name!r}; expected {own.name!r}" in caplog.text


def test_a_run_tells_after_each_epoch_how_it_goes(repository):
    told: list[tuple[int, float]] = []
    p = smoke(epochs=2, tensorboard=True)
    run = fit.fit(p, seed=1, callbacks=[lambda history, cost: told.append((len(history), cost["throughput_img_s"]))])
    assert [epoch for epoch, _ in told] == [1, 2]
    assert all(rate > 0 for _, rate in told)
    assert (fit.folder(p, seed=1) / fit.LIVE_HISTORY).read_bytes() == runs.history_bytes(run.history)
    (events,) = (repository / "build" / "tensorboard").glob("smoke-upper-1-*/events.*")
    assert events.stat().st_size > 500


def test_another_value_anywhere_other_weights_and_other_code_are_another_run(repository, monkeypatch):
    values = [(smoke(), 0), (smoke(), 1), (smoke(lr=1e-4), 0), (smoke("lower"), 0)]
    folders = {fit.folder(p, seed=seed) for p, seed in values}
    for content in (b"weights", b"other weights"):
        (repository / "weights").write_bytes(content)
        folders.add(fit.folder(smoke(init_from="weights"), seed=0))
    monkeypatch.setattr(fit.provenance, "of_module", {"famba.training.fit": "0123456789abcdef"}.__getitem__)
    other = fit.folder(smoke(), seed=0)
    assert len(folders | {other}) == 7
    assert "0123456789abcdef" in other.name


@pytest.mark.skipif(backends()["native"] != "", reason=backends()["native"])
def test_other_kernels_or_instructions_are_another_run_made_of_the_same(monkeypatch):
    p = smoke()
    usual, made_of = fit.folder(p, seed=0), fit.made_of(p, seed=0)
    folders = {usual}
    changes = [(build, "unavailable"), (runtime, "instruction_set"), (torch.backends.cpu, "get_cpu_capability")]
    for module, name in changes:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda: "another")
            folders.add(fit.folder(p, seed=0))
            assert fit.made_of(p, seed=0) == made_of
    assert len(folders) == 4
    assert fit.folder(p, seed=0) == usual


@pytest.mark.skipif(backends()["native"] != "", reason=backends()["native"])
def test_a_run_is_not_continued_by_other_kernels_and_that_is_said(monkeypatch, caplog):
    p = smoke(epochs=1)
    native, kept = fit.fit(p, seed=1), fit.folder(p, seed=1)
    assert "not continued" not in caplog.text
    monkeypatch.setattr(build, "unavailable", lambda: "no compiler")
    torchs = fit.fit(p, seed=1)
    assert f"{kept}: not continued: of other code, kernels, processor or weights to start from" in caplog.text
    assert (native.cost["kernels"]["scan"], torchs.cost["kernels"]["scan"]) == ("native", "torch")
    assert native.model_bytes != torchs.model_bytes


def test_the_test_split_is_read_once_by_the_last_epochs_weights_where_that_is_asked_for_however_it_did(monkeypatch):
    read, worse = [], iter([90.0, 80.0, 70.0, 60.0])

    def counted(model, split, images, **options):
        read.append(len(split))
        return {**evaluate(model, split, images, **options), "top1_percent": next(worse)}

    monkeypatch.setattr("famba.training.trainer.evaluate", counted)
    p = smoke(epochs=3, choose="last")
    run = fit.fit(p, seed=0)
    images = fit.data.load(p.data)
    assert len(images.test) != len(images.val)
    assert read == [len(images.val)] * 3 + [len(images.test)]
    assert run.metrics["chosen"] == {"weights": "raw", "epoch": 3}
    assert run.metrics["validation"]["raw"]["best"]["epoch"] == 1
    assert run.metrics["top1_percent"] == 60.0


@pytest.mark.parametrize("choose", ["best", "last"])
def test_a_moving_average_is_evaluated_and_can_be_chosen(monkeypatch, choose):
    score = Trainer._evaluate

    def ema_is_better(trainer, model, *rest):
        scores = score(trainer, model, *rest)
        return {**scores, "top1_percent": 100.0} if model is trainer.ema else scores

    monkeypatch.setattr(Trainer, "_evaluate", ema_is_better)
    p = smoke(epochs=2, ema_decay=0.9, choose=choose)
    run = fit.fit(p, seed=0)
    assert run.metrics["chosen"]["weights"] == "ema"
    assert run.metrics["validation"]["ema"]["last"]["epoch"] == 2
    assert all(row["ema_val_loss"] is not None for row in run.history)
    assert deterministic(fit.fit(p, seed=0)) == deterministic(run)


def test_the_moving_average_is_what_its_decay_says():
    p = smoke(epochs=1, ema_decay=0.5)
    model = fit.build(p, classes=10, seed=0)
    images = fit.data.load(p.data)
    trainer = Trainer(p, 0, model, images, Processes(torch.device("cpu")), fit.folder(p, seed=0))
    batch = fit.data.normalise(images.train.images[:8], images.mean, images.std)
    expected = None
    for step in range(3):
        trainer._step([(batch, images.train.labels[:8])], 1e-2, step)
        now = model.head.weight.detach().clone()
        expected = now if expected is None else 0.5 * expected + 0.5 * now
    torch.testing.assert_close(trainer.ema.head.weight.detach(), expected)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_last_good_checkpoint(monkeypatch):
    p = smoke(**THREE)
    step = Trainer._step

    def poisoned(trainer, parts, lr, number):
        if trainer.epoch == 1:
            with torch.no_grad():
                trainer.model.layers[2].mixer.D[0] = math.nan
        return step(trainer, parts, lr, number)

    monkeypatch.setattr(Trainer, "_step", poisoned)
    with pytest.raises(TrainingError) as error:
        fit.fit(p, seed=0)
    steps = 64 // p.train.batch_size
    (kept,) = fit.folder(p, seed=0).glob("epoch-*")
    assert kept.name == "epoch-00001.safetensors"
    assert str(error.value) == (
        f"step {steps + 1} (epoch 2): loss nan, gradient norm nan at learning rate "
        f"{learning_rate(p.train, steps, steps):.3g}, first not finite in the output of layer 3, mixer.out_proj; "
        f"training stopped, the last good checkpoint is {kept}"
    )


def test_weights_whose_validation_is_not_finite_are_not_kept(monkeypatch):
    monkeypatch.setattr(Trainer, "_evaluate", lambda *_: {"loss": math.inf, "top1_percent": 10.0, "top5_percent": 50.0})
    said = r"^validation after epoch 1: loss inf; training stopped, no checkpoint was written yet$"
    with pytest.raises(TrainingError, match=said):
        fit.fit(smoke(), seed=0)


def test_an_epoch_may_be_one_step_and_the_rate_be_meant_for_a_larger_batch():
    run = fit.fit(smoke(batch_size=64, epochs=2, lr=50.0, lr_batch=640_000), seed=0)
    assert len(run.history) == len(run.cost["epoch_time_s"]) == 2


def test_a_gradient_that_is_not_finite_is_found_where_it_comes_from(monkeypatch):
    build = fit.build

    def poisoned(*arguments, **named):
        model = build(*arguments, **named)
        model.layers[1].mixer.out_proj.weight.register_hook(lambda grad: grad * math.nan)
        return model

    monkeypatch.setattr(fit, "build", poisoned)
    with pytest.raises(TrainingError, match=r"first not finite in the gradient of layer 2, mixer\.out_proj\.weight;"):
        fit.fit(smoke(), seed=0)


def test_tokens_that_are_not_fused_as_promised_fail_the_run(monkeypatch):
    set_fusion = fit.VisionMamba.set_fusion

    def promised(model, schedule, options):
        set_fusion(model, schedule, options)
        model._schedule = [0] * model.depth

    monkeypatch.setattr(fit.VisionMamba, "set_fusion", promised)
    with pytest.raises(TrainingError, match=r"trace shows \[37, 37, 37, 37, 37\] tokens; promised were"):
        fit.fit(smoke(), seed=0)


def test_a_run_that_another_process_trains_is_waited_for(monkeypatch):
    folder = fit.folder(smoke(), seed=0)
    folder.mkdir(parents=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        monkeypatch.setattr(files._log, "warning", lambda *_: fcntl.flock(lock, fcntl.LOCK_UN))
        assert fit.fit(smoke(), seed=0).token_counts


def test_bf16_trains_and_stays_near_fp32(undisturbed):
    run = fit.fit(smoke(epochs=3, precision="bf16"), seed=1)
    assert run.history != undisturbed.history
    losses = [[row["train_loss"] for row in history] for history in (run.history, undisturbed.history)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"device": "cuda:99"}, "train.device: 'cuda:99'; torch sees"),
        ({"batch_size": 10_000}, "train.batch_size: 10000; there are 64 training images"),
        ({"backend": "fast"}, "'fast'"),
        ({"cuda_graph": True}, "train.cuda_graph: true: it needs a CUDA device, got cpu"),
    ],
)
def test_parameters_that_cannot_be_met_are_refused_before_training(change, said):
    assert said in refusal(lambda: fit.fit(smoke(**change), seed=0))


def test_evaluation_counts_what_is_right():
    class Fixed(torch.nn.Module):
        def forward(self, images):
            logits = torch.zeros(len(images), 10)
            logits[:, 3] = 2.0
            return logits

    images = fit.data.load(smoke().data)
    scores = evaluate(Fixed(), images.val, images, batch_size=50)
    share = (images.val.labels == 3).float().mean().item()
    assert scores["top1_percent"] == pytest.approx(100 * share)
    assert scores["loss"] == pytest.approx(math.log(9 + math.e**2) - 2 * share, rel=1e-5)


# runs that start from weights


@pytest.fixture
def weights(undisturbed, repository) -> Path:
    """The weights of a finished run of strategy `upper`, in the repository."""
    path = repository / "weights.safetensors"
    path.write_bytes(undisturbed.model_bytes)
    return path


def evaluated(strategy: str = "upper", **changes) -> runs.Run:
    return fit.fit(smoke(strategy, **{"init_from": "weights.safetensors", "epochs": 0, **changes}), seed=1)


def test_weights_that_are_only_evaluated_give_their_own_accuracy_fused_or_not(undisturbed, weights):
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    images = fit.data.load(smoke().data, seed=1)
    run = evaluated()
    scores = {key: undisturbed.metrics[key] for key in ("top1_percent", "top5_percent", "loss")}
    validation = {"raw": dict.fromkeys(("last", "best"), run.metrics["validation"]["raw"]["last"]), "ema": None}
    chosen = {"weights": "raw", "epoch": 0}
    assert run.metrics == {**scores, "chosen": chosen, "validation": validation, "init_sha256": digest}
    assert run.metrics["validation"]["raw"]["best"]["loss"] == undisturbed.metrics["validation"]["raw"]["best"]["loss"]
    assert (run.history, run.token_counts) == ([], [37, 37, 29, 21, 13])
    assert saved.load_model(weights)[0].head.weight.equal(_saved(run)[0].head.weight)

    model = set_schedule(saved.load_model(weights)[0], None)
    unfused = evaluated("none", ema_decay=0.9)
    expected = evaluate(model, images.test, images, batch_size=2 * smoke().train.batch_size)
    assert {key: unfused.metrics[key] for key in expected} == expected
    assert unfused.token_counts == [37] * 5
    assert unfused.metrics["loss"] != run.metrics["loss"]
    assert unfused.metrics["validation"]["ema"] is None


def test_a_run_that_trains_nothing_is_written_with_the_cost_of_a_forward_pass(weights, undisturbed, tmp_path):
    run = evaluated()
    record = runs.read(runs.write(run, tmp_path / "run"))
    assert (record.history, record.cost["epoch_time_s"], record.cost["train_time_s"]) == ([], [], 0.0)
    assert 0 < record.cost["peak_memory_mib"] < undisturbed.cost["peak_memory_mib"]
    assert record.cost["step_time_ms"] > 0
    assert deterministic(evaluated()) == deterministic(run)
    assert not list(fit.folder(smoke(init_from="weights.safetensors", epochs=0), seed=1).glob("epoch-*"))


def test_fine_tuning_starts_at_the_weights_with_a_learning_rate_of_its_own(weights, undisturbed):
    p = smoke(init_from="weights.safetensors", epochs=1, lr=1e-3)
    run = fit.fit(p, seed=1)
    steps = 64 // p.train.batch_size
    assert run.history[0]["lr"] == learning_rate(p.train, steps - 1, steps)
    assert run.history[0]["train_loss"] < undisturbed.history[1]["train_loss"]
    assert not _saved(run)[0].head.weight.equal(saved.load_model(weights)[0].head.weight)
    assert run.metrics["init_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert "init_sha256" not in undisturbed.metrics


def test_a_seed_in_the_name_of_the_weights_is_the_runs_own(weights):
    weights.rename(weights.with_name("of-1.safetensors"))
    assert evaluated(init_from="of-{seed}.safetensors").seed == 1


def test_weights_that_change_while_they_are_read_stop_the_run(weights, monkeypatch):
    take = fit.pretrained.take_weights

    def late(model, path):
        origin = take(model, path)
        path.write_bytes(path.read_bytes() + b"more")
        return origin

    monkeypatch.setattr(fit.pretrained, "take_weights", late)
    with pytest.raises(InputError, match=r"weights\.safetensors: changed while it was read"):
        evaluated()


def test_released_weights_start_a_run_too_and_only_training_may_have_a_new_head(repository):
    p = smoke(init_from="vim.pth", epochs=0)
    trained = fit.build(p, classes=1000, seed=7)
    torch.save({"model": trained.state_dict()}, repository / "vim.pth")
    with pytest.raises(InputError, match=r"its head tells 1000 classes apart, data\.dataset 'digits' has 10, and"):
        fit.fit(p, seed=0)
    run = fit.fit(smoke(init_from="vim.pth", epochs=1, lr=1e-8, min_lr=0.0), seed=0)
    model, made = _saved(run)
    assert model.head.weight.shape[0] == 10
    torch.testing.assert_close(model.pos_embed, trained.pos_embed, rtol=0, atol=1e-5)
    assert tuple(made["mean"]) == IMAGENET_MEAN


def test_weights_of_other_classes_are_not_evaluated(weights):
    model, described = saved.load_model(weights)
    described["classes"] = list("abcdefghij")
    weights.write_bytes(saved.model_bytes(model, model.state_dict(), described))
    with pytest.raises(InputError, match=r"trained on other classes than data\.dataset 'digits' has"):
        evaluated()


def _saved(run: runs.Run) -> tuple[fit.VisionMamba, dict]:
    path = Path("written.safetensors")
    path.write_bytes(run.model_bytes)
    return saved.load_model(path)


def test_a_step_that_is_replayed_learns_what_a_called_one_does(undisturbed, repository, monkeypatch):
    captures = []

    def captured(call, device):
        assert device.type == "cpu"
        for _ in range(3):
            call()
        captures.append(call)
        return call

    monkeypatch.setattr(cuda_graph, "unavailable", lambda device, processes: "")
    monkeypatch.setattr(cuda_graph, "captured", captured)
    p = smoke(**THREE, cuda_graph=True)
    assert deterministic(fit.fit(p, seed=1)) == deterministic(undisturbed)
    assert len(captures) == 1


def test_a_step_is_captured_on_the_device_that_it_runs_on(monkeypatch):
    cuda = mock.MagicMock()
    monkeypatch.setattr(torch, "cuda", cuda)
    cuda_graph.captured(lambda: None, torch.device("cuda:1"))()
    assert cuda.device.call_args.args == (torch.device("cuda:1"),)
    called = [name for name, *_ in cuda.mock_calls]
    there = called[called.index("device().__enter__") : called.index("device().__exit__")]
    assert {"Stream", "CUDAGraph", "graph"} <= set(there)
    # A loader's thread pins memory.
    assert cuda.graph.call_args.kwargs == {"stream": cuda.Stream(), "capture_error_mode": "thread_local"}
    assert cuda_graph.unavailable(torch.device("cuda"), 2) == "it takes one process, got 2"
    assert cuda_graph.unavailable(torch.device("cuda")) == ""
