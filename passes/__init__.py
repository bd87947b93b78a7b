"""Passes: graph → graph. Nothing here imports the compiler, torch or tensorrt."""
