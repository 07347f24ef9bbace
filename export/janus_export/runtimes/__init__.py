"""The runtimes of bundles. They import neither torch nor transformers: servers have none.

``prompts`` makes embeddings of prompts, ``kv_cache`` is where sessions keep keys and values, ``memory`` the
memory of tensors. ``ort`` runs bundles in ONNX Runtime, ``trt`` their engines.
"""
