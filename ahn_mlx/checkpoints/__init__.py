"""Model directories and files that may come from anyone: read, judged, converted, written."""
