"""The exception for errors in a user's input."""


class UserError(Exception):
    """An error that the user can correct. The command line prints it and exits with code 2."""
