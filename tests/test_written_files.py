"""Files that are there whole or not at all, whoever else writes them."""

import os

from efficientsam_hf.written_files import written_together


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    place = tmp_path / "labels.json"
    with written_together([place]) as (first,):
        with written_together([place]) as (second,):
            first.write_text("first")
            second.write_text("second")
            assert {first.suffix, second.suffix} == {".json"}
        assert place.read_text() == "second"
    assert place.read_text() == "first"
    assert list(tmp_path.iterdir()) == [place]


def test_a_name_as_long_as_names_may_be(tmp_path):
    place = tmp_path / ("n" * 250 + ".json")
    with written_together([place]) as (part,):
        assert len(os.fsencode(part.name)) < 255
        part.write_text("whole")
    assert place.read_text() == "whole"


def test_what_fails_leaves_nothing(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    writing = written_together([tmp_path / "a.txt", tmp_path / "b.txt"])
    (part, _) = writing.__enter__()
    part.write_text("half")
    assert not writing.__exit__(KeyError, KeyError(), None)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "old")]
