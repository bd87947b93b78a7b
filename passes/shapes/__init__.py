"""What is certain about sizes, symbolic ones included."""
