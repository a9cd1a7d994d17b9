"""From logits to tokens: pure numpy, no session."""
