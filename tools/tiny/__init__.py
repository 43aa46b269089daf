"""The tiny trained model: a drawn world, training on it, and measuring against it."""
