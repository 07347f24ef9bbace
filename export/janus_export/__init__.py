"""Export of trained models to ONNX and TensorRT: bundles, their verification, and runtimes without torch."""
