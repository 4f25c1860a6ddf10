"""Which trainable parameter is what: the layouts of adapter libraries, read off names, partners, code and structure."""
