"""What runs a bundle. No torch and no transformers in here: this is what a server installs.

``onnx_runtime`` opens a bundle in ONNX Runtime, ``onnx_session`` is one run of it, ``slots`` its cache,
``prompts`` how prompts become embeddings, ``memory`` and ``devices`` where all of that lies.

``tensorrt_runtime`` opens a bundle's engines, ``tensorrt_session`` is one run of them, ``tensorrt_parts``
what chooses in it, ``tensorrt_graphs`` what is repeated, ``tensorrt_contexts`` and ``tensorrt_library`` an
engine at work; ``device_memory`` and ``cuda`` are the GPU below.
"""
