"""Answers of one reader: appended, never changed, on the disk before they are acknowledged.

A journal is a file of JSON lines. Each ends with the SHA-256 of what stands before it in the line, and holds that of the line before it: a
line that was edited shows, and so does one that was taken out or put in before another. Lines taken off the end cannot be seen, since the
rest is a whole journal too; nor can a journal that was rewritten from the changed line on. Both are for copies to guard against. A line
that a crash cut short was never acknowledged: it is taken off when the journal is opened, and nothing else is touched. The same
answer sent again, because its acknowledgement was lost, is recognised by ``answer_id``; any other second answer is refused.
"""

import contextlib
import fcntl
import os
import re
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ftengine.errors import ConfigError, SaveError, StoreError
from ftengine.turing.study import ANSWERS, Id, Reader, ReaderId, Sha256, Showing, StudyFolder, sha256_of_bytes

FIRST = sha256_of_bytes(b"")  # the "previous" of the first line
_SEALED = re.compile(rb'(\{.*),"sha256":"([0-9a-f]{64})"\}\n')
MAX_COMMENT = 2000
_DAY_S = 86_400.0
_MAX_VISITS = 1000  # of one showing: what a page that leaves and comes back again and again can write
ClientId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Seconds = Annotated[float, Field(ge=0.0, le=_DAY_S, allow_inf_nan=False)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class GivenAnswer(_Record):
    """What the page sends. answer_id, visit: made by it, random; seconds: for which this visit showed the case, pauses taken out.

    click_zyx: the voxel that the reader points at, optional. confidence: 1 guessed to 5 certain, in the answer given.
    """

    reader: ReaderId
    item: Id
    answer_id: ClientId
    synthetic: bool
    confidence: Annotated[int, Field(ge=1, le=5)]
    comment: Annotated[str, Field(max_length=MAX_COMMENT)] = ""
    click_zyx: Annotated[list[int], Field(min_length=3, max_length=3)] | None = None
    visit: ClientId
    seconds: Seconds


class GivenTime(_Record):
    """For how long a visit has shown a case so far; sent when the reader pauses or leaves."""

    reader: ReaderId
    item: Id
    visit: ClientId
    seconds: Seconds


class AnswerLine(GivenAnswer):
    """A stored answer. received: UTC, by the server's clock."""

    kind: Literal["answer"] = "answer"
    case: Id
    repeat: bool
    training: bool
    received: str
    previous: Sha256


class TimeLine(GivenTime):
    """A stored time of a visit; a later line of the same visit replaces it."""

    kind: Literal["time"] = "time"
    received: str
    previous: Sha256


Line = AnswerLine | TimeLine
_LINE: TypeAdapter[Line] = TypeAdapter(Annotated[Line, Field(discriminator="kind")])


class Refused(Exception):  # noqa: N818 - an answer to a request, not an error of the program
    """An answer that is not stored. status: of HTTP."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class Answers:
    """What a reader has said so far, read from their journal."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.by_item: dict[str, AnswerLine] = {}
        self._visits: dict[str, dict[str, float]] = {}
        self.last = FIRST

    @classmethod
    def read(cls, folder: StudyFolder, reader: Reader) -> "Answers":
        """The whole lines of a journal; a cut one at its end is left out. Raises StoreError where a line was changed or taken out."""
        path = folder.answers_file(reader)
        answers = cls(reader)
        content = path.read_bytes() if path.exists() else b""
        answers.take(content[: content.rfind(b"\n") + 1], folder, path)
        return answers

    def take(self, content: bytes, folder: StudyFolder, path: Path) -> None:
        """Add whole lines."""
        for number, text in enumerate(content.splitlines(keepends=True), start=1):
            problem = self._add(text, folder)
            if problem:
                raise StoreError(
                    f"{path}: line {number}: {problem}. Answers are never changed once stored: restore the file from a copy."
                )

    def _add(self, text: bytes, folder: StudyFolder) -> str:
        """Take one line over; returns what is wrong with it, empty where nothing is."""
        sealed = _SEALED.fullmatch(text)
        if sealed is None:
            return "is no line of a journal (it does not end with its SHA-256)"
        content, sha256 = sealed[1], sealed[2].decode()
        if sha256_of_bytes(content) != sha256:
            return "was changed since it was stored"
        try:
            line = _LINE.validate_json(content + b"}")
        except ValidationError as error:
            first = error.errors()[0]
            return f"is no line of a journal ({'.'.join(map(str, first['loc']))}: {first['msg']})"
        if line.previous != self.last:
            return "does not follow the line before it: one was added or taken out"
        showing = self.reader.by_item.get(line.item)
        if showing is None or line.reader != self.reader.id:
            return f"is of no case that {self.reader.id} is shown"
        if isinstance(line, AnswerLine):
            if (line.case, line.repeat, line.training) != (showing.case, showing.repeat, showing.training):
                return "names another case than the study shows there"
            if line.item in self.by_item:
                return "answers a case a second time"
            if not _is_inside(line.click_zyx, folder.study.shape_zyx):
                return "points outside the case"
        self.keep(line, sha256)
        return ""

    def keep(self, line: Line, sha256: str) -> None:
        """A line that is valid, and the SHA-256 that it ends with."""
        self.last = sha256
        self._visits.setdefault(line.item, {})[line.visit] = line.seconds
        if isinstance(line, AnswerLine):
            self.by_item[line.item] = line

    def num_visits(self, item: str) -> int:
        """How often the page has shown a case."""
        return len(self._visits.get(item, {}))

    def reading_s(self, item: str) -> float:
        """For how long a case was looked at, over all visits, pauses taken out."""
        return sum(tuple(self._visits.get(item, {}).values()))  # a copy: another thread may be adding one

    @property
    def current(self) -> Showing | None:
        """The first showing without an answer; None when all are answered."""
        return next((s for s in self.reader.showings if s.item not in self.by_item), None)

    @property
    def following(self) -> Showing | None:
        """The one after ``current``."""
        open_ones = [s for s in self.reader.showings if s.item not in self.by_item]
        return open_ones[1] if len(open_ones) > 1 else None


class Journal:
    """A reader's journal, opened for writing; safe to use from many threads."""

    def __init__(self, folder: StudyFolder, reader: Reader) -> None:
        """Opens or makes the file; takes off a line that was cut short. Raises StoreError for a damaged one."""
        self._folder, self._reader = folder, reader
        self._path = folder.answers_file(reader)
        self._lock = threading.Lock()
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        content = b""
        while part := os.read(self._file, 1 << 20):
            content += part
        self._size = content.rfind(b"\n") + 1
        self.num_cut_bytes = len(content) - self._size
        self.answers = Answers(reader)
        self.answers.take(content[: self._size], folder, self._path)
        if self.num_cut_bytes:
            os.ftruncate(self._file, self._size)
        os.fsync(self._file)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def submit(self, given: GivenAnswer) -> tuple[AnswerLine, bool]:
        """Store an answer: the stored line, and whether it is new. On return it is on the disk.

        Raises Refused for one that must not be stored, SaveError where the disk does not take it; nothing is stored then.
        """
        with self._lock:
            showing = self._showing(given.reader, given.item)
            if not _is_inside(given.click_zyx, self._folder.study.shape_zyx):
                raise Refused(422, f"click_zyx: {given.click_zyx} lies outside the case")
            stored = self.answers.by_item.get(given.item)
            if stored is not None:
                if _content(stored) == _content(given):
                    return stored, False
                raise Refused(409, "this case is already answered, and answers cannot be changed")
            if any(a.answer_id == given.answer_id for a in self.answers.by_item.values()):
                raise Refused(409, "this answer was already given to another case")
            current = self.answers.current
            if current is None or current.item != given.item:
                raise Refused(409, "cases are answered in order, and another one comes first")
            line = AnswerLine(
                **given.model_dump(),
                case=showing.case,
                repeat=showing.repeat,
                training=showing.training,
                received=_now(),
                previous=self.answers.last,
            )
            self._append(line)
            return line, True

    def note_time(self, given: GivenTime) -> None:
        """Keep for how long a case was shown. Raises Refused, SaveError as ``submit``."""
        with self._lock:
            self._showing(given.reader, given.item)
            current = self.answers.current
            if current is None or current.item != given.item:
                raise Refused(409, "this case is not the one that is shown")
            if self.answers.num_visits(given.item) >= _MAX_VISITS:
                raise Refused(429, "this case was left too often")
            self._append(TimeLine(**given.model_dump(), received=_now(), previous=self.answers.last))

    def _showing(self, reader_id: str, item: str) -> Showing:
        if reader_id != self._reader.id:
            raise Refused(
                403, "this page belongs to another reader than the link that was opened last: open your own link again"
            )
        showing = self._reader.by_item.get(item)
        if showing is None:
            raise Refused(404, "there is no such case")
        return showing

    def _append(self, line: Line) -> None:
        content = line.model_dump_json().encode()[:-1]  # without its closing brace
        sha256 = sha256_of_bytes(content)
        text = content + f',"sha256":"{sha256}"}}\n'.encode()
        try:
            if os.fstat(self._file).st_size != self._size:  # what an earlier failure could not take back
                os.ftruncate(self._file, self._size)
            written = 0
            while written < len(text):
                written += os.write(self._file, text[written:])
            os.fsync(self._file)
        except OSError as error:
            with contextlib.suppress(OSError):  # else the next answer, or the next start, takes it off
                os.ftruncate(self._file, self._size)
            raise SaveError(
                f"{self._path}: could not be written ({error.strerror}). The answer is not acknowledged: free space there, then send it again."
            ) from error
        self._size += len(text)
        self.answers.keep(line, sha256)


class Journals:
    """The journals of all readers of a study, held by one process at a time."""

    def __init__(self, folder: StudyFolder, *, warn: Callable[[str], None]) -> None:
        """Raises ConfigError where another server writes to this study, StoreError for a damaged journal."""
        place = folder.path / ANSWERS
        place.mkdir(mode=0o700, exist_ok=True)
        self._lock = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
        self._open: dict[str, Journal] = {}
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system releases it, however the process ends
        except OSError as error:
            os.close(self._lock)
            raise ConfigError(
                f"{folder.path}: another server is running on this study. One serves all readers: use it, or end it first."
            ) from error
        try:
            for reader in folder.study.readers:
                journal = self._open[reader.id] = Journal(folder, reader)
                if journal.num_cut_bytes:
                    warn(
                        f"{reader.id}: a line of {journal.num_cut_bytes} bytes was cut short by a crash and taken off; it was never "
                        f"acknowledged, and {len(journal.answers.by_item)} answers before it are whole"
                    )
            os.fsync(self._lock)  # the names of new files
        except BaseException:
            self.close()
            raise

    def __getitem__(self, reader_id: str) -> Journal:
        return self._open[reader_id]

    def close(self) -> None:
        """Close all files and let another server in."""
        for journal in self._open.values():
            journal.close()
        self._open.clear()
        os.close(self._lock)


def _content(answer: GivenAnswer) -> tuple[object, ...]:
    """What makes two answers the same."""
    click = None if answer.click_zyx is None else tuple(answer.click_zyx)
    return answer.answer_id, answer.synthetic, answer.confidence, answer.comment, click


def _is_inside(click_zyx: list[int] | None, shape_zyx: tuple[int, int, int]) -> bool:
    return click_zyx is None or all(0 <= c < n for c, n in zip(click_zyx, shape_zyx, strict=True))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
