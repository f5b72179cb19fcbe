"""Measurements of the course's code beside the libraries that people use, on the machine at hand.

    course bench                                    lists them
    course bench nf4_kernels                        runs one; so does python -m benchmarks.nf4_kernels, from the checkout's folder
    course bench nf4_kernels --smoke                a dry run in seconds, on a CPU too: every path, no meaning
    course bench nf4_kernels --out DIR              puts the result elsewhere
    course bench nf4_kernels --recorded             measures nothing: the table of each recorded card

A result is ``recorded/<device>/<name>.json``, with the day and the versions; lessons, notebooks and figures read their numbers from there
(``course.lab.recorded``) and tests hold them to their bars. A part of a measurement (``--only``) and a dry run go to a temporary folder.

A benchmark is a module with a ``main()``. Its docstring begins with a line for the list, shows how to start it, and says what is measured,
against what, and how the comparison is made fair. It measures all sides in one run on one device, after warm-up, and keeps a failure as a
row, so that the others go on. Its ``table(result)`` is what it prints, of a new result as of a recorded one, in 80 columns; to import the
module needs neither a GPU nor Triton. What benchmarks share:

- ``cli``: the options that all of them have, and where a result goes;
- ``meters``: milliseconds, bytes, and the step whose phases are watched;
- ``cases``: the models, of a real one's shape, with random weights.
"""
