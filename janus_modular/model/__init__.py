"""The model: decoupled routing (`model`), how components become one (`build`), batches, sessions, checks.

Read in this order: ``model``, ``build``, ``batch``, ``session``.
"""
