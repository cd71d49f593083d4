"""A learned policy outside of its env: attached to a model, or called on texts."""
