"""One line on stderr where JAX ends a process because another process of the run has gone.

JAX does so from C++, in an instant, with notes and a stack dump that Python can neither catch nor forestall.
So what C++ writes goes through a small process that outlives this one: this file, run as a script. Python's
own stderr goes past it.
"""

import os
import re
import signal
import subprocess
import sys
from typing import BinaryIO

_NOTES = re.compile(rb"[WEF]\d{4} \S+ +\d+ (coordination_service|preemption_sync_manager|client\.h:)")
_FATAL = b"Terminating process because the JAX distributed service detected fatal errors"
_AGAIN = "start the same command on every host again, to go on from the newest checkpoint"


def relay_stderr() -> None:
    """Sends what C++ writes to stderr from now on through the small process."""
    stderr = os.dup(2)
    relay = subprocess.Popen([sys.executable, "-S", __file__], stdin=subprocess.PIPE, stderr=stderr)
    sys.stderr.flush()
    sys.stderr = open(stderr, "w", buffering=1, errors="backslashreplace")  # noqa: SIM115
    os.dup2(relay.stdin.fileno(), 2)
    relay.stdin.close()


def relay(source: BinaryIO, sink: BinaryIO) -> None:
    """Passes lines on; what JAX writes about other processes is held back until the end shows what it was."""
    held = b""
    for line in source:
        if held or _NOTES.match(line):
            held += line
        else:
            sink.write(line)
            sink.flush()
    if _FATAL in held:
        what = "did not come" if b"/RegisterTask" in held else "has gone: killed, failed, or its host is lost"
        held = f"error: another process of this run {what}; {_AGAIN}\n".encode()
    sink.write(held)
    sink.flush()


if __name__ == "__main__":
    # A signal to the whole group must not end it before the process whose last words it carries.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    relay(sys.stdin.buffer, sys.stderr.buffer)
