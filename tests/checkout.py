"""The files of this repository that git tracks, and copies of them in which a pipeline can run."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def tracked() -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: which files are tracked is not known")
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    names = [name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]
    assert "dvc.yaml" in names
    return names


def copy_to(folder: Path, *, without: tuple[str, ...]) -> Path:
    """Copy the tracked files whose names do not start so, and make the folder a git repository."""
    for name in tracked():
        if not name.startswith(without):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    return folder
