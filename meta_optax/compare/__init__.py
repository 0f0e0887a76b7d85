"""The comparison of strategies with what people would otherwise use."""
