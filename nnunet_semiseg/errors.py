class UserError(ValueError):
    """Something the user can mend. The message is one line: which file, what is wrong, how to mend it."""
