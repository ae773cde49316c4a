"""Models for apps without Python: one directory that embed/ reads."""
