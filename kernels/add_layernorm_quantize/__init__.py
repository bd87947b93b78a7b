"""AddLayerNormQuantize: residual add, layer normalization and quantization in one pass over memory."""
