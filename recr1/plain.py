"""Text from anywhere (data, models, a server's errors) as it may stand on a terminal."""


def plain(text: str, keep: str = "") -> str:
    """Without the characters that could drive the terminal: control codes, and those that turn the direction of writing."""
    return "".join(c if c.isprintable() or c in keep else " " for c in text)


def said(e: BaseException) -> str:
    """An exception of somebody else's code as one line."""
    return f"{type(e).__name__}: {' '.join(plain(str(e)).split())[:300]}"
