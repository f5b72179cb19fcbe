"""Practice for interviews, on the question bank of :mod:`course.interview`.

============  =========================================================================================
``bank``      the questions as they can be chosen, without computing anything
``answers``   their answers, with every number computed, in a process of its own while the user thinks
``journal``   what was rated, kept in the user's data folder; lines are added and none is changed
``memory``    when a question is due again (FSRS), from the journal alone
``quiz``      ``course quiz``: spaced repetition in the terminal
``tasks``     coding tasks: exercises without their hints
``mock``      what a mock interview is made of, and what is said at its end
``sitting``   ``course interview`` in the terminal
``screen``    ``course interview --screen``: the same, full screen (Textual)
``plan``      ``course plan``: days until the interview
``deck``      ``course anki``: the bank as an Anki deck
``choices``   multiple choice, for the notebook of unit 15; ``pictures`` are what it draws
``words``     how questions and answers look in a terminal
``commands``  what the command line declares
============  =========================================================================================
"""
