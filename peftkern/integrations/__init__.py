"""Where peftkern meets other libraries; each module imports exactly one of them."""
