"""The one exception that a user's input may raise."""


class UserError(Exception):
    """Something the user can put right; the command line prints it in one line and exits with code
    2."""
