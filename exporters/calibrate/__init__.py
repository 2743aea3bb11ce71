"""How large a transformer's activations get, for static scales."""
