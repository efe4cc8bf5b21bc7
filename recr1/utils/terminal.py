"""Text for a terminal: data is made harmless and cut to a width in columns."""

from unicodedata import combining, east_asian_width


def make_printable(text: str, keep: str = "") -> str:
    """Replace by spaces the characters that could drive a terminal: control codes, and those that
    turn the direction of writing. Those in `keep` stay.
    """
    characters = []
    for character in text:
        is_harmless = character.isprintable() or character in keep
        characters.append(character if is_harmless else " ")
    return "".join(characters)


def describe_exception(e: BaseException) -> str:
    """Return an exception of somebody else's code as one line."""
    words = make_printable(str(e)).split()
    message = " ".join(words)
    return f"{type(e).__name__}: {message[:300]}"


def measure_columns(text: str) -> list[int]:
    """Return how many columns each character takes: a wide East Asian one 2, a combining one 0."""
    widths = []
    for character in text:
        if combining(character):
            widths.append(0)
        else:
            is_wide = east_asian_width(character) in "WF"
            widths.append(2 if is_wide else 1)
    return widths


def fit_to_width(text: str, width: int) -> str:
    """Return `text`, made harmless, in exactly `width` >= 2 columns: filled with spaces, or cut and
    ended in "..".
    """
    text = make_printable(text)
    widths = measure_columns(text)
    total = sum(widths)
    if total <= width:
        return text + " " * (width - total)

    # Characters go in while they leave two columns for the dots.
    end = 0
    total = 0
    while total + widths[end] <= width - 2:
        total += widths[end]
        end += 1
    return text[:end] + ".." + " " * (width - 2 - total)
