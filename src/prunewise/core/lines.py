"""Lines of the user's code, by which operations are named in messages."""

from __future__ import annotations

import sys
import sysconfig
import traceback
from pathlib import Path
from types import FrameType

import torch

_LIBRARIES = tuple(
    str(Path(p))
    for p in {sysconfig.get_path("stdlib"), str(Path(torch.__file__).parent), str(Path(__file__).parents[1])}
)


def is_users(file: str) -> bool:
    """True for a file that is neither Python's, torch's nor ours."""
    return not file.startswith((*_LIBRARIES, "<"))


def line_here() -> str:
    """file:line of the innermost frame in the user's code that runs now; "" where there is none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if is_users(name):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def line_of(error: BaseException) -> str:
    """file:line in the user's code that an error went through last; "" where there is none."""
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    return next((f"{file}:{line}" for file, line in reversed(frames) if is_users(file)), "")
