"""Checks of what is written behind a config file's colon. Not a config itself."""


def check(choice, known, what):
    """Returns `choice`, which must be one of `known`."""
    if choice not in known:
        raise ValueError(f"no {what} {choice!r}; it may be {', '.join(known)}")
    return choice
