"""Functions of a user's own that a config names as `module:function`."""

from __future__ import annotations

import importlib
from contextlib import contextmanager
from typing import Callable, Iterable

from recr1.config.schema import ConfigError
from recr1.utils.interrupts import Stopped
from recr1.utils.terminal import describe_exception


class PluginError(ConfigError):
    """A task or a part of the reward of a user's own has failed. The message names it and the
    query.
    """


def load_function(key: str, text: str, known: Iterable[str]) -> Callable:
    """What `text` names. Raises ConfigError with the config's key and the names it has besides
    (`known`).
    """
    module, colon, name = text.partition(":")
    if not colon:
        raise ConfigError(
            f"{key}: {text!r} is not one of {', '.join(known)}; a function of yours is written module:function"
        )
    try:
        found = getattr(importlib.import_module(module), name)
    except (Stopped, KeyboardInterrupt):
        raise
    except BaseException as e:  # whatever the module does while it is imported, sys.exit() too
        raise ConfigError(
            f"{key}: {text!r} cannot be loaded: {describe_exception(e)}; the module must be importable from where you start"
        ) from e
    if not callable(found):
        raise ConfigError(f"{key}: {text!r} is no function, it is {type(found).__name__}")
    return found


@contextmanager
def calling_plugin(what: str, where: str = "", through: tuple = ()):
    """A block that calls `what` of a user's own: anything that it raises, sys.exit() too, is an
    OwnError `WHAT raised ... WHERE`. Not so a stop, Ctrl-C, and `through`.
    """
    try:
        yield
    except (Stopped, KeyboardInterrupt, PluginError, *through):
        raise
    except BaseException as e:
        raise PluginError(f"{what} raised {describe_exception(e)}{where}") from e
