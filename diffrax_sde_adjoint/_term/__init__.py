"""Terms: what noise is in them, and the same terms with one thing changed."""
