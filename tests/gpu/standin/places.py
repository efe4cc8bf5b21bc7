"""Which function of the product asked for something."""

import sys

# What no function of the product is around: autograd's own nodes, in the device's thread.
NO_PLACE = "(autograd)"

PACKAGE = "recr1."


def name_place() -> str:
    """Return the innermost function of the product that is running: room.file.Class.function.

    Line numbers are left out: they change with every edit.
    """
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith(PACKAGE):
            return f"{module.removeprefix(PACKAGE)}.{frame.f_code.co_qualname}"
        frame = frame.f_back
    return NO_PLACE
