"""The decoder, its attention, its log Z head and real weights for it."""
