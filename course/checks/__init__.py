"""A folder a unit, a file an exercise: its worked answer, what is observed, and the known mistakes. The folder hands on the checks."""
