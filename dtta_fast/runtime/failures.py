"""Tells whose an error is: the caller's, or one that another way of running avoids."""

from __future__ import annotations

import torch

from dtta_fast.runtime.torch_state import interrupt_behind


def out_of_memory(error: BaseException) -> bool:
    """Returns whether an allocation failed, on a GPU or on the CPU (where torch raises a plain RuntimeError)."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    # messages of the CPU allocator on Windows and Linux, of the C++ library, and of CUDA's libraries, which bypass torch's cache
    said = ("not enough memory", "can't allocate memory", "std::bad_alloc", "out of memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)


def is_the_callers(error: BaseException, outer: BaseException | None) -> bool:
    """Returns whether an error is Ctrl-C or an OSError such as a timeout, or has taken the place of one, and so belongs to the caller.

    outer: the exception that was being handled before.
    """
    found: BaseException | None = error
    while found is not outer and found is not None:
        if isinstance(found, OSError):
            return True
        found = found.__context__
    return interrupt_behind(error, outer) is not None


def reason(error: BaseException) -> str:
    """Returns the first line of an error's message, or the name of its type if there is none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
