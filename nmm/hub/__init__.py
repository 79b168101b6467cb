"""Files that an export carries, so that `transformers` can load it without this project."""
