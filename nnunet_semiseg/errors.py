class UserError(ValueError):
    """Something the user can mend. One line for each problem: which file, what is wrong, how to mend it."""
