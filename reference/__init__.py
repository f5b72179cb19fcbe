"""The ideas of the course as short, tested modules: torch, and nothing of the course itself."""
