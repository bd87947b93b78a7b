"""SwiGLUQuantize: the gate of a gated feed-forward layer, and quantization, in one pass over memory."""
