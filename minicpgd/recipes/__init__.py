"""Files that settings come from: known architectures, recipes."""
