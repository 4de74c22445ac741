"""Quantities: what can be measured of an adapter and its gradients, each a small function; `ctsft.probe` runs them."""
