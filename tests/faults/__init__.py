"""Whatever fails, whenever it fails: nothing that was committed is lost."""
