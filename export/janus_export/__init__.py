"""Graphs, bundles and runtimes: a trained model on its way to production."""
