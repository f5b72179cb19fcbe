"""One module a unit; each function recomputes or measures one statement that a lesson, an answer or the README makes."""
