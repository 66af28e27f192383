"""The `scalablevit` command: one file per command, and the parser they share."""
