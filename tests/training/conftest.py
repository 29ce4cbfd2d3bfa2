import shutil
from pathlib import Path

import pytest

from famba.training import fit
from famba.training.trainer import Session

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
    save = Session._save

    def train(p, seed, epoch=1):
        def stop(session):
            save(session)
            if session.epoch == epoch:
                raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(Session, "_save", stop)
            with pytest.raises(KeyboardInterrupt):
                fit.fit(p, seed=seed)

    return train


@pytest.fixture
def epochs(monkeypatch):
    """The epochs that are trained from here on."""
    trained: list[int] = []
    run_epoch = Session.run_epoch
    monkeypatch.setattr(Session, "run_epoch", lambda session: (run_epoch(session), trained.append(session.epoch)))
    return trained
