"""Everything that can go wrong, at random, under load: what a client notices must be explained by a process that was killed."""
