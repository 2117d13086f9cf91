"""The models: one encoder, its heads, the families of checkpoints it reads."""
