"""Reading what may come from anybody: regular files, bounded sizes, plain types."""
