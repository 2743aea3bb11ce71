"""What an export is held against: golden tensors, and the noise of quantized layers."""
