"""Functions of a user's own that a config names as `module:function`."""
from __future__ import annotations

import importlib
from typing import Callable, Iterable

from .config import ConfigError


def said(e: BaseException) -> str:
    """An exception of a user's function as one line, without anything that drives a terminal: its text may be a server's."""
    text = "".join(c if c.isprintable() else " " for c in str(e))
    return f"{type(e).__name__}: {' '.join(text.split())[:300]}"


def function(key: str, text: str, known: Iterable[str]) -> Callable:
    """What `text` names. Raises ConfigError with the config's key and the names it has besides (`known`)."""
    module, colon, name = text.partition(":")
    if not colon:
        raise ConfigError(f"{key}: {text!r} is not one of {', '.join(known)}; a function of yours is written module:function")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as e:
        raise ConfigError(f"{key}: {text!r} cannot be loaded: {e}; the module must be importable from where you start") from None
    if not callable(found):
        raise ConfigError(f"{key}: {text!r} is no function, it is {type(found).__name__}")
    return found
