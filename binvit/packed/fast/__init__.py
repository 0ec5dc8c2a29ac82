"""The fast path: thresholds on integers instead of float steps, one compiled forward pass per image."""
