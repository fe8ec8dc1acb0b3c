"""Where the sites of a model are: found, where no row says it, and held to what must hold of them."""
