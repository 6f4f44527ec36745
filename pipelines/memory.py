"""Whether a computation failed for lack of memory: every library has an exception of its own for that."""

from __future__ import annotations

SIGNS = ("not enough memory", "can't allocate memory", "out of memory", "Insufficient memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Python's MemoryError, torch's and CUDA's OutOfMemoryError, and what torch and OpenCV raise on a CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    of_a_library = isinstance(error, RuntimeError) or type(error).__module__.startswith("cv2")
    return of_a_library and any(sign in str(error) for sign in SIGNS)
