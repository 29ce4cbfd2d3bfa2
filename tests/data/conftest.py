from pathlib import Path

import pytest
from images import photograph


@pytest.fixture
def folder(repository: Path) -> Path:
    """Two classes in true file formats: 10 training and 2 test images of each."""
    top = repository / "images"
    seed = 0
    for part, count in {"train": 10, "test": 2}.items():
        for name in ("cat", "dog"):
            (top / part / name).mkdir(parents=True)
            for i in range(count):
                photograph(seed := seed + 1).save(top / part / name / f"{i}.{('png', 'jpg', 'bmp', 'gif')[i % 4]}")
    return top
