"""The course as a website: :func:`write` makes it, with Sphinx, for a browser without a network.

A build has two halves. :mod:`course.website.pages` lays out what the reader sees as Markdown and notebooks in a folder of sources, under
the same paths as in the course, so that links between files are links between pages. Sphinx makes pages of them, with the settings of
``conf.py`` and the looks of ``static/``. Both halves do again only what has changed.
"""

from course.website.building import write
from course.website.formulas import mathml

__all__ = ["mathml", "write"]
