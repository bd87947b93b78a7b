"""DequantGemv: a few rows of activations times INT4 weights in blocks, for decoding."""
