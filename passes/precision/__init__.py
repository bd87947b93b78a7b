"""What precision the arithmetic has."""
