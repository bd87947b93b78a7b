"""Operators that TensorRT lacks, spelled out in standard ones."""
