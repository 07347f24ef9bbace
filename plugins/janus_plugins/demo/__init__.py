"""The demo: a small Janus trained from nothing on real images, measured on images that it never saw.

Read ``run.py`` first: the whole course on one page. Everything is trained through the doors that a team
would use for its own: `janus_modular.training.fit` for parts, `janus_modular.training.train` for stages.
"""
