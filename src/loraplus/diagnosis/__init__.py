"""What rate every parameter's step really has, whoever built the optimizer, and what is wrong with it."""
