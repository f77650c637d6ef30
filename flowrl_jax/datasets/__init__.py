"""Data sets: TFDS builders (array_record, no TensorFlow) and the source that reads them."""
