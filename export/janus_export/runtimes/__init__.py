"""What runs a bundle. No torch and no transformers in here: this is what a server installs.

``prompts`` makes embeddings of prompts, ``kv_cache`` is where sessions keep keys and values, ``memory`` where
tensors lie. ``ort`` runs bundles in ONNX Runtime, ``trt`` their engines.
"""
