"""TensorRT engines: graphs of a bundle lowered and built."""
