"""Text for a terminal: data made harmless, and cut to a width in columns."""

from unicodedata import combining, east_asian_width


def make_printable(text: str, keep: str = "") -> str:
    """Data on a terminal: without the characters that could drive it, control codes and those that
    turn the direction of writing.
    """
    return "".join(c if c.isprintable() or c in keep else " " for c in text)


def describe_exception(e: BaseException) -> str:
    """An exception of somebody else's code as one line."""
    return f"{type(e).__name__}: {' '.join(make_printable(str(e)).split())[:300]}"


def measure_columns(text: str) -> list[int]:
    """How many columns each character takes: an East Asian one two, a combining one none."""
    return [0 if combining(c) else 1 + (east_asian_width(c) in "WF") for c in text]


def fit_to_width(text: str, width: int) -> str:
    """`text`, made harmless, in exactly `width` >= 2 columns: filled with spaces, or cut and ended
    in "..".
    """
    text = make_printable(text)
    taken = measure_columns(text)
    if sum(taken) > width:
        end = next(i for i in range(len(taken)) if sum(taken[: i + 1]) > width - 2)
        text = text[:end] + ".."
        taken = [*taken[:end], 2]
    return text + " " * (width - sum(taken))
