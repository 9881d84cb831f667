"""The one exception for what a user can get wrong, and how messages count."""


class UserError(Exception):
    """A mistake in the user's input, told in one line: the file or place, the rule, the likely cause.

    Commands print the line and end with exit status 2; every other exception is a bug and keeps its traceback.
    """


def counted(number: int, one: str, several: str = "") -> str:
    """A number and what it counts: 1 picture, 2 pictures; several: where it takes more than an s, as in queries."""
    return f"{number} {by_number(number, one, several or f'{one}s')}"


def by_number(number: int, one: str, several: str) -> str:
    """The word that goes with a number: picture or pictures, has or have."""
    return one if number == 1 else several
