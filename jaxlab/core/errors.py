"""Errors that are the user's to mend: one line, no traceback."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. The message names the field or file and how to mend it; commands exit with status 2."""

    status = 2


def nearest(word: str, accepted: Iterable[str]) -> str:
    """Returns " Did you mean 'x'?" for the accepted word nearest to `word`, or an empty string."""
    matches = difflib.get_close_matches(word, list(accepted), n=1, cutoff=0.5)
    return f" Did you mean '{matches[0]}'?" if matches else ""
