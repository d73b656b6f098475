"""Plain PyTorch: the mathematics to read (``formula``) and the path that runs on any device (``library``)."""
