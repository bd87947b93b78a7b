"""Text from a decoder: prompts in, tokens out."""
