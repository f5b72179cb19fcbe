"""The checks of unit 09: the Fisher's diagonal, EWC, λ between libraries, a reservoir, A-GEM's projection, forgetting at equal learning."""

from course.checks.forgetting.compare import check as compare
from course.checks.forgetting.ewc import check as ewc
from course.checks.forgetting.fisher import check as fisher
from course.checks.forgetting.paper_lambda import check as paper_lambda
from course.checks.forgetting.project import check as project
from course.checks.forgetting.reservoir import check as reservoir

__all__ = ["compare", "ewc", "fisher", "paper_lambda", "project", "reservoir"]
