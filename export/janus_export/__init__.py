"""Export of trained models: ONNX graphs, bundles, and runtimes."""
