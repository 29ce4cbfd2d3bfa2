import shutil

import pytest
from checkout import ROOT

from famba.training import fit
from famba.training.trainer import Trainer


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository of its own, so that no test sees another's checkpoints."""
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def interrupt(monkeypatch):
    """Train a run until its first checkpoint is written."""
    save = Trainer._save

    def train(p, seed):
        def stop(trainer):
            save(trainer)
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(Trainer, "_save", stop)
            with pytest.raises(KeyboardInterrupt):
                fit.fit(p, seed=seed)

    return train
