"""Minutes in the plans for instructors, as lessons, notebooks and exercises state them, and limits of the grader."""

from course import siblings, teaching
from course.units import find, units


def lesson(*names: str) -> int:
    """Minutes to read the lessons of these units."""
    return sum(teaching.lesson_minutes(find(name)) for name in names)


def notebook(name: str, *sections: int) -> int:
    """Minutes for these sections of a unit's notebook; for all of it if none is named."""
    stated = teaching.notebook_minutes(find(name))
    return sum(stated[section] for section in sections or (0,))


def exercises(name: str, *numbers: int) -> int:
    """Minutes for these exercises of a unit; for all if none is named."""
    stated = teaching.exercise_minutes(find(name))
    return sum(stated[number] for number in numbers or stated)


def at_home(*names: str) -> float:
    """Hours for lessons, notebooks and exercises of these units, all of them."""
    return sum(lesson(name) + notebook(name) + exercises(name) for name in names) / 60


def whole_course() -> float:
    """Hours for all lessons, notebooks and exercises that there are."""
    return at_home(*(unit.number for unit in units() if unit.solution.exists()))


def largest_beside() -> int:
    """MB that may come along with a notebook that is graded."""
    return siblings.LARGEST_BYTES // 10**6
