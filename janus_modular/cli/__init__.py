"""The command line: one file for each group of commands, joined in ``app.py``.

Nothing heavy is imported at start-up: a command imports what it needs inside its function, so that
``--help`` and ``plugins list`` load neither torch nor transformers, numpy or jinja2.
"""
