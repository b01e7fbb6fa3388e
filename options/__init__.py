"""The choices of a user, as frozen dataclasses, without torch.

settings.py holds the dataclasses and all defaults. rules.py is the only table of options that need
or exclude one another; both the commands (cli/) and load_model apply it.
"""
