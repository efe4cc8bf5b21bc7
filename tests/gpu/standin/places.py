"""Which function of the product asked for something."""

import sys

# What no function of the product is around: autograd's own nodes, in the device's thread.
NO_PLACE = "(autograd)"

PACKAGE = "recr1."

INNER_SCOPES = ("comp>", "<genexpr>", "<lambda>")


def name_place() -> str:
    """Return the innermost function of the product that is running: room.file.Class.function.

    Line numbers are left out: they change with every edit. A comprehension is a part of its
    function, as it is from Python 3.12 on.
    """
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith(PACKAGE):
            function = frame.f_code.co_qualname
            while function.endswith(INNER_SCOPES) and "." in function:
                function = function.rpartition(".<locals>.")[0]
            return f"{module.removeprefix(PACKAGE)}.{function}"
        frame = frame.f_back
    return NO_PLACE
