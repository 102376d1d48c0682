"""Files: written whole or not at all, where and as the user has them."""

import os
import stat

import pytest
from torch import nn

from helpers import files
from helpers.peft import load_trainable, save_trainable


def test_a_missing_folder_is_made(tmp_path):
    path = tmp_path / "runs" / "today" / "adapter.safetensors"
    save_trainable(nn.Linear(2, 2), path)
    load_trainable(nn.Linear(2, 2), path)
    files.write(str(tmp_path / "a" / "b"), b"1")
    assert (tmp_path / "a" / "b").read_bytes() == b"1"


@pytest.mark.parametrize("there", [True, False], ids=["target there", "target missing"])
@pytest.mark.parametrize("relative", [True, False])
def test_a_symlink_stays_one_and_its_target_is_written(tmp_path, there, relative):
    target, link = tmp_path / "store" / "file", tmp_path / "link"
    target.parent.mkdir()
    if there:
        target.write_bytes(b"old")
    link.symlink_to("store/file" if relative else target)
    files.write(link, b"new")
    assert link.is_symlink() and target.read_bytes() == b"new"
    assert [p.name for p in target.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o755, 0o666])
def test_an_existing_files_permissions_survive_and_a_new_one_follows_the_umask(tmp_path, mode):
    path = tmp_path / "file"
    path.touch()
    path.chmod(mode)
    files.write(path, b"1")
    assert stat.S_IMODE(path.stat().st_mode) == mode
    before = os.umask(0o027)
    try:
        files.write(tmp_path / "new", b"1")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640


@pytest.mark.parametrize("case", ["folder", "below", "loop", "pipe", "read-only", "full disk"])
def test_a_file_that_cannot_be_written_is_named_and_nothing_is_left_behind(
    tmp_path, monkeypatch, case
):
    path = tmp_path / "file"
    if case == "folder":
        path.mkdir()
    elif case == "below":
        path.write_bytes(b"old")
        path = path / "below"
    elif case == "loop":
        path.symlink_to(path)
    elif case == "pipe":
        os.mkfifo(path)
    elif case == "read-only":
        path.write_bytes(b"old")
        monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anything
    else:

        def full(number):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(OSError) as error:
        files.write(path, b"new")
    assert error.value.filename == str(path) and ".tmp" not in str(error.value)
    assert sorted(tmp_path.iterdir()) == before
