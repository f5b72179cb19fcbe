"""The machinery of the course: lab, checks, interview questions, and the ``course`` command."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # the checkout; the course is installed in place (pip install -e .)
