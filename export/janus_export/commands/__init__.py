"""Subcommands, one per file; each imports its dependencies when it runs, so that ``--help`` stays fast."""
