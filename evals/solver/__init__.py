"""GPTQ's solver alone, against those of llm-compressor and GPTQModel: loss first, then CPU time."""
