"""How good the masks are: protocols, metrics, and what is needed so that others trust the figures."""
