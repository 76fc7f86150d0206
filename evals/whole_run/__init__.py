"""What a whole GPTQ run costs: quantkit and the peers at equal options and on the same tokens."""
