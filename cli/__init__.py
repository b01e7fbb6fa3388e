"""The options of the four commands, their beginning and end, and the body of generate.py.

arguments.py has the parser and the types of arguments, options.py the options of all four commands.
Neither imports torch, so that a wrong option is reported in 0.2 seconds. early.py finds the files
of a command. command.py opens the standard streams, and turns a mistake of the user into one line
and an exit code. generation.py runs generate.py: it makes the dataclasses of options/settings.py
from the options, loads the model, and runs one of three modes, prompts.py, interactive.py and
benchmark.py, which share session.py.

Start at generation.run.
"""
