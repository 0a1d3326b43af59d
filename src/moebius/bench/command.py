"""Running a peer, or ourselves, as a program that says what it found in its last line."""

import subprocess
from collections.abc import Sequence


def last_line(command: Sequence[str], what: str) -> str:
    """What it printed last; ValueError, with the last line of its errors, where `what` failed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except OSError as error:
        raise ValueError(f"{command[0]} cannot be run: {error}") from error
    except subprocess.CalledProcessError as error:
        last = error.stderr.strip().splitlines()[-1:]
        raise ValueError(f"{what} failed under {command[0]}: {' '.join(last)}") from error
    return (done.stdout.splitlines() or [""])[-1]
