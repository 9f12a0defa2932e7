"""The artifact: one deterministic tar.zst with its index first."""
