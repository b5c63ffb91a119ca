"""Create, for tests, the files that users and their tools leave in a run's folder."""

import shutil
import subprocess
import tarfile
from contextlib import contextmanager

import pytest

from rmkv_cli.files import sha256
from rmkv_cli.model.checkpoints import list_checkpoints


def add_foreign(checkpoints):
    """Create the files that users and their tools leave beside a checkpoint; return their paths."""
    before = set(checkpoints.iterdir())
    newest = list_checkpoints(checkpoints.parent)[0]
    copies = ["step-00000002-mine", "step-00000119-keep", "step-000000200", "step-20", "STEP-00000004", ".step-mine"]
    for name in copies:
        shutil.copytree(newest, checkpoints / name)
    for name in ("upload-to-hub", "zzz", ".step-00000002.backup", ".git"):
        (checkpoints / name).mkdir()
        (checkpoints / name / "mine").write_text(name)
    for name in (".DS_Store", "todo.txt", "step-00000004.txt", ".step-00000004.part", ".nfs00000001"):
        (checkpoints / name).write_text(name)
    with tarfile.open(checkpoints / f"{newest.name}.tar", "w") as archive:
        archive.add(newest)
    return set(checkpoints.iterdir()) - before


def contents(paths):
    """Return the SHA-256 of each file among and below the paths."""
    return {file: sha256(file) for path in paths for file in [path, *path.rglob("*")] if file.is_file()}


@contextmanager
def immutable(path):
    """Prevent everybody, including root, from renaming or removing a folder."""
    done = shutil.which("chattr") and subprocess.run(["chattr", "+i", path], capture_output=True).returncode == 0
    if not done:
        pytest.skip("wants root, and a file system on which files can be made immutable")
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", path], check=True)
