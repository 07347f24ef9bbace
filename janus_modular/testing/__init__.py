"""Checks components against the contracts of their slots; the built-in components pass the same checks.

A test is a subclass of a contract, run by pytest::

    from janus_modular.testing import UnderstandingEncoderContract

    class TestDino(UnderstandingEncoderContract):
        def make(self):
            return DinoEncoder(DinoConfig(depth=1)), torch.rand(2, 3, 28, 28)

A check is a function of a component and an example input. ``janus-modular plugins check NAME`` runs the same
checks without pytest. Names are listed in ``__init__.pyi`` and resolved on first use.
"""

import lazy_loader

from janus_modular.renamed import refuse_renamed

_attach, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> object:
    """Return a public name, loading its module.

    Raises:
        ImportError: the name is one of the previous version; says the new one.
        AttributeError: there is no such name.
    """
    refuse_renamed(__name__, name, __all__)
    return _attach(name)
