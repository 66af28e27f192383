"""From an encoded mask to the class of each pixel."""

IGNORED = 255  # the class of pixels that no loss and no metric counts
