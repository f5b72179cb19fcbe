"""One adaptation from data to deployment: a plan, its memory, data, training, evaluation, merge, export, report, audit.

plan.py        what is asked for, and the memory it takes, before anything runs
base.py        the base model: loaded, given a chat template, hashed
data.py        rows read, checked, split
checkpoint.py  a run's state on the disk: whole or not there
train.py       the steps, and how they go on after a kill
evaluate.py    before and after on the same items, with intervals
merge.py       adapter into weights, and how far that is from what was trained
export.py      adapter, merged model, GGUF: written, loaded again, compared
gguf_file.py   the GGUF writer
run.py         all of it in order
report.py      terminal, JSON, HTML
audit.py       the production checklist over an adapter
commands.py    the command line
"""
