"""From a prompt to the tokens that condition a model."""
