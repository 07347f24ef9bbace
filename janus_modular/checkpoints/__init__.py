"""Checkpoints: reading anybody's weights lazily, writing our own so that nothing is ever half-written.

``native`` is our format, ``opening`` finds which format a folder has, ``converting`` turns one into
another, ``from_config`` builds a new model and its processor. `janus_modular.weights` reads and writes the
weight files.
"""

import lazy_loader

# resolved on first use: importing the package loads no torch
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
