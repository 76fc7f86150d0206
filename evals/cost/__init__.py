"""What GPTQ costs against the number of blocks and of calibration tokens: both lines should be straight."""
