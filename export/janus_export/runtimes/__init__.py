"""The runtimes of bundles. They import neither torch nor transformers: servers have none.

``prompts`` embeds prompts, ``kv_cache`` stores the keys and values of sessions, ``memory`` manages the memory
of tensors. ``ort`` runs bundles in ONNX Runtime, ``trt`` their engines.
"""
