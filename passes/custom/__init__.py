"""Steps that a user writes."""
