"""janus-modular: train, swap and ship your own Janus.

The public API is listed in ``__init__.pyi`` and resolved on first use, so that importing it costs nothing.
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
