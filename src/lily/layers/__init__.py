"""What sits in the model? The bank of shared tensors, and one adapted layer of each kind."""
