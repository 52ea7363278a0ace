"""An adapter at rest: folder, packed file, URL; what it holds, costs and fits, and the ways to change it."""
