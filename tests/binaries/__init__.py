"""What the Triton kernels compile to for chips that are not here: the inspector, and which variants it inspects."""
