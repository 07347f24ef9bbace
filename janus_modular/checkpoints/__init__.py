"""Checkpoints: a model with its processor, read from any format and written in any.

``assembly`` has the model with its processor, ``opening`` detects and opens formats, ``native`` is our own
format, ``converting`` and ``merging`` rewrite checkpoints. `janus_modular.weights` handles the weight files.
"""

import lazy_loader

# names are resolved on first use, so that importing the package loads no torch
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
