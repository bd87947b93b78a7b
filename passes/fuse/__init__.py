"""Fusions: many nodes to one that TensorRT has a kernel for."""
