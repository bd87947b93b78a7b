"""How operators of com.microsoft, and quantized ones, are spelled out in standard ONNX: one family a file."""
