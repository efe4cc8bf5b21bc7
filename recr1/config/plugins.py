"""Functions of the user's that a config names as `module:function`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from recr1.config.schema import ConfigError
from recr1.utils.interrupts import Stopped
from recr1.utils.terminal import describe_exception


class PluginError(ConfigError):
    """A task or a term of the reward of the user's has failed. The message names it and the
    query.
    """


def load_function(key: str, text: str, known: Iterable[str]) -> Callable:
    """Import the function that `text` names as module:function.

    Raises ConfigError with the config's key; `known`: what may be given instead, for the message.
    """
    module_name, colon, function_name = text.partition(":")
    if not colon:
        raise ConfigError(
            f"{key}: {text!r} is not one of {', '.join(known)}; "
            "a function of yours is written module:function"
        )
    try:
        module = importlib.import_module(module_name)
        function = getattr(module, function_name)
    except (Stopped, KeyboardInterrupt):
        raise
    except BaseException as e:  # whatever the module does while it is imported, sys.exit() too
        raise ConfigError(
            f"{key}: {text!r} cannot be loaded: {describe_exception(e)}; "
            "the module must be importable from where you start"
        ) from e
    if not callable(function):
        raise ConfigError(f"{key}: {text!r} is no function, it is {type(function).__name__}")
    return function


@contextmanager
def calling_plugin(what: str, where: str = "", through: tuple = ()) -> Iterator[None]:
    """Turn whatever the user's function `what` raises in the block into a PluginError.

    Its message is `WHAT raised ... WHERE`. sys.exit() is one of the things it may raise; a stop,
    Ctrl-C and the exceptions of `through` pass as they are.
    """
    try:
        yield
    except (Stopped, KeyboardInterrupt, PluginError, *through):
        raise
    except BaseException as e:
        raise PluginError(f"{what} raised {describe_exception(e)}{where}") from e
