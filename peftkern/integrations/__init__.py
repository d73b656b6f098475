"""The places where peftkern meets other libraries: a module imports one of them, or reads its objects without."""
