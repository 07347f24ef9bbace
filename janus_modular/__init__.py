"""janus-modular: train, swap and ship your own Janus.

The public API is listed in ``__init__.pyi`` and resolved on first use, so that importing it costs nothing.
"""

import lazy_loader

from janus_modular.renamed import refuse_renamed

__version__ = "0.1.0"
_attach, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> object:
    """Return a public name, loading its module.

    Raises:
        ImportError: the name is one of the version before; says what it is called now.
        AttributeError: there is no such name.
    """
    refuse_renamed(__name__, name, __all__)
    return _attach(name)
