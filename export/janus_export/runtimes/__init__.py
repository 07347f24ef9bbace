"""What runs a bundle. No torch and no transformers in here: this is what a server installs.

``onnx_runtime`` opens a bundle in ONNX Runtime, ``onnx_session`` is one run of it, ``slots`` its cache,
``prompts`` how prompts become embeddings, ``memory`` and ``devices`` where all of that lies.
"""
