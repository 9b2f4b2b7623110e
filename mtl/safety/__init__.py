"""Safe reading of files of unknown origin: only regular files, bounded sizes, and plain types."""
