"""Architectures that the graph builder does not know, through optimum's ONNX exporter."""
