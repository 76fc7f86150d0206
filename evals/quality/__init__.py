"""quantkit and its peers at the same number of bits: perplexity, KL, size, CPU time and peak memory."""
