"""Checkpoints: reading anybody's weights lazily, writing our own so that nothing is ever half-written.

``weights`` shows files as a mapping, ``filling`` puts tensors into modules; ``native`` is our layout,
``opening`` finds which layout a folder has, ``converting`` turns one into another.
"""

import lazy_loader

# resolved on first use: parts load their own weights through `pretrained`, and `native` builds of parts
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
