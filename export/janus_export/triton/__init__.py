"""A bundle as a model repository of NVIDIA's Triton Inference Server. Imports neither torch nor Triton.

`repository` writes it, `python_model` is the model that answers and draws inside of Triton.
"""
