"""jaxlab: learning that holds up when the data shifts, as pure functions in JAX."""
