"""Training of the policy of `meta_optax.learned`: ``python -m meta_optax.metatrain``."""
