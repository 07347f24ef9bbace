"""Objectives of training: the losses of stages."""
