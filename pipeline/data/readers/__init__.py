"""One reader for each annotation format, and the records they share."""
