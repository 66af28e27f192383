"""What is looked at before a long run: one file for each kind of thing, and `examination` for their order."""
