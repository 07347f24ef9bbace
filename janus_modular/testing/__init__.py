"""Holds a component to its slot's contract: the checks that our own are tested by, for everybody's.

A test of yours is a subclass, run by pytest::

    from janus_modular.testing import UnderstandingEncoderContract

    class TestDino(UnderstandingEncoderContract):
        def make(self):
            return DinoEncoder(DinoConfig(depth=1)), torch.rand(2, 3, 28, 28)

A check is a plain function of a component and an example input. ``janus-modular plugins check NAME`` runs
the same ones, without pytest. Names are listed in ``__init__.pyi`` and resolved on first use.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
