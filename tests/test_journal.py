"""The journal: whatever becomes of the file, what was written whole is read, and nothing prevents a start."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segue.supervisor import memory
from segue.supervisor.journal import COMPACT_BYTES, Journal, read


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = str(tmp_path / "journal")
    journal = Journal(path)
    assert journal.write({"a": 1, "b": [1, 2]}) == ""
    assert journal.write({"a": 2, "c": "x"}) == ""
    assert read(path) == {"a": b"2", "c": b'"x"'}
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    journal.close()


def test_a_record_that_is_torn_at_any_byte_is_as_if_it_had_never_been_written(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(str(path))
    journal.write({"a": 1, "b": 1})
    before = path.read_bytes()
    journal.write({"a": 2, "b": 2, "c": "ä\n"})
    journal.close()
    whole = path.read_bytes()
    after = read(str(path))
    torn = tmp_path / "torn"
    for length in range(len(whole) + 1):
        torn.write_bytes(whole[:length])
        found = read(str(torn))
        if length >= len(whole) - 1:  # the last byte is the end of the line
            assert found == after
        elif length >= len(before) - 1:
            assert found == {"a": b"1", "b": b"1"}
        else:
            assert found == {}


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 400))
def test_a_broken_file_is_never_an_error(
    tmp_path_factory: pytest.TempPathFactory, junk: bytes, at: int
) -> None:
    path = tmp_path_factory.mktemp("broken") / "journal"
    journal = Journal(str(path))
    journal.write({"instance": {"identity": "x", "epoch": 3}, "current": 1})
    journal.write({"instance": {"identity": "x", "epoch": 4}, "current": 2})
    journal.close()
    data = path.read_bytes()
    path.write_bytes(data[:at] + junk + data[at:])
    memory.recall(read(str(path)))


def test_what_cannot_be_understood_is_left_out() -> None:
    known = memory.recall(
        {
            "instance": b'{"identity":1}',
            "current": b'"x"',
            "generation/7": b"[]",
            "generation/x": b"{}",
            "drain_mode": b'"reject"',
        }
    )
    assert known.instance is None
    assert known.current is None
    assert known.generations == {}
    assert known.drain_mode == "reject"


@pytest.mark.parametrize("boot", ["", "another"])
def test_times_of_another_boot_are_read_by_the_wall_clock(boot: str) -> None:
    known = memory.recall({"clock": msgspec.json.encode(memory.Clock(boot, 5.0))})
    assert known.wall == pytest.approx(memory.wall(), abs=60)


def test_it_is_written_anew_when_it_has_grown(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(str(path))
    largest = 0
    for number in range(200):
        assert journal.write({"same": "x", "other": f"{number}" * 4000}) == ""
        largest = max(largest, path.stat().st_size)
    assert COMPACT_BYTES < largest < COMPACT_BYTES + 20_000
    assert path.stat().st_size < COMPACT_BYTES
    assert read(str(path))["same"] == b'"x"'
    journal.close()


def test_a_write_that_failed_is_made_good_by_the_next_one(tmp_path: Path) -> None:
    directory = tmp_path / "gone"
    journal = Journal(str(directory / "journal"))
    assert "gone" in journal.write({"a": 1})
    directory.mkdir()
    assert journal.write({"a": 1}) == ""
    assert read(str(directory / "journal")) == {"a": b"1"}
    journal.close()


def test_one_that_was_removed_is_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(str(path))
    assert journal.write({"a": 1}) == ""
    path.unlink()
    assert journal.write({"a": 1}) == ""
    assert read(str(path)) == {"a": b"1"}
    journal.close()


def test_what_there_is_no_room_for_takes_none(tmp_path: Path) -> None:
    (tmp_path / "journal").mkdir()  # nothing can be put in its place
    journal = Journal(str(tmp_path / "journal"))
    assert "directory" in journal.write({"a": 1})
    assert os.listdir(tmp_path) == ["journal"]
    journal.close()


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "journal").symlink_to(victim)
    assert read(str(tmp_path / "journal")) == {}
    journal = Journal(str(tmp_path / "journal"))
    assert journal.write({"a": 1}) == ""
    assert victim.read_text() == "precious"
    journal.close()
