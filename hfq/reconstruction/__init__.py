"""Learning quantized weights against what a layer, a block or a run of blocks should put out."""
