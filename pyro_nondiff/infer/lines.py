"""Which line of the user's program a message is about."""

import traceback
from collections.abc import Sequence
from pathlib import Path
from traceback import FrameSummary

_PACKAGE = str(Path(__file__).parents[1])
_PYTHON = str(Path(traceback.__file__).parent)


def own_line(frames: Sequence[FrameSummary]) -> str | None:
    """The innermost line that is no library's, in words; None if there is none.

    Arguments:
        frames: From the outermost to the innermost.
    """
    own = (frame for frame in reversed(frames) if not _is_library(frame.filename))
    frame = next(own, None)
    return None if frame is None else line(frame)


def line(frame: FrameSummary) -> str:
    """A line, in words."""
    return f"line {frame.lineno} of {frame.name}(): {frame.line}"


def _is_library(filename: str) -> bool:
    return "site-packages" in filename or filename.startswith((_PACKAGE, _PYTHON))
