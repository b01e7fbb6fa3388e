"""What a user can choose, as frozen dataclasses that import no torch.

settings.py holds the dataclasses and all defaults. rules.py is the one table of options that need
or exclude one another; the commands (cli/) and load_model read it alike.
"""
