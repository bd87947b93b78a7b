"""Passes over the caches of keys and values of decoders."""
