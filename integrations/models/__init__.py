"""Compact models that transformers lacks, as ``PreTrainedModel`` classes that save, load and take part in pipelines."""
