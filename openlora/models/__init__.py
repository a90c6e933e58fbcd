"""Base models: configuration, weight loading and the decoder's forward pass."""
