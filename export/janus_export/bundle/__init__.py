"""The bundle: a folder of graphs, weights and a manifest, read and checked without torch or ONNX."""
