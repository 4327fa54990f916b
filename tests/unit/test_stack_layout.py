import os
import stat
from pathlib import Path

import pytest

from project.stack.errors import StackError
from project.stack.layout import Layout, holder, locked, make_private, write_private


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_sockets_lie_below_data_where_the_path_is_short(tmp_path, monkeypatch):
    short = Path("/tmp") / f"lt{os.getpid()}"
    layout = Layout.at(short)
    try:
        assert layout.sockets() == short / "run"
    finally:
        (short / "run").rmdir()
        (short / "logs").rmdir()
        short.rmdir()


@pytest.mark.parametrize("name", ["x" * 100, "with space", "with,comma"])
def test_sockets_of_a_long_or_odd_path_have_a_short_plain_one(tmp_path, name):
    layout, other = Layout.at(tmp_path / name), Layout.at(tmp_path / (name + "2"))
    folder, others = layout.sockets(), other.sockets()
    try:
        assert len(str(folder / "supervisor.sock.4194304")) < 100
        assert " " not in str(folder) and "," not in str(folder)
        assert mode(folder) == (0o711 if os.geteuid() == 0 else 0o700)
        assert layout.sockets() == folder
        assert others != folder
    finally:
        for made in {folder, others}:
            made.rmdir()


def test_a_socket_folder_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(StackError, match="someone else"):
        make_private(tmp_path / "link")


def test_a_folder_that_cannot_be_written_is_told_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StackError, match=r"can't write to .*file/data") as caught:
        Layout.at(tmp_path / "file" / "data")
    assert "\n" not in str(caught.value)


def test_private_files_are_replaced_whole_and_readable_by_their_owner_only(tmp_path):
    path = tmp_path / "secret"
    path.write_text("old")
    path.chmod(0o644)
    write_private(path, "new")
    assert path.read_text() == "new"
    assert mode(path) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_the_lock_has_one_holder_and_tells_who(tmp_path):
    lock = tmp_path / "lock"
    assert holder(lock) is None
    with locked(lock) as mine:
        assert mine
        assert holder(lock) == os.getpid()
        with locked(lock) as second:
            assert not second
    assert holder(lock) is None
