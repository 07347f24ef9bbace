"""The command line: one module for each group of commands; ``app.py`` registers them.

Start-up stays fast because commands import what they need inside their functions: ``--help`` and
``plugins list`` load neither torch nor transformers, numpy or jinja2.
"""
