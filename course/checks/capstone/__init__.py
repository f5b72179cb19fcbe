"""The checks of unit 14, a file an exercise: three briefs, each answered by a decision."""

from course.checks.capstone.budget import check as budget
from course.checks.capstone.diagnose import check as diagnose
from course.checks.capstone.triage import check as triage

__all__ = ["budget", "diagnose", "triage"]
