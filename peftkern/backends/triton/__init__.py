"""The Triton backend. Nothing here is imported, and so neither is Triton, before a call asks for it."""
