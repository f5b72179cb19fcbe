"""What the user has rated, one line of JSON a rating, in a file to which lines are added and in which none is changed.

Everything else is computed from it, also when a question is due. So nothing has to be saved at the end: a line is on the disk before the
next question is shown, two programs may write at once, and a kill costs nothing that was rated.

The file is ``reviews.jsonl`` in the user's data folder for the course; the variable COURSE_DATA names another folder.
"""

import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

from course.units import CourseError

NAME = "reviews.jsonl"
WAIT_SECONDS = 10.0  # for another program that is writing; a line takes it about a millisecond
RATINGS = {
    1: ("again", "I did not know it, or said something wrong"),
    2: ("hard", "I got there, with gaps or long pauses"),
    3: ("good", "I said what the short answer says"),
    4: ("easy", "I would have answered the follow-ups too"),
}


@dataclass(frozen=True)
class Review:
    """One rating.

    Attributes:
        question: its id in the bank.
        rating: 1 again, 2 hard, 3 good, 4 easy.
        by: where it was asked: "quiz", "interview" or "choice"; multiple choice does not move the date on which a question is due.
        at: when, in UTC.
        seconds: from the question to the rating; None where nobody looked at the clock.
        key: of this line.
        instead_of: the key of an earlier rating, which this one takes back.
    """

    question: str
    rating: int
    by: str = "quiz"
    at: datetime = field(default_factory=lambda: datetime.now(UTC))
    seconds: float | None = None
    key: str = field(default_factory=lambda: uuid4().hex[:12])
    instead_of: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.question, str) or not isinstance(self.key, str) or not isinstance(self.at, datetime):
            raise TypeError("question and key must be strings and at a datetime")
        if self.at.tzinfo is None:
            raise ValueError(f"at must have a time zone, got {self.at!r}")
        if isinstance(self.rating, bool) or self.rating not in RATINGS:
            raise ValueError(f"rating must be one of {', '.join(map(str, RATINGS))}, got {self.rating!r}")

    def line(self) -> str:
        filled = {name: value for name, value in asdict(self).items() if value is not None}
        return json.dumps(filled | {"at": self.at.astimezone(UTC).isoformat()}, ensure_ascii=False)

    @classmethod
    def of(cls, line: str) -> "Review":
        """Raises ValueError, TypeError or KeyError where it is no review. Fields that a later version adds are left out."""
        read = json.loads(line)
        known = {name: read[name] for name in cls.__dataclass_fields__ if name in read}
        return cls(**known | {"at": datetime.fromisoformat(read["at"])})


def folder() -> Path:
    """Where the user's progress lies."""
    import platformdirs

    return Path(os.environ.get("COURSE_DATA") or platformdirs.user_data_dir("peft-course", appauthor=False))


def cache_folder() -> Path:
    """Where what can be computed again lies."""
    import platformdirs

    named = os.environ.get("COURSE_DATA")
    return Path(named) / "cache" if named else Path(platformdirs.user_cache_dir("peft-course", appauthor=False))


def write(path: Path, content: bytes) -> None:
    """The whole file or nothing of it, also if the machine stops in between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-")
    with os.fdopen(handle, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(name, path)


class Journal:
    """The ratings in one folder.

    Attributes:
        path: the file.
        noticed: sentences for the user, about a file that had to be mended.
    """

    def __init__(self, where: Path | None = None) -> None:
        self.path = (where or folder()) / NAME
        self.noticed: list[str] = []

    def add(self, review: Review) -> Review:
        """Write one line and wait until the disk has it.

        Raises:
            CourseError: the file can't be written.
        """
        with self._alone():
            try:
                with self.path.open("a+b") as file:
                    size = file.seek(0, os.SEEK_END)
                    file.seek(max(0, size - 1))
                    torn = size and file.read() != b"\n"  # a power cut in the middle of a line: begin a new one
                    file.write((("\n" if torn else "") + review.line() + "\n").encode())
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise CourseError(
                    f"your progress can't be written to {self.path}: {error.strerror}; COURSE_DATA names another folder"
                ) from None
        return review

    def reviews(self) -> list[Review]:
        """All ratings that stand, in order of time. A damaged file is kept aside under another name, and what can be read goes on."""
        if not self.path.exists():
            return []
        with self._alone():
            try:
                raw = self.path.read_bytes()
            except OSError as error:
                raise CourseError(f"your progress in {self.path} can't be read: {error.strerror}") from None
            found, damaged = [], 0
            for line in raw.split(b"\n"):
                if line.strip():
                    try:
                        found.append(Review.of(line.decode()))
                    except (ValueError, TypeError, KeyError, AttributeError):
                        damaged += 1
            if damaged:
                self._keep_aside(raw, found, damaged)
        taken_back = {review.instead_of for review in found}
        return sorted((review for review in found if review.key not in taken_back), key=lambda review: review.at)

    def _keep_aside(self, raw: bytes, found: Iterable[Review], damaged: int) -> None:
        """First the copy, then the mended file in its place, so that a kill between the two loses nothing."""
        aside = self.path.with_name(f"reviews.damaged-{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid4().hex[:4]}.jsonl")
        found = list(found)
        write(aside, raw)
        write(self.path, "".join(review.line() + "\n" for review in found).encode())
        lines = "1 line" if damaged == 1 else f"{damaged} lines"
        self.noticed.append(
            f"{lines} of {self.path.name} could not be read. The file as it was is kept as {aside}; {len(found)} ratings go on."
        )

    def _alone(self):
        """A lock against other programs.

        Raises:
            CourseError: the folder can't be made, or another program does not let go.
        """
        import filelock

        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return filelock.FileLock(self.path.with_suffix(".lock"), timeout=WAIT_SECONDS).acquire()
        except filelock.Timeout:
            raise CourseError(f"another program has held {self.path} for {WAIT_SECONDS:g} s; end it and try again") from None
        except OSError as error:
            raise CourseError(
                f"there is no place for your progress: {self.path.parent}: {error.strerror}; COURSE_DATA names another"
            ) from None
