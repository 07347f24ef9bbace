"""Weight files of any origin: read lazily, loaded into modules strictly, written by atomic replacement.

Knows modules and tensors, and nothing of Janus: `janus_modular.checkpoints` says what is in the files.
"""
