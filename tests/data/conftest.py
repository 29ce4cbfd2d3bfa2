from pathlib import Path

import pytest
from images import photograph


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository root of its own, whose build/cache is empty."""
    (tmp_path / "params.yaml").touch()
    (tmp_path / "dvc.yaml").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def folder(checkout: Path) -> Path:
    """Two classes in true file formats: 10 training and 2 test images of each."""
    top = checkout / "images"
    seed = 0
    for part, count in {"train": 10, "test": 2}.items():
        for name in ("cat", "dog"):
            (top / part / name).mkdir(parents=True)
            for i in range(count):
                photograph(seed := seed + 1).save(top / part / name / f"{i}.{('png', 'jpg', 'bmp', 'gif')[i % 4]}")
    return top
