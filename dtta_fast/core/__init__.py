"""The adaptation itself, as functions of tensors: draws, loss, step, guard, optimizers."""
