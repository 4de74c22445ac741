"""The folder photonic10m: weights, tokenizer and card of the laboratory's model. ctsft has the code that runs it."""
