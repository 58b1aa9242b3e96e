"""Training of a whole model: a student that computes with changed weights, a loop, losses on its outputs."""
