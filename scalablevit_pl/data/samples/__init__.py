"""Small real data sets that ship with the package, each with its licence, and the scripts that made them."""
