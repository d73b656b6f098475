"""The three implementations of the same two products, reached by lazy registration only."""
