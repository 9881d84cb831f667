"""What every refusal must be: one line that names the program, the file and the rule, with exit status 2."""

import re

_NO_WORDS_FOR_USERS = re.compile(r"Traceback|Error\(|Exception| object at 0x|\bNoneType\b|site-packages|\.py\", line")


def assert_refused(status: int, told: str, *names: str, allowed: str = "") -> None:
    """told: standard error of a command; names: the file, and where it has them the line or the key.

    allowed: part of the line that may look like a program's own words.
    """
    assert status == 2, told
    assert told.count("\n") == 1 and told.endswith("\n"), told
    program, _, said = told.partition(": error: ")
    assert program.endswith(".py") and said, told
    for name in names:
        assert name in said, f"{name} is not named: {told}"
    assert not _NO_WORDS_FOR_USERS.search(said.replace(allowed, "") if allowed else said), told
    rule = said
    for name in names:
        rule = rule.replace(name, "")
    assert len(re.findall(r"[a-zA-Z]{2,}", rule)) >= 2, f"no rule: {told}"
