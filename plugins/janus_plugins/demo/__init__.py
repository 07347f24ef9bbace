"""The demo: a small Janus trained from scratch on real images, and evaluated on held-out images.

Read ``run.py`` first: the whole procedure on one page. It trains with the functions that users call:
`janus_modular.training.train.train` for stages, `janus_modular.training.loop.fit` for the classifier.
"""
