"""Small data sets that ship with the package or are drawn by it, and the scripts that made them or build others."""
