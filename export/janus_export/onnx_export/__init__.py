"""ONNX graphs: declared, traced, quantized, bound to weights, written as a bundle."""
