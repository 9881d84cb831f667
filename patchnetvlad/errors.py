"""The one exception for what a user can get wrong."""


class UserError(Exception):
    """A mistake in the user's input, told in one line: the file or place, the rule, the likely cause.

    Commands print the line and end with exit status 2; every other exception is a bug and keeps its traceback.
    """
