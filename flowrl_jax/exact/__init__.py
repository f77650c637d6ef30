"""Problems whose responses can all be listed: what an objective does is computed there."""
