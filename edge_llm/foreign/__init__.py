"""ONNX folders that other exporters made, opened as if they were bundles."""
