"""Files of sparse autoencoders that others wrote: one reader for each layout."""
