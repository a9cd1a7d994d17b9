"""Writing the decoder's ONNX graph."""
