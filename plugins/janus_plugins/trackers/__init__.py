"""Trackers, which record the metrics of training."""
