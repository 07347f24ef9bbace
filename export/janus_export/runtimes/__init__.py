"""What runs a bundle. No torch and no transformers in here: this is what a server installs.

``contract`` is what every runtime gives, ``prompts`` how prompts become embeddings, ``kv_cache`` where
sessions keep keys and values, ``memory`` where tensors lie. ``ort`` runs bundles in ONNX Runtime, ``trt``
their engines.
"""
