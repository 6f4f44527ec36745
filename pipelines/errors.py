"""Errors of the user or of the machine: which they are, and one line that says what to do."""

from __future__ import annotations

import errno

EXTRAS = {
    "s3fs": "s3",
    **dict.fromkeys(("onnx", "onnxruntime", "onnxscript"), "onnx"),
    **dict.fromkeys(("gradio", "fastapi", "uvicorn"), "app"),
}
SIGNS = ("not enough memory", "can't allocate memory", "out of memory", "Insufficient memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Python's MemoryError, torch's and CUDA's OutOfMemoryError, and what torch and OpenCV raise on a CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    of_a_library = isinstance(error, RuntimeError) or type(error).__module__.startswith("cv2")
    return of_a_library and any(sign in str(error) for sign in SIGNS)


def is_of_the_user(error: BaseException) -> bool:
    """Whether an error comes from the user's input or machine, not from a bug."""
    known = isinstance(error, (ValueError, OSError, ImportError))
    looped = isinstance(error, RuntimeError) and str(error).startswith("Symlink loop")  # from Path.resolve
    return known or looped or type(error).__module__.startswith("botocore.") or is_out_of_memory(error)


def one_line(error: BaseException) -> str:
    """What went wrong and what to do, in one line."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        extra = f"[{EXTRAS[package]}]" if package in EXTRAS else ""
        return f"the package {package} is not installed: pip install 'samfeat{extra}'"
    if isinstance(error, ImportError):  # fsspec names the package needed for a URL
        for package, extra in EXTRAS.items():
            if package in str(error):
                return f"the package {package} is not installed: pip install 'samfeat[{extra}]'"
    if is_out_of_memory(error):
        if type(error).__name__ == "OutOfMemoryError":
            return "not enough free GPU memory: use a smaller teacher, smaller images, or --device cpu"
        return "not enough memory: use smaller images or fewer keypoints"
    if isinstance(error, OSError) and error.errno is not None:
        where = f"{error.filename}: " if error.filename else ""
        if error.errno == errno.ENOSPC:
            return (
                f"{where}no space left on the disk: free some, then run the same command again; finished work is kept"
            )
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return f"{where}no permission to write or read there: choose another folder, or change its permissions"
        return f"{where}{error.strerror or error}"
    return " ".join(str(error).split())
