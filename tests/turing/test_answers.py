"""Journals: on the disk before they are acknowledged, never changed, whole after a crash."""

import errno
import json
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest

from ftengine.errors import ConfigError, SaveError, StoreError
from ftengine.turing.answers import Answers, GivenAnswer, GivenTime, Journal, Journals, Refused
from ftengine.turing.study import StudyFolder
from tests.turing.support import answer_of


def _given(folder: StudyFolder, reader: int, number: int, **changes: Any) -> GivenAnswer:
    return GivenAnswer.model_validate(answer_of(folder, reader, number, **changes))


def _open(folder: StudyFolder, reader: int = 0) -> Journal:
    (folder.path / "answers").mkdir(exist_ok=True)
    return Journal(folder, folder.study.readers[reader])


def test_answers_are_kept_in_order_and_read_back(study: StudyFolder) -> None:
    journal = _open(study)
    reader = study.study.readers[0]
    for number in range(len(reader.showings)):
        line, is_new = journal.submit(_given(study, 0, number))
        assert is_new
        assert line.case == reader.showings[number].case
    journal.close()
    again = Answers.read(study, reader)
    assert [again.by_item[s.item].comment for s in reader.showings] == [f"comment {n}" for n in range(8)]
    assert again.current is None
    assert again.reading_s(reader.showings[3].item) == 4.5


def test_the_same_answer_again_is_recognised_and_another_refused(study: StudyFolder) -> None:
    journal = _open(study)
    first = _given(study, 0, 0)
    assert journal.submit(first)[1]
    size = study.answers_file(journal.answers.reader).stat().st_size
    line, is_new = journal.submit(first)
    assert (line.answer_id, is_new) == (first.answer_id, False)
    for changes in ({"synthetic": False}, {"confidence": 5}, {"comment": "other"}, {"answer_id": "f" * 32}):
        with pytest.raises(Refused, match="cannot be changed") as refusal:
            journal.submit(_given(study, 0, 0, **changes))
        assert refusal.value.status == 409
    with pytest.raises(Refused, match="already given to another case"):
        journal.submit(_given(study, 0, 1, answer_id=first.answer_id))
    assert study.answers_file(journal.answers.reader).stat().st_size == size
    journal.close()


def test_what_is_not_due_is_refused(study: StudyFolder) -> None:
    journal = _open(study)
    for given, status in (
        (_given(study, 0, 1), 409),  # another one comes first
        (_given(study, 1, 0), 403),  # of another reader
        (_given(study, 0, 0, item="0" * 16), 404),
        (_given(study, 0, 0, click_zyx=[0, 0, 28]), 422),
        (_given(study, 0, 0, click_zyx=[-1, 0, 0]), 422),
    ):
        with pytest.raises(Refused) as refusal:
            journal.submit(given)
        assert refusal.value.status == status
    assert study.answers_file(journal.answers.reader).stat().st_size == 0
    journal.close()


def test_times_of_visits_add_up_and_a_later_one_replaces_its_own(study: StudyFolder) -> None:
    journal = _open(study)
    item = study.study.readers[0].showings[0].item
    for visit, seconds in (("a", 3.0), ("a", 5.0), ("b", 2.0)):
        journal.note_time(GivenTime(reader="r01", item=item, visit=visit * 32, seconds=seconds))
    journal.submit(_given(study, 0, 0, visit="b" * 32, seconds=4.0))
    assert journal.answers.reading_s(item) == 9.0
    with pytest.raises(Refused, match="not the one that is shown"):
        journal.note_time(GivenTime(reader="r01", item=item, visit="a" * 32, seconds=50.0))
    journal.close()
    assert Answers.read(study, study.study.readers[0]).reading_s(item) == 9.0


@pytest.mark.parametrize("cut", [1, 40, -1])
def test_a_line_that_was_cut_short_is_taken_off_and_nothing_else(study: StudyFolder, cut: int) -> None:
    journal = _open(study)
    journal.submit(_given(study, 0, 0))
    journal.submit(_given(study, 0, 1))
    path = study.answers_file(journal.answers.reader)
    whole = path.read_bytes()
    journal.submit(_given(study, 0, 2))
    journal.close()
    line = path.read_bytes()[len(whole) :]
    path.write_bytes(whole + line[:cut])
    assert len(Answers.read(study, study.study.readers[0]).by_item) == 2  # scoring does not repair
    again = _open(study)
    assert again.num_cut_bytes == len(line[:cut])
    assert path.read_bytes() == whole
    assert again.submit(_given(study, 0, 2))[1]
    again.close()
    assert len(Answers.read(study, study.study.readers[0]).by_item) == 3


@pytest.mark.parametrize(
    ("harm", "text"),
    [
        (lambda lines: [lines[0].replace(b'"confidence":1', b'"confidence":5'), *lines[1:]], "line 1: was changed"),
        (lambda lines: [*lines[:2], lines[2].replace(b'"confidence":3', b'"confidence":5')], "line 3: was changed"),
        (lambda lines: [*lines[:2], lines[2].replace(b'"kind"', b' "kind"')], "line 3: was changed"),
        (lambda lines: [*lines[:2], lines[2].replace(b',"sha256"', b', "sha256"')], "line 3: is no line of a journal"),
        (lambda lines: [lines[0], *lines[2:]], "line 2: does not follow"),
        (lambda lines: [*lines, lines[0]], "line 4: does not follow"),
        (lambda lines: [lines[0], b"{}\n", *lines[1:]], "line 2: is no line of a journal"),
        (lambda lines: [lines[0][:50] + b"\n", *lines[1:]], "line 1: is no line of a journal"),
    ],
)
def test_a_changed_journal_is_refused_and_left_as_it_is(
    study: StudyFolder, harm: Callable[[list[bytes]], list[bytes]], text: str
) -> None:
    journal = _open(study)
    for number in range(3):
        journal.submit(_given(study, 0, number))
    journal.close()
    path = study.answers_file(journal.answers.reader)
    path.write_bytes(b"".join(harm(path.read_bytes().splitlines(keepends=True))))
    before = path.read_bytes()
    for read in (lambda: Answers.read(study, study.study.readers[0]), lambda: _open(study)):
        with pytest.raises(StoreError, match=text):
            read()
    assert path.read_bytes() == before


def test_lines_taken_off_the_end_are_a_whole_journal(study: StudyFolder) -> None:
    """What the documentation says cannot be seen."""
    journal = _open(study)
    for number in range(3):
        journal.submit(_given(study, 0, number))
    journal.close()
    path = study.answers_file(journal.answers.reader)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    assert len(Answers.read(study, study.study.readers[0]).by_item) == 2


def test_what_the_disk_does_not_take_is_not_stored_and_not_acknowledged(
    study: StudyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = _open(study)
    journal.submit(_given(study, 0, 0))
    path = study.answers_file(journal.answers.reader)
    before = path.read_bytes()
    write = os.write

    def half(file: int, content: bytes) -> int:
        if b"comment 1" not in content:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, content[: len(content) - 20])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half)
        with pytest.raises(SaveError, match="No space left on device"):
            journal.submit(_given(study, 0, 1))
    assert path.read_bytes() == before
    assert journal.answers.current == study.study.readers[0].showings[1]
    assert journal.submit(_given(study, 0, 1))[1]
    journal.close()
    assert len(Answers.read(study, study.study.readers[0]).by_item) == 2


def test_one_answer_sent_by_many_threads_is_stored_once(study: StudyFolder) -> None:
    journal = _open(study)
    results: list[bool] = []
    ready = threading.Barrier(8)

    def send() -> None:
        ready.wait()
        results.append(journal.submit(_given(study, 0, 0))[1])

    threads = [threading.Thread(target=send) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    journal.close()
    assert sorted(results) == [False] * 7 + [True]
    assert len(study.answers_file(journal.answers.reader).read_text().splitlines()) == 1


def test_a_second_server_on_a_study_is_refused(study: StudyFolder) -> None:
    warned: list[str] = []
    journals = Journals(study, warn=warned.append)
    with pytest.raises(ConfigError, match="another server is running on this study"):
        Journals(study, warn=warned.append)
    journals.close()
    Journals(study, warn=warned.append).close()
    assert warned == []


def test_the_repair_is_told(study: StudyFolder) -> None:
    journal = _open(study)
    journal.submit(_given(study, 0, 0))
    journal.close()
    with study.answers_file(journal.answers.reader).open("ab") as stream:
        stream.write(b'{"reader":"r01","it')
    warned: list[str] = []
    Journals(study, warn=warned.append).close()
    assert warned == [
        "r01: a line of 19 bytes was cut short by a crash and taken off; it was never acknowledged, and 1 answers before it are whole"
    ]


def test_lines_are_plain_json_that_other_programs_can_read(study: StudyFolder) -> None:
    journal = _open(study)
    journal.submit(_given(study, 0, 0, comment="Zyste? \u201cRand\u201d\n\x01"))
    journal.close()
    line = json.loads(study.answers_file(journal.answers.reader).read_text(encoding="utf-8"))
    assert line["comment"] == "Zyste? \u201cRand\u201d\n\x01"
    assert line["kind"] == "answer"
