"""Spectra and bases: which directions a matrix has, and where an adapter's directions come from."""
