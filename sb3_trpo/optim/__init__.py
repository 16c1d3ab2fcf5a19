"""The numerics of the update: objective, Fisher products, conjugate gradients, line search, value regression."""
