"""The commands: their options, their beginning and end, and the modes of generate.py.

arguments.py has the parser and the converters of arguments, options.py the options of all four
commands; neither imports torch, so that a wrong option is answered in 0.2 seconds. command.py opens
the standard streams, and turns an error of the user into one line and an exit code. generation.py
runs generate.py: it turns options into the dataclasses of options/settings.py, finds and loads the
model, and hands it to one of three modes: prompts.py, interactive.py, benchmark.py.

Start at generation.run.
"""
