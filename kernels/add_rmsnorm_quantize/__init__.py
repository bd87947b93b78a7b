"""AddRMSNormQuantize: residual add, RMS normalization and quantization in one pass over memory."""
