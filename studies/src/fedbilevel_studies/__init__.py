"""The studies of fedbilevel's results page: `fedbilevel reproduce` in a clone, from the library's public names alone."""
