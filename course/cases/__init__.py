"""The debugging cases' scripts, a file each: see ``course/casebook.py``."""
