"""The choices of a user, as frozen dataclasses, without torch.

settings.py has the dataclasses and all defaults. rules.py has the table of options that need or
exclude one another, which the commands (cli/) and load_model check. Start at settings.LoadOptions.
"""
