"""Every strategy against what people would otherwise use, on the same tasks, seeds and rates."""
