"""Serving: answers and drawings of many callers in one running batch. Imports no torch.

Read ``requests.py`` (what is submitted, and the events of a job), then ``engine.py``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
