"""Files that run without this project: the exports copy them as they are."""
