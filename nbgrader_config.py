"""For classes: nbgrader on the course's own solutions, one assignment a unit, in the folder classroom/.

nbgrader generate_assignment 02_lora
nbgrader autograde 02_lora
nbgrader export

Submissions go to classroom/submitted/STUDENT/02_lora/02_lora.ipynb, or through nbgrader's exchange, classroom/exchange. The layout that
nbgrader needs is written from solutions/ by each command. The points are those of `course check`: its judge replaces nbgrader's own.
"""

import sys

from course import ROOT, classroom

classroom.own_programs_first()
c = get_config()  # noqa: F821 (nbgrader provides it)
classroom.configure(c, ROOT / "classroom")
if "nbgrader" in sys.argv[0]:  # JupyterLab reads this file too, for learners
    classroom.lay_out(ROOT / "classroom")
