import pytest

from famba.training import fit
from famba.training.trainer import Trainer


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
