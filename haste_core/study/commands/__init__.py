"""Commands of `haste` that live in files of their own."""
