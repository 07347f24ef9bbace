"""Bundles as engines of TensorRT or TensorRT-RTX, on an NVIDIA GPU."""
