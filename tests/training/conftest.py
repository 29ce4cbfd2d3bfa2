import shutil
from pathlib import Path

import pytest

from famba.training import fit
from famba.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository of its own, so that no test sees another's checkpoints."""
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def interrupt(monkeypatch):
    """Train a run until the checkpoint of an epoch is written."""
    save = Trainer._save

    def train(p, seed, epoch=1):
        def stop(trainer):
            save(trainer)
            if trainer.epoch == epoch:
                raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(Trainer, "_save", stop)
            with pytest.raises(KeyboardInterrupt):
                fit.fit(p, seed=seed)

    return train


@pytest.fixture
def epochs(monkeypatch):
    """The epochs that are trained from here on."""
    trained: list[int] = []
    run_epoch = Trainer.run_epoch
    monkeypatch.setattr(Trainer, "run_epoch", lambda trainer: (run_epoch(trainer), trained.append(trainer.epoch)))
    return trained
