"""How good a quantized model is: perplexity, divergence from the original, multiple-choice tasks."""
