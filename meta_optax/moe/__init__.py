"""Mixtures of experts: labels, router metrics, the balance bias, control by layer.

The public names are those of `meta_optax` itself.
"""
