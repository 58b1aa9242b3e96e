"""Part of hfq."""
