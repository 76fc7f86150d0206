"""How fast quantized weights are: one layer on a CPU and on a GPU, and whole models that decode on a CPU."""
