"""SmolLM2-135M in 4 bits: perplexity, CPU time and peak memory."""
