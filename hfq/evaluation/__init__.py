"""What a model is worth and what it costs: perplexity, agreement with the float model, speed, memory, size."""
