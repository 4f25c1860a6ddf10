"""What becomes of an optimizer's groups after they were built."""
